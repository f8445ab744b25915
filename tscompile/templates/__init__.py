"""How each kind of fused op runs: one chunked protocol per kind and target, all registered when this package is imported."""

from . import (
    all_gather_gemm,
    all_to_all,
    all_to_all_gemm,
    attention,
    gathered_attention,
    gemm_all_gather,
    gemm_all_reduce,
    gemm_all_to_all,
    gemm_reduce_scatter,
    mesh_gemm,
    nvlink,
    scattered_attention,
)
from .template import Template, find_template, register_template, registered

__all__ = [
    "Template",
    "all_gather_gemm",
    "all_to_all",
    "all_to_all_gemm",
    "attention",
    "find_template",
    "gathered_attention",
    "gemm_all_gather",
    "gemm_all_reduce",
    "gemm_all_to_all",
    "gemm_reduce_scatter",
    "mesh_gemm",
    "nvlink",
    "register_template",
    "registered",
    "scattered_attention",
]
