"""Kernels and templates over NVLink (executor "nvlink"): importing the package registers the templates and needs TileLang."""

from . import all_gather_gemm, gemm_reduce

__all__ = ["all_gather_gemm", "gemm_reduce"]
