"""All templates of this package; importing this module registers them."""

from . import all_gather_gemm, gemm_reduce

__all__ = ["all_gather_gemm", "gemm_reduce"]
