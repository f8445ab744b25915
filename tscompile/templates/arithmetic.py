"""Local arithmetic that the CPU templates share: matmul terms into given memory, and sums of partial results.

Not for communication: nothing here signals or waits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_BLOCK_BYTES = 256 << 10  # partial sums are added block by block, so that a block stays in the core's cache
MIN_PIECE = 64  # rows or columns below which one matmul over a gathered copy beats many small ones
_LOW_PRECISION = (torch.bfloat16, torch.float16)


def is_low_precision(dtype: torch.dtype) -> bool:
    """True for 16-bit types, whose sums are taken in float32 and rounded once."""
    return dtype in _LOW_PRECISION


def multiply(out: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None) -> None:
    """out [m, n] = a [m, k] @ b [k, n] + bias [n]; all of one dtype. `out` may be strided with unit last stride."""
    if bias is None:
        torch.mm(a, b, out=out)
    else:
        torch.addmm(bias.to(out.dtype), a, b, out=out)


class RunningSum:
    """out [m, n] = bias + the sum of the products that are added, one after the other."""

    def __init__(self, out: Tensor, bias: Tensor | None) -> None:
        self._out, self._bias, self._first = out, bias, True

    def add(self, a: Tensor, b: Tensor) -> None:
        if self._first:
            multiply(self._out, a, b, self._bias)
            self._first = False
        else:
            self._out.addmm_(a, b)


def sum_terms(
    out: Tensor,
    lhs: Sequence[Tensor],
    rhs: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    addends: Sequence[Tensor],
    coefficients: Sequence[float],
) -> None:
    """out [m, n] = sum of c_i * (lhs_i @ rhs_i + bias_i) + sum of c_j * addend_j, in the order of the arguments.

    A term of another dtype than `out` is computed in its own dtype and cast afterwards, as the original program does.
    """
    first = True
    for a, b, bias, c in zip(lhs, rhs, biases, coefficients, strict=False):
        if a.dtype != out.dtype:
            term = a @ b if bias is None else torch.addmm(bias.to(a.dtype), a, b)
            _add(out, term, c, first)
        elif not first:
            out.addmm_(a, b, alpha=c)
            if bias is not None:
                out.add_(bias, alpha=c)
        elif c == 1:
            multiply(out, a, b, bias)
        elif bias is None:
            torch.addmm(out, a, b, beta=0, alpha=c, out=out)
        else:
            torch.addmm(bias.to(out.dtype), a, b, beta=c, alpha=c, out=out)
        first = False
    for addend, c in zip(addends, coefficients[len(lhs) :], strict=True):
        _add(out, addend, c, first)
        first = False


def _add(out: Tensor, term: Tensor, c: float, first: bool) -> None:
    if not first:
        out.add_(term, alpha=c)
    else:
        out.copy_(term)
        if c != 1:
            out.mul_(c)


def sum_partials(out: Tensor, partials: Sequence[Tensor], divisor: int = 1) -> None:
    """out [m, n] = (partials[0] + partials[1] + ...) / divisor, in this order; 16-bit types round once.

    `out` may be partials[0] itself, or another contiguous tensor; all have the shape and dtype of `out`.
    """
    low = is_low_precision(out.dtype) and (len(partials) > 2 or divisor > 1)
    rows = out.shape[0]
    block = max(1, _BLOCK_BYTES // max(1, out.shape[1] * out.element_size()))
    for start in range(0, rows, block):
        stop = min(rows, start + block)
        target = out[start:stop]
        if len(partials) == 1:
            if target.data_ptr() != partials[0][start:stop].data_ptr():
                target.copy_(partials[0][start:stop])
            continue
        if low:
            wide = partials[0][start:stop].float()
            for partial in partials[1:]:
                wide.add_(partial[start:stop])
            if divisor > 1:
                wide.div_(divisor)
            target.copy_(wide)
            continue
        torch.add(partials[0][start:stop], partials[1][start:stop], out=target)
        for partial in partials[2:]:
            target.add_(partial[start:stop])
        if divisor > 1:
            target.div_(divisor)
