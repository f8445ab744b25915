"""What mesh_matmul gives the driver, and what its kernel makes of that, played in Python: a link of each group on the CPU."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from tscompile.errors import TscompileError
from tscompile.nvshmem import stream
from tscompile.problem import GatherUse, Plan
from tscompile.templates import find_template
from tscompile.templates.nvlink import mesh_gemm, mesh_tiles
from tscompile.templates.nvlink.channel import ACK, FLAGS, FORK, MAIN, SIDE, Site
from tscompile.templates.nvlink.kernels.gather_blocks import blocked
from tscompile.templates.nvlink.mesh_tiles import Operand, mesh_table

from .blocks_protocol import load
from .fake_gpu import SLOT_BYTES, Gpu, Launched
from .mesh_protocol import as_matrix
from .mesh_protocol import blocked as blocks_of
from .test_gather_blocks import at

BF16 = "bfloat16"
LEFT = [GatherUse("lhs", transposed, axis, BF16) for transposed, axis in product((False, True), ("rows", "cols"))]  # type: ignore[arg-type]
RIGHT = [GatherUse("rhs", transposed, axis, BF16) for transposed, axis in product((False, True), ("rows", "cols"))]  # type: ignore[arg-type]
PAIRS = [*zip(LEFT, RIGHT, strict=True), (LEFT[0], RIGHT[1]), (LEFT[1], RIGHT[0]), (LEFT[2], RIGHT[3])]


class Pair:
    """Rank (i, j): number j of the row that gathers the left operand, number i of the column that gathers the right one."""

    def __init__(self, patch: pytest.MonkeyPatch, place: tuple[int, int], shape: tuple[int, int]) -> None:
        self.left, self.right = Gpu(patch, place[1], shape[1]), Gpu(patch, place[0], shape[0])
        self.gpus = self.left, self.right
        patch.setattr(mesh_gemm, "kernel", self.left.driver.kernel)
        self.issued: list[tuple[str, dict[str, int]]] = []
        for name, gpu in (("left", self.left), ("right", self.right)):
            self._note(patch, name, gpu)
        self.left.driver.on_launch = self._play
        self.site = Site(5)

    def _note(self, patch: pytest.MonkeyPatch, name: str, gpu: Gpu) -> None:
        issue = gpu.driver.issue

        def noting(steps: Any, queues: Any) -> None:
            before = len(gpu.driver.issued)
            issue(steps, queues)
            self.issued += [(name, step) for step in gpu.driver.issued[before:]]

        patch.setattr(gpu.driver, "issue", noting)

    def capture(self) -> None:
        for gpu in self.gpus:
            gpu.torch.capturing = True

    def _slot(self, gpu: Gpu, address: int, shape: tuple[int, ...]) -> Tensor:
        slots = {gpu.memory.bases[gpu.memory.rank] + gpu.link.slot_offset(slot): slot for slot in range(4)}
        return gpu.link.slot_view(slots[address], shape, torch.bfloat16)

    def _play(self, launched: Launched) -> None:
        """The kernel, with everything arrived."""
        if launched.name != "mesh_gemm":
            return
        config, _ = launched.args
        v = launched.values
        operands, tensors = [], []
        for gpu, prefix, own, slot, along, k_first in zip(
            self.gpus, ("", "r_"), "XY", "AB", config.contracts, config.k_first, strict=True
        ):
            sizes = v[f"{prefix}inner"], v[f"{prefix}width"]
            count, blocks = v[f"{prefix}own_blocks"], v[f"{prefix}blocks"]
            operands.append(Operand(blocks // count, count, *sizes, along, k_first))
            pair = (
                self._slot(gpu, v[slot], blocked(k_first, along, blocks, *sizes)),
                at(v[own], *blocked(k_first, along, count, *sizes)),
            )
            for tensor in pair:  # TMA steps by multiples of 16 bytes
                assert tensor.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in tensor.stride()[:2])
            tensors.append([tensor.float() for tensor in pair])
        shape = operands[0].free, operands[1].free
        out, written = torch.full(shape, torch.nan), torch.zeros(shape)
        rows = [tuple(row) for row in at(v["table"], 2 * (v["tiles"] + v["panels"]), 8, dtype=torch.int32).tolist()]
        for tile in range(v["tiles"]):
            row, col = rows[2 * tile : 2 * tile + 2]
            total = torch.zeros(config.tile_m, config.tile_n)
            steps = 0
            for panel in range(v["tiles"], v["tiles"] + v["panels"]):
                walks = rows[2 * panel : 2 * panel + 2]
                for step in range(walks[0][2]):
                    stages = []
                    for operand, pair, mine, walk, size in zip(
                        operands, tensors, (row, col), walks, (config.tile_m, config.tile_n), strict=True
                    ):
                        _, _, _, own_block, block, *_ = walk if operand.contracts else mine
                        source = pair[own_block]
                        k = walk[0] + step * config.tile_k
                        stages.append(
                            load(source, block, mine[0], k, operand.k_first, operand.contracts, size, config.tile_k)
                        )
                    total += stages[0].t() @ stages[1]
                    steps += 1
            assert steps == v["steps"]
            place = (slice(row[5], row[5] + row[2]), slice(col[5], col[5] + col[2]))
            out[place] = total[: row[2], : col[2]]
            written[place] += 1
        assert torch.equal(written, torch.ones(shape))
        if config.bias:
            out += at(v["V"], shape[1]).float()
        at(v["C"], *shape).copy_(out)


def operand_of(use: GatherUse, ranks: int, pieces: int, free: int, k: int) -> tuple[Operand, tuple[int, int]]:
    """An operand of these sizes, and its shards' shape [P, Q]."""
    inner, width = (k // (ranks * pieces), free) if use.contracts_ranks else (free // (ranks * pieces), k)
    shard = (pieces, inner * width) if use.rank_axis == "rows" else (width * pieces, inner)
    return Operand.of(use, ranks, shard, k), shard


def run(
    pair: Pair,
    uses: tuple[GatherUse, GatherUse],
    pieces: tuple[int, int],
    sizes: tuple[int, int, int],
    bias: bool = False,
) -> None:
    m, n, k = sizes
    shards, matrices, wholes = [], [], []
    for gpu, use, count, free in zip(pair.gpus, uses, pieces, (m, n), strict=True):
        operand, (p, q) = operand_of(use, gpu.link.size, count, free, k)
        whole = torch.randint(-2, 3, (p, gpu.link.size, q)).to(torch.bfloat16)
        matrices.append(as_matrix(operand, whole.view(blocks_of(operand, operand.blocks))))
        wholes.append(whole)
        shards.append(whole[:, gpu.link.rank].contiguous())
    plan = Plan("mesh_matmul", f"g/{uses}{pieces}{sizes}", "nvlink", BF16, uses=uses, second_size=pair.right.link.size)
    template = find_template("mesh_matmul", "nvlink")
    assert template is not None
    term = torch.randint(-2, 3, (n,)).to(torch.bfloat16) if bias else None
    args = (*shards, term, k, "a group")
    assert template.scratch_bytes(plan, pair.left.link.size, *args) == max(whole.nbytes for whole in wholes)
    channels = tuple(gpu.link.open(pair.site) for gpu in pair.gpus)
    for gpu, channel, whole in zip(pair.gpus, channels, wholes, strict=True):
        slot = channel.view(tuple(whole.shape), torch.bfloat16)
        slot.copy_(whole)
        slot[:, gpu.link.rank] = torch.nan  # nobody writes it
    (out,) = template.run(channels, plan, *args)
    expected = matrices[0].float().t() @ matrices[1].float() + (term.float() if term is not None else 0)
    assert torch.equal(out, expected.to(torch.bfloat16))


@pytest.mark.parametrize(("left", "right"), PAIRS, ids=str)
def test_every_layout(monkeypatch: pytest.MonkeyPatch, left: GatherUse, right: GatherUse) -> None:
    for number, (place, shape, pieces, sizes) in enumerate(
        (
            ((0, 1), (2, 2), (1, 1), (272, 144, 256)),
            ((1, 2), (2, 3), (1, 1), (144, 528, 384)),
            ((2, 0), (3, 2), (2, 1), (96, 264, 768)),
        )
    ):
        pair = Pair(monkeypatch, place, shape)
        run(pair, (left, right), pieces, sizes, bias=number == 0)
        launched = pair.left.driver.launched[-1]
        assert launched.args[0].contracts == (left.contracts_ranks, right.contracts_ranks)
        assert launched.values["ack"] == ACK and launched.values["site"] == 5


def summa(pair: Pair) -> None:
    run(pair, (LEFT[1], RIGHT[0]), (1, 1), (256, 256, 256))


def test_what_is_issued_and_in_which_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """All sends of both groups before the kernel that waits for the peers' sends; then both groups are joined and noted as busy."""
    monkeypatch.setattr(mesh_tiles, "_CHUNK_BYTES", 1 << 14)
    monkeypatch.setattr(mesh_tiles, "_ROW_BYTES", 256)
    pair = Pair(monkeypatch, (1, 0), (2, 2))
    summa(pair)
    kinds = [(name, step["kind"], step["stream"]) for name, step in pair.issued]
    sends = [(stream.COPY_ROWS, SIDE), (stream.WRITE, SIDE)] * 2
    fork, join = (
        [(stream.RECORD, MAIN), (stream.AWAIT, SIDE)],
        [(stream.RECORD, SIDE), (stream.AWAIT, MAIN), (stream.RECORD, MAIN)],
    )
    assert kinds == [
        *(("right", *step) for step in (*fork, *sends)),
        *(("left", *step) for step in (*fork, *sends, (stream.LAUNCH, MAIN), *join)),
        *(("right", *step) for step in join),
    ]
    assert pair.issued[0][1]["event"] == FORK
    values = pair.left.driver.launched[-1].values
    for name, gpu, shard, epoch in (("left", pair.left, "X", "epoch"), ("right", pair.right, "Y", "r_epoch")):
        link = gpu.link
        peer = 1 - link.rank
        copies = [step for of, step in pair.issued if of == name and step["kind"] == stream.COPY_ROWS]
        flags = [step for of, step in pair.issued if of == name and step["kind"] == stream.WRITE]
        assert [step["src"] >= values[shard] for step in copies] == [True] * 2 and copies[0]["src"] == values[shard]
        assert all(
            link.address(peer, 0) <= step["dst"] < link.address(peer, 0) + (1 << 32) for step in [*copies, *flags]
        )
        first = link.address(peer, (FLAGS + link.rank) * 4)  # of slot 1
        assert [step["dst"] for step in flags] == [first, first + 8 * 4]
        assert {step["value"] for step in flags} == {values[epoch] & 0xFFFFFFFF}


def test_slots_and_epochs_of_either_group_go_their_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ops of one group come between those of both, so slots pair in any way; nothing of a launch is stale."""
    pair = Pair(monkeypatch, (0, 0), (2, 2))
    seen = set()
    for extra in (0, 0, 1, 0, 2, 1, 1):
        for _ in range(extra):
            pair.right.link.open(Site(9))
        summa(pair)
        values = pair.left.driver.launched[-1].values
        seen.add((values["A"], values["B"]))
        low = 0xFFFFFFFF
        assert (values["epoch"] & low, values["r_epoch"] & low) == tuple(gpu.link._eager & low for gpu in pair.gpus)
        assert values["context"] in pair.left.link.context_addresses
        assert values["r_context"] in pair.right.link.context_addresses
    assert len(seen) == 4


def test_a_captured_call_opens_and_acknowledges_in_both_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(monkeypatch, (0, 1), (2, 2))
    summa(pair)
    pair.capture()
    for gpu in pair.gpus:
        gpu.driver.launched.clear()
    pair.issued.clear()
    summa(pair)
    kinds = [(name, step["kind"]) for name, step in pair.issued]
    opened = [index for index, (_, kind) in enumerate(kinds) if kind == stream.LAUNCH]
    assert [kinds[index][0] for index in opened] == ["right", "left", "left"] and kinds[0] == ("right", stream.LAUNCH)
    assert [gpu.driver.launched[0].name for gpu in pair.gpus] == ["service", "service"]
    # No event of the watchdog's in a graph, and flags are copies of the epoch that the graph counts.
    assert [kind for _, kind in kinds[opened[-1] + 1 :]] == [stream.RECORD, stream.AWAIT] * 2
    assert stream.WRITE not in [kind for _, kind in kinds]
    assert pair.left.link.pinned and (pair.left.link.was_captured and pair.right.link.was_captured)


def test_a_slot_that_is_too_small_is_an_error_before_anything_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(monkeypatch, (0, 1), (2, 2))
    pair.right.link.slot_bytes = 64
    with pytest.raises(TscompileError, match=r"needs \d+ bytes of a slot"):
        summa(pair)
    assert not pair.issued and SLOT_BYTES > 64


def test_copies_and_tables_fit_together() -> None:
    """At the sizes that are judged: chunks of either operand, and what the first wave of tiles needs."""
    for size in (8192, 16384):
        left = operand_of(LEFT[1], 2, 1, size // 2, size)[0]
        right = operand_of(RIGHT[0], 2, 1, size // 2, size)[0]
        assert len(left.chunks) == len(right.chunks) == 4
        made = mesh_table(left, right, (0, 0), 256)
        first = made.rows[: 2 * 132]
        share = 2 if size == 8192 else 1  # chunks of either operand, of four
        assert {row[7] for row in first} <= set(range(share + 1))
        assert sum(row[7] >= share for row in first) <= len(first) / 16
