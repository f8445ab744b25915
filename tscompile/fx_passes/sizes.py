"""Arithmetic on sizes that may be symbolic, without ever adding a guard.

A question that symbolic reasoning cannot answer counts as "no": the proof then ends and the site is kept.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

Size = int | torch.SymInt


def known_eq(a: Size, b: Size) -> bool:
    """True if a == b for every value of the symbols."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return statically_known_true(a == b)


def known_le(a: Size, b: Size) -> bool:
    if isinstance(a, int) and isinstance(b, int):
        return a <= b
    return statically_known_true(a <= b)


def remainder(value: Size, divisor: Size) -> Size:
    result: Size = operator.mod(value, divisor)
    return result


def divides(divisor: Size, value: Size) -> bool:
    """True if value is known to be a multiple of divisor (which is known not to be 0)."""
    if isinstance(divisor, int) and isinstance(value, int):
        return divisor != 0 and value % divisor == 0
    return known_eq(divisor, value) or (
        not known_eq(divisor, 0) and statically_known_true(remainder(value, divisor) == 0)
    )


def quotient(value: Size, divisor: Size) -> Size:
    """value / divisor, for a divisor that `divides` value."""
    if known_eq(divisor, 1):
        return value
    if known_eq(divisor, value):
        return 1
    return plain(value // divisor)


def plain(size: Size) -> Size:
    """An int if the size is a constant in symbolic clothes, as `(8 * s) // (4 * s)` is."""
    if isinstance(size, int):
        return size
    value = size.node.maybe_as_int()
    return size if value is None else int(value)


def product(sizes: Iterable[Size]) -> Size:
    result: Size = 1
    for size in sizes:
        result = size if known_eq(result, 1) else (result if known_eq(size, 1) else result * size)
    return result


def hint(size: Size, default: int = 1) -> int:
    """A concrete value for cost estimates only; never for a decision about correctness."""
    if isinstance(size, int):
        return size
    value = size.node.hint
    return default if value is None else int(value)
