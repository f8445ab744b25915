"""Random copies between the ranks of a group, and what memory must hold afterwards. All ranks make the same plans."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import astuple, dataclass

import torch

from .copy_kernels import WAYS

POISON = 0xA5


@dataclass(frozen=True)
class Job:
    """A copy, as a row of the table of `copy_kernels.copies`. Ranks, bytes from the base of their data, and the number of a way."""

    to: int
    at: int
    source: int
    start: int
    size: int
    way: int


@dataclass(frozen=True)
class Layout:
    """What is where in each rank's data: what is copied from, then a share for what each rank writes there."""

    ranks: int
    data_bytes: int

    @property
    def source_bytes(self) -> int:
        return self.data_bytes // 8

    def share(self, rank: int) -> tuple[int, int]:
        each = (self.data_bytes - self.source_bytes) // self.ranks // 4096 * 4096
        return self.source_bytes + rank * each, self.source_bytes + (rank + 1) * each


def _size(chance: random.Random, number: int, layout: Layout) -> int:
    """Most sizes small, where heads and tails matter; some as large as the memory allows."""
    if number % 64 == 63:
        return chance.randint(layout.data_bytes // 512, layout.data_bytes // 16 // layout.ranks)
    if number % 101 == 100:
        return 0
    return chance.randint(1, (40, 300, 300, max(300, layout.data_bytes // 8192))[chance.randrange(4)])


def plan(layout: Layout, rank: int, jobs: int, seed: int, unit: int = 1, largest: int = 1 << 40) -> list[Job]:
    """What `rank` copies: every alignment of source and destination within 16 units, to and from all ranks.

    Args:
        unit: all addresses and sizes are multiples of it.
        largest: size of a copy.
    """
    chance, (begin, end) = random.Random(f"{seed} {rank}"), layout.share(rank)
    free, planned = [begin] * layout.ranks, []
    for number in range(jobs):
        way, other = chance.randrange(len(WAYS)), chance.randrange(layout.ranks)
        to, source = (rank, other) if WAYS[way].startswith("get") else (other, rank)
        size = min(largest, _size(chance, number, layout) * unit)
        line = 16 * unit
        at = -(-free[to] // line) * line + line * chance.randrange(3) + unit * (number % 16)
        size = max(0, min(size, end - at - 1)) // unit * unit
        start = chance.randrange((layout.source_bytes - size) // line) * line + unit * (number // 16 % 16)
        start = min(start, (layout.source_bytes - size) // unit * unit)
        if unit > 1 and size == 0:  # TMA copies something
            size = unit
        planned.append(Job(to, at, source, start, size, way))
        free[to] = at + size + 1
    assert max(free) < end, f"no room for {jobs} jobs of seed {seed}"
    return planned


def table(jobs: Sequence[Job]) -> torch.Tensor:
    return torch.tensor([astuple(job) for job in jobs])


def source(layout: Layout, rank: int) -> torch.Tensor:
    """The bytes that are copied from this rank."""
    return torch.randint(
        0, 256, (layout.source_bytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(rank)
    )


def prepare(layout: Layout, data: torch.Tensor, own: torch.Tensor) -> None:
    data.fill_(POISON)
    data[: layout.source_bytes].copy_(own)


def faults(
    layout: Layout, rank: int, data: torch.Tensor, plans: Sequence[list[Job]], sources: Sequence[torch.Tensor]
) -> str:
    """How the data of `rank` differ from what all plans together make of them; "" if they do not."""
    want = torch.full_like(data, POISON)
    want[: layout.source_bytes] = sources[rank]
    here = [(by, job) for by, jobs in enumerate(plans) for job in jobs if job.to == rank]
    for _, job in here:
        want[job.at : job.at + job.size] = sources[job.source][job.start : job.start + job.size]
    if torch.equal(data, want):
        return ""
    wrong = (data != want).nonzero().flatten()
    said = []
    for place in wrong[:: max(1, len(wrong) // 8)][:8].tolist():
        near = [
            f"rank {by}'s {WAYS[job.way]} {job}" for by, job in here if job.at - 32 <= place < job.at + job.size + 32
        ]
        said.append(f"byte {place} is {int(data[place])}, not {int(want[place])}: {near}")
    return f"{len(wrong)} bytes of rank {rank} are wrong:\n" + "\n".join(said)
