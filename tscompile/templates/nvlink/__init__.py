"""Fused ops over NVLink (executor "nvlink"). TileLang is imported where a kernel is compiled, not here."""

from . import (
    all_gather_gemm,
    all_to_all,
    all_to_all_gemm,
    gathered_attention,
    gemm_all_to_all,
    gemm_reduce,
    mesh_gemm,
    scattered_attention,
)

__all__ = [
    "all_gather_gemm",
    "all_to_all",
    "all_to_all_gemm",
    "gathered_attention",
    "gemm_all_to_all",
    "gemm_reduce",
    "mesh_gemm",
    "scattered_attention",
]
