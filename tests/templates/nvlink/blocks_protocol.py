"""What the kernel of gather_blocks.py does with its operands and its table, in plain Python on tensors of the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tscompile.templates.nvlink.tiles import Row

from .protocol import NEVER


@dataclass(frozen=True)
class Form:
    """What the kernel is compiled for; sizes of tiles are small in most tests."""

    gathered_left: bool
    contracts: bool
    k_first: tuple[bool, bool]  # of the gathered and of the local operand
    tile_m: int
    tile_n: int
    tile_k: int


def load(operand: torch.Tensor, block: int, at: int, k: int, k_first: bool, along_k: bool, size: int, steps: int):
    """A stage [steps, size], as TMA fills it: zeros beyond the block and beyond the operand."""
    sliced = operand[block] if k_first == along_k else operand[:, block]
    matrix = sliced if k_first else sliced.t()
    assert 0 <= k < matrix.shape[0] and 0 <= at < matrix.shape[1] and block >= 0
    stage = matrix.new_zeros((steps, size))
    part = matrix[k : k + steps, at : at + size]
    stage[: part.shape[0], : part.shape[1]] = part
    return stage


class BlockGatherer:
    """One rank. `own`, `slot` and `local` are the kernel's X, A and B."""

    def __init__(
        self,
        form: Form,
        own: torch.Tensor,
        slot: torch.Tensor,
        local: torch.Tensor,
        table: Sequence[Row],
        out: torch.Tensor,
    ) -> None:
        self.form, self.own, self.slot, self.local, self.table, self.out = form, own, slot, local, table, out
        self.written = torch.zeros(out.shape, dtype=torch.int64)
        self.arrived: set[int] = set()
        self.held: dict[Row, tuple[int, torch.Tensor]] = {}  # tiles under way: blocks that are added, and the sum

    def compute(self, entry: Row) -> bool:
        """The next block of a tile; True once the tile is stored."""
        form = self.form
        count = self.local.shape[0 if form.k_first[1] else 1]
        steps = self.local.shape[1 if form.k_first[1] else 2]
        done, total = self.held.get(entry, (0, self.out.new_zeros((form.tile_m, form.tile_n))))
        row, col, stored_rows, *_, stored_columns = entry
        _, _, _, own, block, place, mask, _ = self.table[entry[4] + done] if form.contracts else entry
        if any(mask >> source & 1 and source not in self.arrived for source in range(32)):
            return False
        sizes = (form.tile_m, form.tile_n) if form.gathered_left else (form.tile_n, form.tile_m)
        starts = (row, col) if form.gathered_left else (col, row)
        for k in range(0, steps, form.tile_k):
            gathered = load(
                self.own if own else self.slot,
                block,
                starts[0],
                k,
                form.k_first[0],
                form.contracts,
                sizes[0],
                form.tile_k,
            )
            local = load(
                self.local, place if form.contracts else 0, starts[1], k, form.k_first[1], True, sizes[1], form.tile_k
            )
            left, right = (gathered, local) if form.gathered_left else (local, gathered)
            total = total + left.t() @ right
        self.held[entry] = (done + 1, total)
        if done + 1 < count:
            return False
        if not form.contracts:
            row, col = (entry[5], col) if form.gathered_left else (row, entry[5])
        at = (slice(row, row + stored_rows), slice(col, col + stored_columns))
        assert self.out[at].shape == (stored_rows, stored_columns)
        assert 0 < stored_rows <= form.tile_m and 0 < stored_columns <= form.tile_n
        self.out[at] = total[:stored_rows, :stored_columns]
        self.written[at] += 1
        return True


class BlockWorld:
    """A rank with its peers' data, of which the slot has nothing yet. `truth` is the whole result."""

    def __init__(
        self,
        form: Form,
        rank: int,
        ranks: int,
        pieces: int,
        inner: int,
        width: int,
        free: int,
        table: Sequence[Row],
        seed: int,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.rank, self.ranks = rank, ranks
        self.outer_first = form.k_first[0] == form.contracts  # [blocks, inner, width]
        count = pieces * ranks
        shape = (count, inner, width) if self.outer_first else (width, count, inner)
        self.whole = torch.randint(-9, 10, shape, generator=generator)
        matrix = (
            self.whole.reshape(count * inner, width) if self.outer_first else self.whole.reshape(width, count * inner)
        )
        gathered = matrix if form.k_first[0] else matrix.t()  # [k, its rows or columns]
        k = gathered.shape[0]
        local = torch.randint(-9, 10, (k, free), generator=generator)
        self.truth = gathered.t() @ local if form.gathered_left else local.t() @ gathered
        k_blocks = count if form.contracts else 1
        blocked = (k_blocks, k // k_blocks, free) if form.k_first[1] else (free, k_blocks, k // k_blocks)
        operand = (local if form.k_first[1] else local.t()).reshape(blocked)
        slot = torch.full_like(self.whole, NEVER)
        out = torch.full_like(self.truth, NEVER)
        self.gatherer = BlockGatherer(form, self.of(rank, self.whole).clone(), slot, operand, table, out)

    def of(self, source: int, tensor: torch.Tensor) -> torch.Tensor:
        """The blocks of a rank."""
        return tensor[source :: self.ranks] if self.outer_first else tensor[:, source :: self.ranks]

    def arrive(self, source: int) -> None:
        """The copy engine of a peer: data, then the flag."""
        self.of(source, self.gatherer.slot).copy_(self.of(source, self.whole))
        self.gatherer.arrived.add(source)
