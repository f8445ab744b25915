"""What the kernels over NVLink cannot serve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ...language.context import MAX_RANKS
from ...problem import FusionProblem, GatherUse, Gemm, Plan
from ..template import torch_dtype
from .kernels.config import DTYPE_CODES, MAX_LEGS, MAX_OPERANDS, MAX_TARGETS
from .operands import aligned_sizes
from .sums import problem_plan

CAPABILITY = (9, 0)


def group_refusal(problem: FusionProblem) -> str | None:
    """Why the ranks of a problem have no kernels over NVLink, None if they have. Whether the GPUs reach each other is voted on at run
    time."""
    if problem.device != "cuda":
        return f"NVLink serves CUDA tensors, these are on {problem.device}"
    if not 2 <= problem.group_size <= MAX_RANKS:
        return f"the kernels serve 2 to {MAX_RANKS} ranks, the group has {problem.group_size}"
    if problem.capability not in (None, CAPABILITY):
        return "the kernels are for compute capability 9.0 (H100, H200), this GPU has {}.{}".format(*problem.capability)
    if not problem.intra_host:
        return "the ranks are on several hosts: NVLink reaches one"
    return None


def nvlink_refusal(problem: FusionProblem) -> str | None:
    """Why a matmul with a collective cannot run over NVLink, None if it can."""
    general = group_refusal(problem)
    if general is not None:
        return general
    if problem.dtype not in DTYPE_CODES:
        return f"dtype {problem.dtype} is not one of {', '.join(DTYPE_CODES)}"
    if problem.reduce_op not in ("sum", "avg"):
        return f"reduction {problem.reduce_op} is not a sum or an average"
    return None


def serves_use(use: GatherUse, wire: str, k: int, n: int) -> bool:
    """True if the kernel for gathered rows on the left runs this use: in the dtype that travels, sizes that TMA addresses."""
    return use.reads_rows and use.dtype == wire and aligned_sizes(k, n)


def block_sizes(use: GatherUse, ranks: int, shard: Sequence[int], k: int) -> tuple[int, int, int]:
    """(pieces, inner, width): of shards [P, Q], the gathered operand of a matmul over k has `pieces` blocks per rank, of `inner` rows
    or columns, `width` across."""
    p, q = shard
    if use.rank_axis == "rows":
        inner = k // (p * ranks) if use.contracts_ranks else q // k
        return p, inner, q // max(inner, 1)
    pieces = k // (q * ranks) if use.contracts_ranks else p // k
    return pieces, q, p // max(pieces, 1)


def serves_blocks(use: GatherUse, wire: str, ranks: int, shard: Sequence[int], k: int, free: int) -> bool:
    """True if the kernel for the other uses runs this one, of a local operand [k, free]: it is in the dtype that travels, TMA can
    address the operands, and rows of the result that a rank contributes to are aligned."""
    if use.dtype != wire or min(*shard, k, free) < 1:
        return False
    pieces, inner, width = block_sizes(use, ranks, shard, k)
    if min(pieces, inner, width) < 1:
        return False
    in_rows, contracts = use.rank_axis == "rows", use.contracts_ranks
    columns = free if use.side == "lhs" else width if contracts else inner
    if not aligned_sizes(width if in_rows else inner, columns):
        return False
    return aligned_sizes(free) or aligned_sizes(inner if contracts else k)


def shard_of(problem: FusionProblem) -> tuple[int, int]:
    """Shape [P, Q] of a rank's shard."""
    itemsize = torch_dtype(problem.dtype).itemsize
    return problem.pieces, problem.comm_bytes // (itemsize * problem.group_size * max(problem.pieces, 1))


@dataclass(frozen=True)
class GatherSide:
    """One of the two gathers of a mesh_matmul: ranks of its group, shape [P, Q] of a rank's shard, bytes of the gathered tensor."""

    group_size: int
    shard: tuple[int, int]
    comm_bytes: int


def sides_of(problem: FusionProblem) -> tuple[GatherSide, GatherSide]:
    """The left operand's gather and the right one's."""
    second = replace(
        problem,
        group_size=problem.second_group_size,
        comm_bytes=problem.second_comm_bytes,
        pieces=problem.second_pieces,
    )
    left, right = (GatherSide(each.group_size, shard_of(each), each.comm_bytes) for each in (problem, second))
    return left, right


def gather_refusal(problem: FusionProblem, plan: Plan) -> str | None:
    """Why the gather's kernels cannot serve a problem."""
    general = nvlink_refusal(problem)
    if general is not None:
        return general
    if all(use.dtype != plan.dtype for use in plan.uses):
        return "no matmul is in the dtype that travels"
    for use, gemm in zip(plan.uses, problem.gemms, strict=True):
        free = gemm.n if use.side == "lhs" else gemm.m
        if serves_use(use, plan.dtype, gemm.k, gemm.n) or serves_blocks(
            use, plan.dtype, problem.group_size, shard_of(problem), gemm.k, free
        ):
            return None
    return "no matmul has operands and a result whose rows are multiples of 16 bytes"


def panels_refusal(problem: FusionProblem, plan: Plan) -> str | None:
    """Why the kernel of blocks cannot serve matmuls of what was exchanged."""
    general = nvlink_refusal(problem)
    if general is not None:
        return general
    if len({columns for _, columns in problem.panels_of}) > 1:
        return "the exchanges that make up the operand have panels of different widths"
    return gather_refusal(problem, plan)


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
    terms = terms_refusal(problem.gemms, plan)
    if terms is not None:
        return terms
    chosen = problem_plan(problem)
    if not chosen.has_flags:
        return f"the sum has {chosen.tiles} tiles, more than the flags of a group count"
    return None


def terms_refusal(gemms: tuple[Gemm, ...], plan: Plan) -> str | None:
    """Why the reducing kernel cannot take these matmuls."""
    if not 1 <= len(gemms) <= MAX_OPERANDS:
        return f"the sum has {len(gemms)} matmuls, the kernel takes {MAX_OPERANDS}"
    if any(min(gemm.m, gemm.n, gemm.k) < 1 for gemm in gemms):
        return "a matrix is empty"
    if 0.0 in plan.coefficients:
        return "a coefficient is zero"
    if not aligned_sizes(*(gemm.k for gemm in gemms), *(gemm.n for gemm in gemms)):
        return "a matrix has rows that are no multiple of 16 bytes"
    return None


def exchange_refusal(problem: FusionProblem, plan: Plan) -> str | None:
    """Why the exchange kernel cannot serve a problem."""
    general = group_refusal(problem)
    if general is not None:
        return general
    inputs = 1 + max(delivery.exchange for delivery in plan.deliveries)
    if inputs > MAX_LEGS or len(plan.deliveries) > MAX_TARGETS:
        return f"{inputs} exchanges go to {len(plan.deliveries)} places, the kernel takes {MAX_LEGS} and {MAX_TARGETS}"
    for delivery in plan.deliveries:
        last = len(delivery.order) + len(delivery.fixed) - 1
        if delivery.order[-1] != last:
            return "what arrives is transposed in its innermost dim: the kernel moves runs of 16 bytes"
    return None
