"""mesh_matmul over NVLink: copy engines push both shards, each to the peers of its own group, while a GEMM takes what has arrived.

Shards go out in chunks (mesh_tiles.py), those of both operands at the same time, so that the first tiles have all of k early. Tiles
and panels of k that need nothing of peers come first, and own shards are read where they lie. The launch belongs to the calls of both
groups: it waits for the flags of either one in that one's epoch, and acknowledges both slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from ...errors import TscompileError
from ...language.context import MAX_RANKS
from ...nvshmem import stream
from ...nvshmem.stream import Step
from ...problem import FusionProblem, Plan
from ..fresh import maker
from ..template import register_template, torch_dtype
from .call import EPOCH, SOURCE, Call, Sent
from .channel import MAIN, SIDE, DeviceChannel, DeviceLink
from .jit import kernel
from .kernels.config import MeshConfig, depth
from .lasting import lasting_tables
from .mesh_tiles import Operand, Rectangle, chunk_copies, mesh_table, operands_refusal, tile_width
from .operands import pointer_of
from .refusal import nvlink_refusal, sides_of


def problem_operands(problem: FusionProblem, plan: Plan) -> tuple[Operand, Operand]:
    """Both operands of a problem."""
    left, right = (
        Operand.of(use, side.group_size, side.shard, problem.gemms[0].k)
        for use, side in zip(plan.uses, sides_of(problem), strict=True)
    )
    return left, right


def _operands(plan: Plan, sizes: tuple[int, int], shards: Sequence[Tensor], contracted: int) -> tuple[Operand, Operand]:
    left, right = (
        Operand.of(use, size, shard.shape, contracted)
        for use, size, shard in zip(plan.uses, sizes, shards, strict=True)
    )
    return left, right


def _kernel(
    plan: Plan, left: Operand, right: Operand, bias: Tensor | None
) -> tuple[str, MeshConfig, tuple[bool, bool]]:
    """The kernel of a call, as jit.py takes it."""
    transposed = not right.k_first
    tile_n = tile_width(left, right, transposed)
    config = MeshConfig(
        plan.dtype,
        transposed,
        bias=bias is not None,
        tile_n=tile_n,
        stages=depth(tile_n),
        left_transposed=left.k_first,
        contracts=(left.contracts, right.contracts),
    )
    return "mesh_gemm", config, (plan.return_gathered, plan.return_second)


@register_template("mesh_matmul", "nvlink")
class NvlinkMeshGemm:
    """lhs and rhs, each gathered in its own group, multiplied with each other."""

    def supports(self, problem: FusionProblem, plan: Plan) -> str | None:
        for size in (problem.group_size, problem.second_group_size):
            general = nvlink_refusal(replace(problem, group_size=size))
            if general is not None:
                return general
        if not problem.static:
            return "sizes are symbolic: the ranks of a mesh agree on those that a graph is compiled for"
        if any(use.dtype != plan.dtype for use in plan.uses):
            return "the matmul is not in the dtype that travels"
        return operands_refusal(*problem_operands(problem, plan))

    def scratch_bytes(
        self,
        plan: Plan,
        size: int,
        lhs: Tensor,
        rhs: Tensor,
        bias: Tensor | None,
        contracted: int,
        second_group: str,
    ) -> int:
        """Of either group's slots; the larger operand counts for both."""
        operands = _operands(plan, (size, plan.second_size), (lhs, rhs), contracted)
        if not (lhs.numel() and rhs.numel()) or operands_refusal(*operands) is not None:
            return -1
        return max(operand.ranks * operand.shard_bytes for operand in operands)

    def kernels(
        self,
        plan: Plan,
        size: int,
        lhs: Tensor,
        rhs: Tensor,
        bias: Tensor | None,
        contracted: int,
        second_group: str,
    ) -> list[tuple[Any, ...]]:
        return [_kernel(plan, *_operands(plan, (size, plan.second_size), (lhs, rhs), contracted), bias)]

    def run(
        self,
        channel: tuple[DeviceChannel, DeviceChannel],
        plan: Plan,
        lhs: Tensor,
        rhs: Tensor,
        bias: Tensor | None,
        contracted: int,
        second_group: str,
    ) -> list[Tensor]:
        """`channel`: the calls of the left operand's group and of the right one's; both have the same site."""
        left, right = channel
        recipe: _Recipe = left.site.recipe
        if recipe is None or recipe.left is not left.link or recipe.right is not right.link:
            recipe = left.site.recipe = _Recipe((left.link, right.link), plan, (lhs, rhs), bias, contracted)
        return recipe.run(left, right, lhs, rhs, bias)


class _Recipe:
    """What the calls of one site with the same layout share."""

    def __init__(
        self,
        links: tuple[DeviceLink, DeviceLink],
        plan: Plan,
        shards: tuple[Tensor, Tensor],
        bias: Tensor | None,
        contracted: int,
    ) -> None:
        self.left, self.right = links
        self.dtype = torch_dtype(plan.dtype)
        operands = _operands(plan, (links[0].size, links[1].size), shards, contracted)
        for operand, link in zip(operands, links, strict=True):
            if operand.ranks * operand.shard_bytes > link.slot_bytes:
                raise TscompileError(
                    f"site {plan.site} needs {operand.ranks * operand.shard_bytes} bytes of a slot, and the ranks agreed on "
                    f"{link.slot_bytes}: report this, and run with tilescale.disable={plan.kind} meanwhile"
                )
        left, right = operands
        name, config, collects = _kernel(plan, left, right, bias)
        made = mesh_table(left, right, (links[0].rank, links[1].rank), config.tile_n)
        (self._table,) = lasting_tables([made.rows], links[0].device)
        self._copies = [chunk_copies(operand, link.rank) for operand, link in zip(operands, links, strict=True)]
        self._new = maker(shards[0].device)
        self._shape = (left.free, right.free)
        returned = zip(shards, operands, ("gathered", "r_gathered"), collects, strict=True)
        self.kernel = kernel(name, config, collects)
        place = self.kernel.place
        self._returned = [
            ((int(shard.shape[0]), operand.ranks * int(shard.shape[1])), place(word))
            for shard, operand, word, wanted in returned
            if wanted
        ]
        self._shards = place("X"), place("Y")
        self._epochs = place("epoch"), place("r_epoch")
        self._out, self._bias = place("C"), place("V")
        self._fixed = {
            "table": self._table.data_ptr(),
            "tiles": made.tiles,
            "panels": made.panels,
            "steps": made.steps,
        }
        for operand, shard, prefix in zip(operands, shards, ("", "r_"), strict=True):
            self._fixed |= {
                f"{prefix}own_blocks": operand.pieces,
                f"{prefix}blocks": operand.blocks,
                f"{prefix}inner": operand.inner,
                f"{prefix}width": operand.width,
                f"{prefix}pieces": int(shard.shape[0]),
                f"{prefix}shard_bytes": int(shard.shape[1]) * self.dtype.itemsize,
                f"{prefix}chunks": len(operand.chunks),
            }
        self._calls: dict[tuple[int, int], tuple[Call, Call]] = {}

    def _calls_of(self, left: DeviceChannel, right: DeviceChannel) -> tuple[Call, Call]:
        """The steps of a call in these slots: the launch is among those of the left operand's group."""
        theirs = right.values()
        known = {
            **left.values(),
            **self._fixed,
            "A": left.data(left.rank),
            "B": right.data(right.rank),
            "r_context": theirs["context"],
        }
        patched = {"X", "Y", "C", "V", "epoch", "r_epoch", "gathered", "r_gathered"}
        values = self.kernel.values(known, patched)
        launch = self.kernel.step(values, MAIN)
        calls = (
            Call(left, [launch], _sends(left, self._copies[0]), [values]),
            Call(right, [], _sends(right, self._copies[1]), []),
        )
        if left.captured:
            left.link.pinned.append(self)
        return calls

    def _source(self, shard: Tensor) -> Tensor:
        if shard.dtype is not self.dtype or not shard.is_contiguous():
            shard = shard.to(self.dtype).contiguous()
        return shard.clone() if shard.data_ptr() % 16 else shard

    def run(
        self, left: DeviceChannel, right: DeviceChannel, lhs: Tensor, rhs: Tensor, bias: Tensor | None
    ) -> list[Tensor]:
        slots = left.slot, right.slot
        calls = self._calls.get(slots)
        if calls is None:
            calls = self._calls[slots] = self._calls_of(left, right)
        call, other = calls
        values = call.values[0]
        lhs, rhs = self._source(lhs), self._source(rhs)
        call.words[SOURCE] = values[self._shards[0]] = lhs.data_ptr()
        other.words[SOURCE] = values[self._shards[1]] = rhs.data_ptr()
        call.words[EPOCH] = values[self._epochs[0]] = left.epoch
        other.words[EPOCH] = values[self._epochs[1]] = right.epoch
        out = self._new(self._shape, (self._shape[1], 1), self.dtype)
        values[self._out] = out.data_ptr()
        outputs = [out]
        for shape, place in self._returned:
            outputs.append(self._new(shape, (shape[1], 1), self.dtype))
            values[place] = outputs[-1].data_ptr()
        alive: list[Tensor] = []  # until the kernel is enqueued
        if bias is not None:
            alive.append(bias.to(self.dtype))
            values[self._bias] = pointer_of(alive[-1], False, alive)
        # Both shards are on their way before the kernel that waits for those of the peers.
        right.link.issue(other.before)
        left.link.issue(call.steps)
        right.link.issue(other.after)
        return outputs


def _sends(channel: DeviceChannel, copies: Sequence[Rectangle]) -> list[Step]:
    """Steps of the copy stream: chunk by chunk to all peers, the previous rank's first, so that every rank sends to another one."""
    steps = []
    for chunk, copy in enumerate(copies):
        for distance in range(1, channel.size):
            peer = (channel.rank - distance) % channel.size
            steps += [
                Sent(
                    kind=stream.COPY if copy.rows == 1 else stream.COPY_ROWS,
                    stream=SIDE,
                    dst=channel.data(peer, copy.target),
                    src=copy.source,
                    bytes=copy.width,
                    rows=copy.rows,
                    dst_pitch=copy.target_pitch,
                    src_pitch=copy.pitch,
                ),
                channel.signal_step(peer, chunk * MAX_RANKS + channel.rank),
            ]
    return steps
