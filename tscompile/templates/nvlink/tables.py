"""Tables of a gather's kernels on the GPU, for eager and for captured calls."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .channel import DeviceLink
from .lasting import lasting_tables
from .tiles import Row, joined


def tables_of(rows: Sequence[Row], link: DeviceLink, joins: bool, walk: int = 0) -> tuple[Tensor, Tensor]:
    """A table for eager calls and one for captured calls.

    Args:
        joins: in eager calls the kernel waits for the rank's own copies, so that the main stream need not (Recipe says why).
        walk: as `joined` takes it.
    """
    if not joins:
        (table,) = lasting_tables([rows], link.device)
        return table, table
    eager, captured = lasting_tables([joined(rows, link.rank, walk), list(rows)], link.device)
    return eager, captured
