"""How matmul operands lie in memory, and whether TMA can read them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

ALIGNMENT = 8  # elements of 16 bits: TMA wants rows that start at multiples of 16 bytes


@dataclass(frozen=True)
class Right:
    """The right operand [K, N] of a matmul as a kernel takes it: contiguous, `matrix` is [N, K] if `transposed`, else [K, N]."""

    matrix: Tensor
    transposed: bool


def right_operand(rhs: Tensor) -> Right:
    """The operand without a copy if it or its transpose is contiguous, else with one."""
    if rhs.stride(0) == 1 and rhs.stride(1) == rhs.shape[0]:
        return Right(rhs.t(), True)
    return Right(rhs.contiguous(), False)


def aligned_sizes(*sizes: int) -> bool:
    """True if rows of these lengths (in elements) start at multiples of 16 bytes."""
    return all(size > 0 and size % ALIGNMENT == 0 for size in sizes)


def aligned_pointer(tensor: Tensor) -> Tensor:
    """The tensor, or a copy if it does not start at a multiple of 16 bytes."""
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()
