"""All ranks of a mesh that run ops of two groups one after the other, in plain Python from the tables and copies of mesh_tiles.py.

A rank has a copy engine for each of its groups, and workers that claim tiles. Its next op begins when all of the last one is done;
slots alternate and flags hold epochs, as on GPUs. Who acts next is left to a random number generator.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tscompile.templates.nvlink.mesh_tiles import MeshTable, Operand, Rectangle, chunk_copies, mesh_table

from .blocks_protocol import load

NEVER = 9999  # what memory holds that nobody has written


def blocked(operand: Operand, blocks: int) -> tuple[int, int, int]:
    """Shape of that many blocks, as kernels/gather_blocks.py has it."""
    sizes = (operand.inner, operand.width)
    return (blocks, *sizes) if operand.k_first == operand.contracts else (operand.width, blocks, operand.inner)


def as_matrix(operand: Operand, gathered: Tensor) -> Tensor:
    """[k, free] of all blocks."""
    rows = operand.k_first == operand.contracts  # blocks lie along the slower axis
    matrix = gathered.reshape(-1, operand.width) if rows else gathered.reshape(operand.width, -1)
    return matrix if operand.k_first else matrix.t()


def own_blocks(operand: Operand, gathered: Tensor, rank: int) -> Tensor:
    """The shard of a rank, of gathered blocks [pieces * ranks]."""
    axis = 0 if operand.k_first == operand.contracts else 1
    return (
        gathered.unflatten(axis, (operand.pieces, operand.ranks))
        .select(axis + 1, rank)
        .clone(memory_format=torch.contiguous_format)
    )


def copy(rectangle: Rectangle, shard: Tensor, slot: Tensor) -> None:
    def part(tensor: Tensor, offset: int, pitch: int) -> Tensor:
        return tensor.view(-1).view(torch.uint8).as_strided((rectangle.rows, rectangle.width), (pitch, 1), offset)

    part(slot, rectangle.target, rectangle.target_pitch).copy_(part(shard, rectangle.source, rectangle.pitch))


@dataclass
class Side:
    """What a rank has of one of its groups: a shard per op, two slots, flags with the epochs that they were set in."""

    operand: Operand
    rank: int
    shards: list[Tensor]
    slots: list[Tensor] = field(default_factory=list)
    flags: list[dict[int, int]] = field(default_factory=lambda: [{}, {}])

    def __post_init__(self) -> None:
        shape = blocked(self.operand, self.operand.blocks)
        self.slots = [torch.full(shape, NEVER, dtype=torch.int16) for _ in range(2)]

    def sends(self) -> list[tuple[int, int, Rectangle]]:
        """(peer, flag, copy) in their order."""
        ranks = self.operand.ranks
        return [
            ((self.rank - distance) % ranks, chunk * 8 + self.rank, rectangle)
            for chunk, rectangle in enumerate(chunk_copies(self.operand, self.rank))
            for distance in range(1, ranks)
        ]

    def is_there(self, epoch: int, mask: int, chunk: int) -> bool:
        sources = [source for source in range(8) if mask >> source & 1]
        assert self.rank not in sources and all(source < self.operand.ranks for source in sources)
        return all(self.flags[epoch & 1].get(chunk * 8 + source, -1) >= epoch for source in sources)


class MeshRank:
    """One rank; `peers[side]` are the sides of the ranks of its group, in the group's order."""

    def __init__(self, sides: tuple[Side, Side], tile: tuple[int, int, int], workers: int, ops: int, seed: int) -> None:
        self.sides, self.tile, self.ops = sides, tile, ops
        self.peers: tuple[list[Side], list[Side]] = ([], [])
        left, right = sides
        self.table: MeshTable = mesh_table(left.operand, right.operand, (left.rank, right.rank), tile[1])
        self.outs: list[Tensor] = []
        self.epoch = -1
        self._dice = random.Random(seed)
        self._workers = workers
        self._begin()

    @property
    def done(self) -> bool:
        return self.epoch == self.ops

    def _begin(self) -> None:
        self.epoch += 1
        self._sends = [side.sends() for side in self.sides]
        self._claimed = 0
        self._held: list[tuple[int, int, Tensor] | None] = [None] * self._workers
        shape = tuple(side.operand.free for side in self.sides)
        self.outs.append(torch.full(shape, NEVER, dtype=torch.int64))
        self.written = torch.zeros(shape, dtype=torch.int64)

    def step(self) -> bool:
        """One event of one of the actors; False if none of them can act."""
        actors = [*range(2), *range(2, 2 + self._workers)]
        self._dice.shuffle(actors)
        for actor in actors:
            if self._send(actor) if actor < 2 else self._compute(actor - 2):
                break
        else:
            return False
        if not any(self._sends) and self._claimed == self.table.tiles and not any(self._held):
            assert torch.equal(self.written, torch.ones_like(self.written))
            self._begin()
        return True

    def _send(self, which: int) -> bool:
        if not self._sends[which]:
            return False
        peer, flag, rectangle = self._sends[which].pop(0)
        side, other = self.sides[which], self.peers[which][peer]
        copy(rectangle, side.shards[self.epoch], other.slots[self.epoch & 1])
        other.flags[self.epoch & 1][flag] = self.epoch
        return True

    def _compute(self, worker: int) -> bool:
        """The next panel of a worker's tile."""
        held = self._held[worker]
        if held is None:
            if self._claimed == self.table.tiles:
                return False
            held = self._held[worker] = (self._claimed, 0, torch.zeros(self.tile[:2], dtype=torch.int64))
            self._claimed += 1
            return True
        tile, panel, total = held
        rows = self.table.rows[2 * tile : 2 * tile + 2]
        at = 2 * (self.table.tiles + panel)
        stages: list[list[Tensor]] = []
        for which, (side, row, walk) in enumerate(zip(self.sides, rows, self.table.rows[at : at + 2], strict=True)):
            _, _, _, own, block, _, mask, _ = walk if side.operand.contracts else row
            if not side.is_there(self.epoch, mask, row[7]):
                return False
            assert bool(own) == (mask == 0)
            tensor = (side.shards[self.epoch] if own else side.slots[self.epoch & 1]).long()
            stages.append(
                [
                    self._load(side.operand, tensor, block, row[0], walk[0] + step * self.tile[2], self.tile[which])
                    for step in range(walk[2])
                ]
            )
        for left, right in zip(*stages, strict=True):
            total = total + left.t() @ right
        self._held[worker] = (tile, panel + 1, total)
        if panel + 1 == self.table.panels:
            self._store(rows[0], rows[1], total)
            self._held[worker] = None
        return True

    def _load(self, operand: Operand, tensor: Tensor, block: int, at: int, k: int, size: int) -> Tensor:
        return load(tensor, block, at, k, operand.k_first, operand.contracts, size, self.tile[2])

    def _store(self, row: tuple[int, ...], col: tuple[int, ...], total: Tensor) -> None:
        assert 0 < row[2] <= self.tile[0] and 0 < col[2] <= self.tile[1]
        place = (slice(row[5], row[5] + row[2]), slice(col[5], col[5] + col[2]))
        assert self.outs[-1][place].shape == (row[2], col[2])
        self.outs[-1][place] = total[: row[2], : col[2]]
        self.written[place] += 1


def make_mesh(
    left: Operand, right: Operand, tile: tuple[int, int, int], workers: int, ops: int, seed: int
) -> tuple[list[MeshRank], list[list[Tensor]]]:
    """Ranks (i, j) of a mesh of right.ranks rows and left.ranks columns, row by row; and what each of their ops should give."""
    generator = torch.Generator().manual_seed(seed)

    def wholes(operand: Operand, groups: int) -> list[list[Tensor]]:
        shape = blocked(operand, operand.blocks)
        return [
            [torch.randint(-9, 10, shape, generator=generator, dtype=torch.int16) for _ in range(ops + 1)]
            for _ in range(groups)
        ]

    def side(operand: Operand, whole: list[Tensor], rank: int) -> Side:
        return Side(operand, rank, [own_blocks(operand, each, rank) for each in whole])

    lefts, rights = wholes(left, right.ranks), wholes(right, left.ranks)
    ranks, truth = {}, []
    for i in range(right.ranks):
        for j in range(left.ranks):
            sides = side(left, lefts[i], j), side(right, rights[j], i)
            ranks[i, j] = MeshRank(sides, tile, workers, ops, seed + 31 * i + j)
            pairs = zip(lefts[i][:ops], rights[j][:ops], strict=True)
            truth.append([as_matrix(left, a.long()).t() @ as_matrix(right, b.long()) for a, b in pairs])
    for (i, j), rank in ranks.items():
        rank.peers[0].extend(ranks[i, other].sides[0] for other in range(left.ranks))
        rank.peers[1].extend(ranks[other, j].sides[1] for other in range(right.ranks))
    return list(ranks.values()), truth
