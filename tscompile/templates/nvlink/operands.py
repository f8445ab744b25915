"""How matmul operands lie in memory, and whether TMA can read them."""

from __future__ import annotations

from torch import Tensor

ALIGNMENT = 8  # elements of 16 bits: TMA wants rows that start at multiples of 16 bytes


def is_transposed(rhs: Tensor) -> bool:
    """True if the right operand [K, N] of a matmul lies as [N, K], as the weight of a Linear does."""
    return rhs.stride(0) == 1 and rhs.stride(1) == rhs.shape[0]


def lies(tensor: Tensor, transposed: bool) -> bool:
    """True if the tensor, or its transpose, is contiguous."""
    return is_transposed(tensor) if transposed else tensor.is_contiguous()


def pointer_of(tensor: Tensor, transposed: bool, alive: list[Tensor], known: bool = False) -> int:
    """Address of the tensor, or of its transpose, as a kernel takes it: contiguous and aligned. A copy that this needs goes
    to `alive`: it must live until the kernel is enqueued. `known`: it is known that the tensor `lies` so."""
    address = tensor.data_ptr()
    if (known or lies(tensor, transposed)) and address % 16 == 0:
        return address
    copy = aligned_pointer((tensor.t() if transposed else tensor).contiguous())
    alive.append(copy)
    return copy.data_ptr()


def aligned_sizes(*sizes: int) -> bool:
    """True if rows of these lengths (in elements) start at multiples of 16 bytes."""
    return all(size > 0 and size % ALIGNMENT == 0 for size in sizes)


def aligned_pointer(tensor: Tensor) -> Tensor:
    """The tensor, or a copy if it does not start at a multiple of 16 bytes."""
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()
