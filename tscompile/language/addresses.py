"""Addresses of tensors and of peers' memory inside kernels."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

import tilelang.language as T
from tvm import DataType, tirx

from . import context
from .backends import refuse_target

Expr = Any
"""A TileLang expression, or a Python number."""

Operand = Any
"""Memory: an element of a tensor (`x[i, j]`, whose address is meant), a tensor (its first element), or an integer expression that
is an address already (`peer_address`, `pointer`)."""

Region = Literal["data", "flags", "control"]

_REGIONS = {"data": context.DATA, "flags": context.FLAGS, "control": context.CONTROL}


def address(operand: Operand) -> Expr:
    """The address of `operand` as uint64.

    Tensors go through `T.access_ptr(..., "rw")`: it keeps the tensor visible to TileLang's passes (a wait stays beside the loads it
    guards) and takes `const __restrict__` off the parameter, without which loads may become non-coherent.

    Raises:
        TypeError: `operand` is neither memory nor an integer expression.
    """
    if isinstance(operand, tirx.Buffer | tirx.BufferLoad | tirx.BufferRegion):
        return T.reinterpret(T.access_ptr(operand, "rw"), "uint64")
    if isinstance(operand, int):
        return tirx.IntImm("uint64", operand)
    dtype = str(getattr(operand, "dtype", type(operand).__name__))
    if not isinstance(operand, tirx.PrimExpr) or dtype not in ("int64", "uint64"):
        raise TypeError(f"an address is x[i], a tensor, or an int64 or uint64 expression, not {dtype}")
    return operand if dtype == "uint64" else T.cast(operand, "uint64")


def pointer(value: Expr) -> Expr:
    """Mark an int64 or uint64 value as an address: needed where it is itself an element of a tensor (`pointer(table[r])`)."""
    return T.cast(value, "uint64")


def cast(value: Expr, dtype: str) -> Expr:
    """`value` with exactly this dtype: the C target declares an extern by the types of its arguments.

    A negative number counts modulo the range of an unsigned dtype, as in C: `signal(flag, -1, "add")`.
    """
    if isinstance(value, int | tirx.IntImm) and dtype in ("uint8", "uint16", "uint32", "uint64") and int(value) < 0:
        value = int(value) % (1 << int(dtype[4:]))  # TVM refuses such a constant
    if isinstance(value, int | float):
        return tirx.const(value, dtype)
    if not isinstance(value, tirx.PrimExpr):
        value = value.asobject()  # `a == b` is undecided between an expression and a Python bool until it is used
    return value if str(value.dtype) == dtype else T.cast(value, dtype)


def call(name: str, returns: str, *arguments: Expr) -> Expr:
    """A call of the entry point `tsl_x_<name>`; the same IR serves CUDA and the C target.

    Raises:
        BackendError: TileLang says that it writes the kernel for a target that has no such functions.
    """
    refuse_target()
    return T.call_extern(returns, f"tsl_x_{name}", *arguments)


def succeeded(outcome: Expr) -> Expr:
    """The int32 outcome of an entry point as bool."""
    return tirx.NE(outcome, tirx.const(0, "int32"))


def rank(ctx: Any) -> Expr:
    """This rank's number in the group, int32. `ctx`: the context, `T.Tensor((WORDS,), "int64")`."""
    return T.cast(ctx[context.RANK], "int32")


def num_ranks(ctx: Any) -> Expr:
    """Ranks of the group, int32."""
    return T.cast(ctx[context.SIZE], "int32")


def epoch(ctx: Any, passed: Expr) -> Expr:
    """The epoch of this launch, uint32: what the host passed plus the group's epoch cell (which captured graphs bump).

    A relaxed load at gpu scope: the cell is written by an earlier kernel of the same stream.
    """
    return call("ld_relaxed_gpu_u32", "uint32", pointer(ctx[context.EPOCH_CELL])) + cast(passed, "uint32")


def peer_address(ctx: Any, rank: Expr, offset_bytes: Expr = 0, region: Region = "data") -> Expr:
    """An address in a peer's memory as mapped here, uint64.

    Args:
        ctx: the context.
        rank: group rank, 0 <= rank < num_ranks(ctx), not checked; the own rank is allowed.
        offset_bytes: from the base of the region. An int32 expression overflows past 2 GiB: make it int64.
        region: "data" (the slot), "flags" (the slot's flags) or "control" (the rank's control block).

    Raises:
        ValueError: no such region.
    """
    if region not in _REGIONS:
        raise ValueError(f"region {region!r}: one of {', '.join(_REGIONS)}")
    return T.cast(ctx[_REGIONS[region] + rank] + cast(offset_bytes, "int64"), "uint64")


def peer(ctx: Any, rank: Expr, offset_bytes: Expr, shape: Sequence[Expr], dtype: str, region: Region = "data") -> Any:
    """A tensor over a peer's memory, row-major `shape` of `dtype`, `offset_bytes` from the base of the region.

    Loads from it are ordinary (never non-coherent) and no TMA: use it for stores, flags and small reads, and `bulk_get` or a kernel
    parameter that aliases the peer's memory for tiles. No ordering: see `signal` and `wait`.

    Args and errors: as `peer_address`. `offset_bytes` must be a multiple of the size of an element.
    """
    return T.make_tensor(T.cast(peer_address(ctx, rank, offset_bytes, region), "int64"), tuple(shape), dtype)


def remote(ctx: Any, operand: Operand, rank: Expr) -> Expr:
    """The address at which another rank keeps the same element of a symmetric tensor, uint64.

        tl.put_block(tl.remote(ctx, inbox[row, 0], to), x[row, 0], row_bytes, thread, 128)
        tl.signal(tl.remote(ctx, arrived[me], to), epoch, dtype="int32")

    Args:
        ctx: the context.
        operand: memory of this rank in the group's region: of `SymmetricGroup.tensor`, or of any slot. Not checked.
        rank: as in `peer_address`.
    """
    base = ctx[context.DATA + rank] - ctx[context.DATA + T.cast(ctx[context.RANK], "int32")]
    return T.cast(base + T.cast(address(operand), "int64"), "uint64")


def bits_of(dtype: str) -> int:
    """32 or 64: how wide the words of `dtype` are.

    Raises:
        ValueError: `dtype` has another width.
    """
    if dtype in ("int32", "uint32", "float32"):
        return 32
    if dtype in ("int64", "uint64", "float64"):
        return 64
    raise ValueError(f"{dtype}: flags, atomics and shuffles are 32 or 64 bits wide")


def width_of(dtype: str) -> int:
    """8, 16, 32 or 64: how wide the elements of `dtype` are.

    Raises:
        ValueError: it is no number, or has another width.
    """
    if re.match(r"u?int\d|b?float\d", dtype):
        element = DataType(dtype)
        if element.lanes == 1 and element.bits in (8, 16, 32, 64):
            return int(element.bits)
    raise ValueError(f"{dtype}: loads and stores are of integers and floats of 8, 16, 32 or 64 bits")


def dtype_of(operand: Operand, dtype: str | None) -> str:
    """The dtype of a memory operand; an address has none of its own.

    Raises:
        ValueError: `operand` is an address and no `dtype` was given.
    """
    if dtype is not None:
        return dtype
    if isinstance(operand, tirx.Buffer | tirx.BufferLoad):
        return str(operand.dtype)
    raise ValueError("an address has no dtype: pass dtype=")


def to_bits(value: Expr, dtype: str) -> Expr:
    """`value` as `dtype`, then its bits as an unsigned integer."""
    value, word = cast(value, dtype), f"uint{width_of(dtype)}"
    if dtype == word:
        return value
    if "float" in dtype:  # not T.reinterpret: the C target takes the address of what may be a literal
        return call(f"bits_f{width_of(dtype)}", word, value)
    return cast(value, word)


def from_bits(value: Expr, dtype: str) -> Expr:
    """The inverse of `to_bits`."""
    if str(value.dtype) == dtype:
        return value
    return T.reinterpret(value, dtype) if "float" in dtype else T.cast(value, dtype)
