"""All patterns: importing this registers them and their ops."""

from . import (
    all_gather_matmul,
    all_to_all_attention,
    all_to_all_matmul,
    all_to_all_permute,
    collective_then_matmul,
    gathered_attention,
    matmul_all_gather,
    matmul_all_reduce,
    matmul_all_to_all,
    matmul_reduce_scatter,
    mesh_matmul,
    scattered_attention,
)

__all__ = [
    "all_gather_matmul",
    "all_to_all_attention",
    "all_to_all_matmul",
    "all_to_all_permute",
    "collective_then_matmul",
    "gathered_attention",
    "matmul_all_gather",
    "matmul_all_reduce",
    "matmul_all_to_all",
    "matmul_reduce_scatter",
    "mesh_matmul",
    "scattered_attention",
]
