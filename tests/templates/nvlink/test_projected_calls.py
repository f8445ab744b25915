"""Calls of all ranks, what they issue to the driver done in plain Python: copies and flags land where the kernel looks for them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.cases import Case, projected
from tscompile.nvshmem import stream
from tscompile.nvshmem.device import CONTROL_BYTES
from tscompile.templates import find_template
from tscompile.templates.nvlink import exchange
from tscompile.templates.nvlink.channel import FLAGS, SIDE, Site
from tscompile.templates.nvlink.kernels.config import GRID_DIMS, WORD_BYTES

from .fake_gpu import SLOT_BYTES, Gpu, Launched, most_chunks
from .test_legs import offset

_ROW = 5 + 5 * GRID_DIMS  # TSX_ROW of exchange.h


class Rank:
    """A rank whose sends land in `slots` and `flags`, and whose kernel collects from there when `collect` is called."""

    def __init__(
        self,
        patch: pytest.MonkeyPatch,
        case: Case,
        rank: int,
        slots: dict[int, Tensor],
        flags: dict[tuple[int, int], int],
    ) -> None:
        self.gpu = Gpu(patch, rank, len(case.args))
        self.rank, self.case, self.site = rank, case, Site(5)
        self._slots, self._flags = slots, flags
        self._done = 0
        self.gpu.driver.on_launch = self._launched
        self.kernel: dict[str, int] = {}

    def call(self, patch: pytest.MonkeyPatch) -> list[Tensor]:
        patch.setattr(exchange, "kernel", self.gpu.driver.kernel)
        template = find_template("matmul_all_to_all", "nvlink")
        assert template is not None
        channel = self.gpu.link.open(self.site)
        self.slot = channel.slot
        outputs: list[Tensor] = template.run(channel, self.case.plan, *self.case.args[self.rank])
        return outputs

    def _launched(self, launched: Launched) -> None:
        """The buffer that is sent lives until now: do what the copy stream would, and take the own block."""
        if launched.name != "exchange":
            return
        kinds = (stream.COPY, stream.COPY_ROWS, stream.WRITE)
        sends = [s for s in self.gpu.driver.issued[self._done :] if s["stream"] == SIDE and s["kind"] in kinds]
        self._done = len(self.gpu.driver.issued)
        for step in sends:
            owner = next(r for r, base in enumerate(self.gpu.memory.bases) if 0 <= step["dst"] - base < 1 << 32)
            place = step["dst"] - self.gpu.memory.bases[owner]
            if step["kind"] == stream.WRITE:
                self._flags[owner, place // 4 - self.slot * FLAGS] = step["value"]
            else:
                place -= CONTROL_BYTES + self.slot * SLOT_BYTES
                assert place >= 0 and place + (step["rows"] - 1) * step["dst_pitch"] + step["bytes"] <= SLOT_BYTES
                for row in range(step["rows"]):
                    target = self._slots[owner].data_ptr() + place + row * step["dst_pitch"]
                    ctypes.memmove(target, step["src"] + row * step["src_pitch"], step["bytes"])
        self.kernel = launched.values
        assert self.kernel["copied"] == 1 and self.kernel["offset"] == 0

        def own(leg: int, row: list[int], word: int) -> int:
            here = offset(row, word)
            assert here is not None
            return self.kernel[f"X{leg}"] + (self.rank * row[4] + here) * WORD_BYTES

        self._deliver(self.rank, own)

    def collect(self) -> None:
        """What the kernel does with what has arrived."""
        size, values = len(self.case.args), self.kernel
        for source in set(range(size)) - {self.rank}:
            distance = (source - self.rank + size - 1) % size

            def arrived(leg: int, row: list[int], word: int, distance: int = distance) -> int:
                flag = values["first_flag"] + distance * values["legs"] + leg
                assert self._flags[self.rank, flag] == values["epoch"]
                words = (distance * values["batches"] + row[0]) * values["batch_words"] + word
                return self._slots[self.rank].data_ptr() + words * WORD_BYTES

            self._deliver(source, arrived)

    def _deliver(self, source: int, address: Callable[[int, list[int], int], int]) -> None:
        values = self.kernel

        def row(number: int) -> list[int]:
            return list((ctypes.c_int32 * _ROW).from_address(values["table"] + 4 * _ROW * number))

        for leg in range(values["legs"]):
            _, words, first, count, *_ = grid = row(leg)
            for target in range(first, first + count):
                place = row(values["legs"] + target)
                for word in range(words):
                    there = offset(place, word)
                    if there is not None:
                        out = values[f"Y{target}"] + (source * place[4] + there) * WORD_BYTES
                        ctypes.memmove(out, address(leg, grid, word), WORD_BYTES)


@pytest.mark.parametrize("spelling", [0, 1, 2])
@pytest.mark.parametrize("parts", [(3,), (1, 1, 1), (2, 1)])
def test_results_of_all_ranks(monkeypatch: pytest.MonkeyPatch, parts: tuple[int, ...], spelling: int) -> None:
    most_chunks(monkeypatch)
    case = projected(3, 1, "bfloat16", parts=parts, dim=8, tokens=5, bias=True, spelling=spelling)
    slots = {rank: torch.zeros(SLOT_BYTES, dtype=torch.uint8) for rank in range(3)}
    flags: dict[tuple[int, int], int] = {}
    ranks = [Rank(monkeypatch, case, rank, slots, flags) for rank in range(3)]
    for epoch in (1, 2, 3):  # both slots, and the first one again
        for slot in slots.values():
            slot.fill_(0xFF)
        flags.clear()
        outputs = [rank.call(monkeypatch) for rank in ranks]
        assert {rank.kernel["epoch"] for rank in ranks} == {epoch}
        for rank in ranks:
            rank.collect()
            case.check(rank.rank, outputs[rank.rank])
