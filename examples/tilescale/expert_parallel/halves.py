"""Floats of 16 bits in kernels for both targets. The C target has none: there they travel as int16 and are converted by integers.

Rounding is to nearest, ties to even, as torch does it.
"""

from __future__ import annotations

from typing import Any

import tilelang.language as T

from tscompile.language.dialects import Dialect

F16_INFINITY, F16_MOST, F16_LEAST = 0x7C00, 0x477FF000, 0x38800000
"""float16: infinity. As float32: what rounds to it, and the least normal number."""


def carrier(d: Dialect, dtype: str) -> str:
    """What kernels of a target declare tensors of `dtype` as."""
    return dtype if d.name == "cuda" or dtype == "float32" else "int16"


def widen(d: Dialect, dtype: str, value: Any) -> Any:
    """An element, as `carrier` has it, as float32."""
    if d.name == "cuda" or dtype == "float32":
        return T.cast(value, "float32")
    bits = T.cast(value, "int32")
    if dtype == "bfloat16":
        return T.reinterpret(bits << 16, "float32")
    size = T.bitwise_and(bits, 0x7FFF)
    # The exponent counts from 112 less than float32's, subnormal numbers included.
    finite = T.reinterpret(T.reinterpret(size << 13, "float32") * T.float32(2.0**112), "int32")
    special = T.bitwise_or(size << 13, 0x7F800000)
    sign = T.bitwise_and(bits, 0x8000) << 16
    return T.reinterpret(T.bitwise_or(T.if_then_else(size < F16_INFINITY, finite, special), sign), "float32")


def narrow(d: Dialect, dtype: str, value: Any) -> Any:
    """A float32 as an element of `dtype`, as `carrier` has it."""
    if d.name == "cuda" or dtype == "float32":
        return T.cast(value, dtype)
    bits = T.bitwise_and(T.cast(T.reinterpret(value, "int32"), "int64"), 0xFFFFFFFF)
    size = T.bitwise_and(bits, 0x7FFFFFFF)
    sign = T.bitwise_and(bits >> 16, 0x8000)
    if dtype == "bfloat16":
        rounded = (size + 0x7FFF + T.bitwise_and(size >> 16, 1)) >> 16
        nan = 0x7FC0
    else:
        normal = (size - 0x38000000 + 0xFFF + T.bitwise_and(size >> 13, 1)) >> 13
        # One half has the exponent at which float32 counts what subnormal numbers of float16 count: the addition rounds.
        half = T.reinterpret(T.cast(size, "int32"), "float32") + T.float32(0.5)
        subnormal = T.cast(T.reinterpret(half, "int32"), "int64") - 0x3F000000
        rounded = T.if_then_else(
            size < F16_LEAST, subnormal, T.if_then_else(size < F16_MOST, normal, T.int64(F16_INFINITY))
        )
        nan = 0x7E00
    rounded = T.if_then_else(size > 0x7F800000, T.int64(nan), rounded)
    return T.cast(T.bitwise_or(rounded, sign), "int16")
