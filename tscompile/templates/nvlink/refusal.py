"""What the kernels over NVLink cannot serve."""

from __future__ import annotations

from ...problem import FusionProblem, GatherUse, Gemm, Plan
from .kernels.config import DTYPE_CODES, MAX_OPERANDS
from .operands import aligned_sizes

MAX_RANKS = 8
CAPABILITY = (9, 0)


def nvlink_refusal(problem: FusionProblem) -> str | None:
    """Why a problem cannot run over NVLink, None if it can. Whether the GPUs reach each other is voted on at run time."""
    if problem.device != "cuda":
        return f"NVLink serves CUDA tensors, these are on {problem.device}"
    if not 2 <= problem.group_size <= MAX_RANKS:
        return f"the kernels serve 2 to {MAX_RANKS} ranks, the group has {problem.group_size}"
    if problem.capability not in (None, CAPABILITY):
        return "the kernels are for compute capability 9.0 (H100, H200), this GPU has {}.{}".format(*problem.capability)
    if not problem.intra_host:
        return "the ranks are on several hosts: NVLink reaches one"
    if problem.dtype not in DTYPE_CODES:
        return f"dtype {problem.dtype} is not one of {', '.join(DTYPE_CODES)}"
    if problem.reduce_op not in ("sum", "avg"):
        return f"reduction {problem.reduce_op} is not a sum or an average"
    return None


def serves_use(use: GatherUse, wire: str, k: int, n: int) -> bool:
    """True if the kernel for gathered rows on the left runs this use: in the dtype that travels, sizes that TMA addresses."""
    return use.reads_rows and use.dtype == wire and aligned_sizes(k, n)


def may_serve_blocks(use: GatherUse, wire: str, gemm: Gemm) -> bool:
    """True if the kernel for the other uses may run this one; gather_blocks.py says it for sure once the shard's shape is known."""
    gathered, free = (gemm.m, gemm.n) if use.side == "lhs" else (gemm.n, gemm.m)
    columns = gemm.k if (use.side == "lhs") != use.transposed else gathered
    return use.dtype == wire and aligned_sizes(columns, gemm.n) and (aligned_sizes(gemm.k) or aligned_sizes(free))


def gather_refusal(problem: FusionProblem, plan: Plan) -> str | None:
    """Why the gather's kernels cannot serve a problem."""
    general = nvlink_refusal(problem)
    if general is not None:
        return general
    if all(use.dtype != plan.dtype for use in plan.uses):
        return "no matmul is in the dtype that travels"
    for use, gemm in zip(plan.uses, problem.gemms, strict=True):
        if serves_use(use, plan.dtype, gemm.k, gemm.n) or may_serve_blocks(use, plan.dtype, gemm):
            return None
    return "no matmul has operands and a result whose rows are multiples of 16 bytes"


def sum_refusal(problem: FusionProblem, plan: Plan) -> str | None:
    """Why the reducing kernel cannot serve a problem."""
    general = nvlink_refusal(problem)
    if general is not None:
        return general
    if plan.rank_axis != "rows":
        return "the ranks own columns of the result: the kernel scatters rows"
    if plan.coefficients and len(plan.coefficients) != len(problem.gemms):
        return "a term of the sum is not a matmul"
    if any(dtype != plan.dtype for dtype in problem.gemm_dtypes):
        return "the sum is reduced in another dtype than the matmuls compute in"
    return terms_refusal(problem.gemms, plan)


def terms_refusal(gemms: tuple[Gemm, ...], plan: Plan) -> str | None:
    """Why the reducing kernel cannot take these matmuls."""
    if not 1 <= len(gemms) <= MAX_OPERANDS:
        return f"the sum has {len(gemms)} matmuls, the kernel takes {MAX_OPERANDS}"
    if 0.0 in plan.coefficients:
        return "a coefficient is zero"
    if not aligned_sizes(*(gemm.k for gemm in gemms), *(gemm.n for gemm in gemms)):
        return "a matrix has rows that are no multiple of 16 bytes"
    return None
