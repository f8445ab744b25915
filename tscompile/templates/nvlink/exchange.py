"""A launch of the exchange kernel, prepared once for its layout."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...nvshmem.stream import Step, Values
from .channel import DeviceLink
from .jit import kernel
from .kernels.config import MAX_LEGS, MAX_TARGETS, SMS, WORD_BYTES
from .lasting import lasting
from .legs import Batches, Layout, Leg, rows_of


class ExchangeLaunch:
    """All exchanges of a launch.

    Args:
        legs: in words. batches: how they are cut.
        offset: bytes behind the start of a slot, first_flag: of a slot, where this launch's part begins.
        copied: copy engines send the legs, each with a flag behind it: `[ranks - 1, legs]` from `first_flag` on, the next rank's first.
        ctas: of the kernel.
    """

    def __init__(
        self,
        link: DeviceLink,
        legs: Sequence[Leg],
        batches: Batches,
        *,
        offset: int = 0,
        first_flag: int = 0,
        copied: bool = False,
        ctas: int = SMS,
    ) -> None:
        rows = rows_of(legs, batches)
        self._table = lasting(lambda: torch.tensor(rows, dtype=torch.int32, device=link.device), link.device)
        self._fixed = {
            "table": self._table.data_ptr(),
            "legs": len(legs),
            "batches": batches.count,
            "batch_words": batches.words,
            "first_flag": first_flag,
            "offset": offset,
            "copied": int(copied),
        }
        self.kernel = kernel("exchange", ctas)
        sources = [leg.source for leg in legs]
        targets = [target for leg in legs for target in leg.targets]
        self._sources = [(self.kernel.place(f"X{i}"), layout) for i, layout in enumerate(sources)]
        self._targets = [(self.kernel.place(f"Y{i}"), layout) for i, layout in enumerate(targets)]
        self._epoch = self.kernel.place("epoch")

    def values(self, known: dict[str, int]) -> Values:
        """Values of launches in one slot, but for those that change from call to call."""
        unused = {f"X{i}": 0 for i in range(len(self._sources), MAX_LEGS)}
        unused |= {f"Y{i}": 0 for i in range(len(self._targets), MAX_TARGETS)}
        patched = {f"X{i}" for i in range(MAX_LEGS)} | {f"Y{i}" for i in range(MAX_TARGETS)} | {"epoch"}
        return self.kernel.values({**known, **self._fixed, **unused}, patched)

    def patch(self, values: Values, inputs: Sequence[Tensor], outputs: Sequence[Tensor], epoch: int) -> None:
        """Set what changes from call to call; `inputs` and `outputs` as the legs number them."""
        values[self._epoch] = epoch
        for place, layout in self._sources:
            values[place] = _address(inputs, layout)
        for place, layout in self._targets:
            values[place] = _address(outputs, layout)

    def step(self, values: Values, stream: int) -> Step:
        return self.kernel.step(values, stream)


def _address(tensors: Sequence[Tensor], layout: Layout) -> int:
    return tensors[layout.tensor].data_ptr() + layout.start * WORD_BYTES


def aligned_inputs(inputs: Sequence[Tensor], copied: bool) -> list[Tensor]:
    """Inputs that the kernel can read by the strides in its table: those of contiguous tensors if `copied`, else their own.

    A tensor that does not begin with a word is copied as it lies.
    """
    if copied:
        inputs = [x.contiguous() for x in inputs]
    return [_moved(x) if x.data_ptr() % WORD_BYTES else x for x in inputs]


def _moved(x: Tensor) -> Tensor:
    """A copy with the same strides, whichever they are."""
    items = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    memory = x.as_strided((items,), (1,)).clone()
    return memory.as_strided(x.shape, x.stride())
