"""What the kernels over NVLink cannot serve."""

from __future__ import annotations

from ...problem import FusionProblem
from .gemm import DTYPE_CODES

MAX_RANKS = 8


def nvlink_refusal(problem: FusionProblem) -> str | None:
    """Why a problem cannot run over NVLink, None if it can. Whether the GPUs reach each other is voted on at run time."""
    if problem.device != "cuda":
        return f"NVLink serves CUDA tensors, these are on {problem.device}"
    if not 2 <= problem.group_size <= MAX_RANKS:
        return f"the kernels serve 2 to {MAX_RANKS} ranks, the group has {problem.group_size}"
    if not problem.intra_host:
        return "the ranks are on several hosts: NVLink reaches one"
    if problem.dtype not in DTYPE_CODES:
        return f"dtype {problem.dtype} is not one of {', '.join(DTYPE_CODES)}"
    if problem.reduce_op not in ("sum", "avg"):
        return f"reduction {problem.reduce_op} is not a sum or an average"
    return None
