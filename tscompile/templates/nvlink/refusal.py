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
    """True if the gather's kernel runs this use: gathered rows on the left, in the dtype that travels, sizes that TMA addresses."""
    return (
        use.side == "lhs"
        and not use.transposed
        and use.rank_axis == "rows"
        and use.dtype == wire
        and aligned_sizes(k, n)
    )


def gather_refusal(problem: FusionProblem, plan: Plan) -> str | None:
    """Why the gather's kernel cannot serve a problem."""
    general = nvlink_refusal(problem)
    if general is not None:
        return general
    if any(serves_use(use, plan.dtype, g.k, g.n) for use, g in zip(plan.uses, problem.gemms, strict=True)):
        return None
    if all(use.contracts_ranks for use in plan.uses):
        return "the gathered dimension is summed over (a weight gradient): no kernel for that alone yet"
    return "no matmul takes gathered rows as its left operand with rows that are multiples of 16 bytes"


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
