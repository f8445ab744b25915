"""Calls of the exchange kernel by all ranks of a group, on the host (host_world.h)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tests.exchange_cases import ExchangeCase, random_case
from tscompile.templates.nvlink.exchange import ExchangeLaunch
from tscompile.templates.nvlink.kernels.config import SMS, WORD_BYTES
from tscompile.templates.nvlink.legs import Batches, Leg, batches_of, worded

from . import host_code

ITEMS = 8  # int16 of a word
SITE, CELL, FIRST_FLAG, OFFSET = 7, 2, 3, 4 * WORD_BYTES
ACKS = 8  # flags behind those of the data
MARGIN, UNTOUCHED = 64, 0x7777  # items around each output


class Exchanges(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("seed", "version", "ranks", "calls", "ctas", "resident")]


class Copy(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("source", "target", "bytes", "flag", "epoch")]


class Call(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("parameters", "copies", "count")]


@dataclass
class Run:
    """Calls of one exchange by all ranks, alternating between `slot_count` slots: two, as eager ones do.

    late: step of the scheduler at which each rank begins, negative if it stays away.
    resident: CTAs of a rank that run at a time.
    copied: copy engines send.
    """

    case: ExchangeCase
    ranks: int
    seed: int = 0
    ctas: int = 2
    resident: int = 8
    calls: int = 3
    late: Sequence[int] = ()
    copied: bool = False
    slot_count: int = 2
    version: int = 0
    group: host_code.Group = field(init=False)
    inputs: list[list[list[Tensor]]] = field(init=False)  # of calls, of ranks
    outputs: list[list[list[Tensor]]] = field(init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        self.group = host_code.Group.of(self.ranks, CELL)
        made = [
            [
                self.case.inputs(lambda shape: torch.randint(-(1 << 15), 1 << 15, shape, dtype=torch.int16))
                for _ in self._all
            ]
            for _ in range(self.calls)
        ]
        self.inputs, self.outputs, self._kept = made, [], []
        found = worded(self.case.deliveries, self.case.joins, made[0][0])
        assert found is not None
        self.legs: list[Leg] = found
        self.batches: Batches = batches_of([leg.words for leg in found], self.ranks)
        flags = FIRST_FLAG + self.batches.flags(self.ranks) + ACKS
        nbytes = OFFSET + self.batches.scratch_bytes(self.ranks)
        # Nothing is reset between calls: flags have epochs of earlier ones, counters zeros.
        self.flags = [
            [torch.full((flags,), CELL, dtype=torch.int32) for _ in self._all] for _ in range(self.slot_count)
        ]
        self.slots = [
            [torch.full((nbytes // 2,), 0x5A5A, dtype=torch.int16) for _ in self._all] for _ in range(self.slot_count)
        ]
        self.counters = [torch.zeros(16, dtype=torch.int32) for _ in self._all]

    @property
    def _all(self) -> range:
        return range(self.ranks)

    def _values(self, contexts: list[list[Tensor]], launch: ExchangeLaunch, rank: int, number: int) -> Any:
        """Parameters of a launch."""
        known = {
            "context": contexts[number % self.slot_count][rank].data_ptr(),
            "counters": self.counters[rank].data_ptr(),
        }
        values = launch.values({**known, "site": SITE, "ack": self.flags[0][0].numel() - ACKS})
        storage = [
            torch.full((x.numel() + 2 * MARGIN,), UNTOUCHED, dtype=torch.int16) for x in self.truth(number, rank)
        ]
        self._kept.append((storage, values))
        outputs = [
            x[MARGIN:-MARGIN].view(want.shape) for x, want in zip(storage, self.truth(number, rank), strict=True)
        ]
        self.outputs[number].append(outputs)
        launch.patch(values, self.inputs[number][rank], outputs, number + 1)
        return values

    def _copies(self, source: int, number: int) -> Any:
        """What this rank's copy engine sends, the next rank's first."""
        copies = []
        for owner in ((source + 1 + i) % self.ranks for i in range(self.ranks - 1)):
            distance = (source - owner - 1) % self.ranks
            for index, leg in enumerate(self.legs):
                x, layout = self.inputs[number][source][leg.source.tensor], leg.source
                start = x.storage_offset() + (layout.start + owner * layout.rank_stride) * ITEMS
                strides = (*(stride * ITEMS for stride in layout.strides), 1)
                block = torch.as_strided(x, (*leg.sizes, ITEMS), strides, start).contiguous()
                self._kept.append(block)
                place = (
                    OFFSET
                    + (distance * self.batches.count + self.batches.firsts[index]) * self.batches.words * WORD_BYTES
                )
                flag = FIRST_FLAG + distance * len(self.legs) + index
                to, word = (
                    self.slots[number % self.slot_count][owner].data_ptr() + place,
                    self.flags[number % self.slot_count][owner][flag:].data_ptr(),
                )
                copies.append(Copy(block.data_ptr(), to, block.nbytes, word, CELL + number + 1))
        return (Copy * len(copies))(*copies)

    def truth(self, number: int, rank: int) -> list[Tensor]:
        return self.case.truth(self.inputs[number], rank)

    def run(self, library: ctypes.CDLL) -> Run:
        """Raises: host_code.Hung."""
        contexts = [self.group.contexts(*memory) for memory in zip(self.slots, self.flags, strict=True)]
        link: Any = SimpleNamespace(device=torch.device("cpu"), size=self.ranks)
        options = {"offset": OFFSET, "first_flag": FIRST_FLAG, "copied": self.copied, "ctas": SMS}
        launches = [ExchangeLaunch(link, self._legs_of(rank), self.batches, **options) for rank in self._all]
        self.outputs = [[] for _ in range(self.calls)]
        calls = (Call * (self.ranks * self.calls))()
        for rank in self._all:
            for number in range(self.calls):
                values = self._values(contexts, launches[rank], rank, number)
                copies = self._copies(rank, number) if self.copied else (Copy * 0)()
                self._kept.append(copies)
                calls[rank * self.calls + number] = Call(
                    ctypes.addressof(values), ctypes.addressof(copies), len(copies)
                )
        given = Exchanges(self.seed, self.version, self.ranks, self.calls, self.ctas, self.resident)
        late = (ctypes.c_int64 * self.ranks)(*(self.late or [0] * self.ranks))
        host_code.call(library.run_exchanges, self.group, ctypes.byref(given), late, calls)
        return self

    def _legs_of(self, rank: int) -> list[Leg]:
        found = worded(self.case.deliveries, self.case.joins, self.inputs[0][rank])
        assert found is not None
        return found

    def check(self) -> None:
        """All that was asked for, nothing else, and all is ready for the next call."""
        for number in range(self.calls):
            for rank in self._all:
                for got, want in zip(self.outputs[number][rank], self.truth(number, rank), strict=True):
                    assert torch.equal(got, want), f"{self.case.name}: call {number}, rank {rank}"
        for storage in (x for kept in self._kept if isinstance(kept, tuple) for x in kept[0]):
            assert (storage[:MARGIN] == UNTOUCHED).all() and (storage[-MARGIN:] == UNTOUCHED).all()
        assert all(not counters.any() for counters in self.counters)
        last = [0] * self.slot_count  # epoch of each slot
        for number in range(self.calls):
            last[number % self.slot_count] = number + 1
        sent = (self.ranks - 1) * (len(self.legs) if self.copied else self.batches.count)
        for slot in range(self.slot_count):
            for rank in self._all:
                expected = torch.full_like(self.flags[slot][rank], CELL)
                expected[FIRST_FLAG : FIRST_FLAG + sent] += last[slot]
                expected[-ACKS : -ACKS + self.ranks] += last[slot]
                expected[-ACKS + rank] = CELL
                assert torch.equal(self.flags[slot][rank], expected)


def words(case: ExchangeCase) -> int:
    found = worded(case.deliveries, case.joins, case.inputs(lambda shape: torch.empty(shape, dtype=torch.int16)))
    assert found is not None
    return sum(leg.words for leg in found)


def random_cases(ranks: int, count: int, least: int = 1, most: int = 1500) -> list[ExchangeCase]:
    """Of so many words to a peer; the sizes are part of the test, not of its luck."""
    found = (case for case in (random_case(ranks, seed, ITEMS) for seed in range(500)) if least <= words(case) <= most)
    return [case for case, _ in zip(found, range(count), strict=False)]
