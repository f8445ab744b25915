"""How matmul operands lie in memory, and whether TMA can read them."""

from __future__ import annotations

from torch import Tensor

ALIGNMENT = 8  # elements of 16 bits: TMA wants rows that start at multiples of 16 bytes


def is_transposed(rhs: Tensor) -> bool:
    """True if the right operand [K, N] of a matmul lies as [N, K], as the weight of a Linear does."""
    return rhs.stride(0) == 1 and rhs.stride(1) == rhs.shape[0]


def right_operand(rhs: Tensor, transposed: bool) -> Tensor:
    """The right operand [K, N] as a kernel takes it: [N, K] if `transposed`, else [K, N], contiguous and aligned, without a copy
    where it lies so."""
    return aligned_pointer((rhs.t() if transposed else rhs).contiguous())


def aligned_sizes(*sizes: int) -> bool:
    """True if rows of these lengths (in elements) start at multiples of 16 bytes."""
    return all(size > 0 and size % ALIGNMENT == 0 for size in sizes)


def aligned_pointer(tensor: Tensor) -> Tensor:
    """The tensor, or a copy if it does not start at a multiple of 16 bytes."""
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()
