"""Exchanges in front of matmuls over NVLink: what is sent where, the table of tiles, and what a call issues and computes."""

from __future__ import annotations

import ctypes
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tscompile.nvshmem import stream
from tscompile.problem import FusionProblem, GatherUse, Gemm, Plan
from tscompile.templates import find_template
from tscompile.templates.all_to_all_gemm import Received
from tscompile.templates.nvlink import all_to_all_gemm, panels, tiles
from tscompile.templates.nvlink.channel import ACK, FLAGS, MAIN, SIDE, Site
from tscompile.templates.nvlink.panels import Parcel, chunk_count, chunk_rows, copies_of, panels_us, parcels_of
from tscompile.templates.nvlink.tiles import panel_tiles

from . import host_code
from .blocks_protocol import BlockWorld, Form
from .fake_gpu import Gpu, Launched
from .protocol import Actor, Claims, run_all
from .test_gather_blocks import QUICK, SEEDS, Steps, at, emulate, gpu_of

BF16 = "bfloat16"
KIND = "all_to_all_matmul"
USE = GatherUse("lhs", False, "cols", BF16)


def received(sent: list[list[Tensor]], rank: int) -> Tensor:
    """What `rank` receives of what all ranks send, exchange by exchange."""
    whole = Received(sent[rank])
    for source, inputs in enumerate(sent):
        for number, x in enumerate(inputs):
            whole.put(number, source, x[rank])
    return whole.tensor


def copy(parcel: Parcel, sources: list[Tensor], owner: int, slot: Tensor) -> None:
    """What the copy engine does, in bytes."""
    memory = sources[parcel.tensor]
    flat = memory.as_strided((memory.untyped_storage().nbytes() // memory.element_size(),), (1,), 0).view(torch.uint8)
    start = memory.storage_offset() * memory.element_size() + parcel.source + owner * parcel.step
    target = slot.view(-1).view(torch.uint8)
    for row in range(parcel.rows):
        to, frm = parcel.target + row * parcel.target_pitch, start + row * parcel.pitch
        target[to : to + parcel.width] = flat[frm : frm + parcel.width]


@QUICK
@given(
    ranks=st.integers(2, 5),
    rows=st.integers(1, 5),
    outers=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    inner=st.integers(1, 4),
    gap=st.integers(0, 3),
    cut=st.integers(1, 5),
)
def test_parcels_make_up_what_is_received(
    ranks: int, rows: int, outers: list[int], inner: int, gap: int, cut: int
) -> None:
    shapes = [(ranks, rows, outer, inner) for outer in outers]
    sent = []
    for _ in range(ranks):
        # Parts of the ranks lie apart, and in any order.
        stores = [torch.randint(-99, 99, (ranks, rows * outer * inner + gap), dtype=torch.int16) for outer in outers]
        parts = [store[:, gap:].view(shape) for store, shape in zip(stores, shapes, strict=True)]
        sent.append(parts)
    for owner in range(ranks):
        slot = torch.full((rows, sum(outers) * ranks * inner), 77, dtype=torch.int16)
        for rank, parts in enumerate(sent):
            for chunk in {(0, min(cut, rows)), (min(cut, rows), rows)}:
                parcels = parcels_of(shapes, [x.stride(0) for x in parts], rank, 2, chunk)
                assert len(parcels) == copies_of([(outer, inner) for outer in outers])
                for parcel in parcels:
                    copy(parcel, parts, owner, slot)
        assert torch.equal(slot, received(sent, owner))


@QUICK
@given(
    ranks=st.integers(2, 8),
    sizes=st.tuples(*(st.integers(1, top) for top in (3, 11, 13, 13))),
    k_first=st.booleans(),
    tile_n=st.integers(3, 9),
    placed=st.booleans(),
    chunks=st.integers(1, 4),
    workers=st.integers(1, 5),
    seed=SEEDS,
)
def test_whatever_arrives_when(
    ranks: int,
    sizes: tuple[int, int, int, int],
    k_first: bool,
    tile_n: int,
    placed: bool,
    chunks: int,
    workers: int,
    seed: int,
) -> None:
    """Each element of the result is stored once, from blocks that are there; and no order of events holds it up."""
    form = Form(True, True, (False, k_first), 4, tile_n, 3)
    pieces, inner, width, free = sizes
    rank = seed % ranks
    with pytest.MonkeyPatch.context() as patch:
        for module in (tiles, panels):
            patch.setattr(module, "TILE_M", 4)
        patch.setattr(tiles, "BAND", 3)
        bounds = chunk_rows(width, chunks)
        table = panel_tiles(rank, ranks, pieces, bounds, free, tile_n, placed)
    assert len(bounds) <= chunks and [0, *(end for _, end in bounds)] == [*(start for start, _ in bounds), width]
    count, last = pieces * ranks, len(bounds) - 1
    rows, walks = table[: -count * len(bounds)], table[-count * len(bounds) :]
    for chunk in range(len(bounds)):
        walk = walks[chunk * count : (chunk + 1) * count]
        assert [row[5] for row in walk[:pieces]] == [piece * ranks + rank for piece in range(pieces)]
        assert all(row[6] == 0 and row[3] == (not placed) for row in walk[:pieces])
        order = [1 << (last - chunk) * 8 + (rank + step) % ranks for step in range(1, ranks)]
        assert list(dict.fromkeys(row[6] % (1 << 32) for row in walk[pieces:])) == order
    assert all(-(1 << 31) <= word < 1 << 31 for row in table for word in row)
    world = BlockWorld(form, rank, ranks, pieces, inner, width, free, table, seed)
    played = world.gatherer
    if placed:
        world.of(rank, played.slot).copy_(played.own)
        played.own.fill_(1 << 40)

    def arrive(source: int, chunk: int) -> bool:
        """A copy engine: data, then the flag."""
        first, end = bounds[chunk]
        world.of(source, played.slot)[first:end].copy_(world.of(source, world.whole)[first:end])
        played.arrived.add((last - chunk) * 8 + source)
        return True

    claims, dice = Claims(rows), random.Random(seed)
    engines = [
        Actor(Claims([(source, chunk) for chunk in range(len(bounds))]), 1, lambda row: arrive(*row))  # type: ignore[misc]
        for source in range(ranks)
        if source != rank
    ]
    run_all([*engines, *(Actor(claims, dice.randint(1, 4), Steps(played)) for _ in range(workers))], seed)
    assert torch.equal(played.written, torch.ones_like(played.written))
    assert torch.equal(played.out, world.truth)


def collect(gpu: Gpu, launched: Launched) -> None:
    """What idle warps put into the last output: all that is there, the own shard from where X points."""
    v, ranks = launched.values, gpu.link.size
    rank, base = gpu.link.rank, gpu.memory.bases[gpu.memory.rank]
    slots = {base + gpu.link.slot_offset(number): number for number in range(4)}
    shape = (v["pieces"], ranks, v["shard_bytes"] // 2)
    slot = gpu.link.slot_view(slots[v["A"]], shape, torch.bfloat16)
    out = at(v["gathered"], *shape)
    out.copy_(slot)
    if v["X"] not in slots:
        out[:, rank] = at(v["X"], shape[0], shape[2])


def play(gpu: Gpu, launched: Launched) -> None:
    if launched.name != "gather_blocks":
        return
    emulate(gpu, launched)
    if launched.args[1]:
        collect(gpu, launched)


def small(*shape: int) -> Tensor:
    return torch.randint(-2, 3, shape).to(torch.bfloat16)


class Call:
    """A call on a GPU where all has arrived, with what it should return. lies: "apart" leaves gaps between what goes to each rank,
    "strided" within."""

    def __init__(
        self,
        gpu: Gpu,
        outers: tuple[int, ...],
        rows: int,
        inner: int,
        free: tuple[int, ...],
        *,
        lies: str = "together",
        stored: str = "plain",
        bias: bool = False,
        returned: bool = False,
    ) -> None:
        ranks, rank = gpu.link.size, gpu.link.rank
        self.gpu, self.site = gpu, Site(5)
        sent = [[small(ranks, rows, outer, inner) for outer in outers] for _ in range(ranks)]
        if lies == "apart":
            own = [torch.cat([x, x], 1)[:, :rows] for x in sent[rank]]
        elif lies == "strided":
            own = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in sent[rank]]
        else:
            own = sent[rank]
        self.own, self.whole = own, received(sent, rank)
        self.others = [small(self.whole.shape[1], n) for n in free]
        if stored == "transposed":
            self.others = [other.t().contiguous().t() for other in self.others]
        self.biases = [small(n) if bias else None for n in free]
        products = [self.whole.float() @ other.float() for other in self.others]
        self.wanted = [
            (p + (0 if b is None else b.float())).to(torch.bfloat16) for p, b in zip(products, self.biases, strict=True)
        ]
        self.wanted += [self.whole] if returned else []
        name = f"g/{outers}{rows}{inner}{free}{lies}{stored}"
        self.plan = Plan(KIND, name, "nvlink", BF16, uses=(USE,) * len(free), return_gathered=returned)

    def run(self) -> list[Tensor]:
        template = find_template(KIND, "nvlink")
        assert template is not None
        args = self.own, self.others, self.biases
        assert template.scratch_bytes(self.plan, self.gpu.link.size, *args) == self.whole.nbytes
        channel = self.gpu.link.open(self.site)
        slot = channel.view(tuple(self.whole.shape), torch.bfloat16)
        slot.copy_(self.whole)
        columns = sum(x.shape[2] for x in self.own)
        slot.view(-1, columns, self.gpu.link.size, self.own[0].shape[3])[:, :, self.gpu.link.rank] = torch.nan
        outputs: list[Tensor] = template.run(channel, self.plan, *args)
        return outputs


def gpu_with(patch: pytest.MonkeyPatch, rank: int, ranks: int) -> Gpu:
    gpu = gpu_of(patch, rank, ranks)
    gpu.driver.on_launch = lambda launched: play(gpu, launched)
    return gpu


@pytest.mark.parametrize("returned", [False, True])
@pytest.mark.parametrize("stored", ["plain", "transposed"])
@pytest.mark.parametrize("lies", ["together", "apart", "strided"])
@pytest.mark.parametrize("outers", [(1,), (3,), (1, 1, 1), (1, 2)], ids=str)
def test_results(
    monkeypatch: pytest.MonkeyPatch, outers: tuple[int, ...], lies: str, stored: str, returned: bool
) -> None:
    for rank, ranks, rows, inner, free in ((1, 4, 33, 72, (264,)), (0, 2, 128, 64, (72, 136)), (2, 3, 5, 8, (8,))):
        gpu = gpu_with(monkeypatch, rank, ranks)
        call = Call(gpu, outers, rows, inner, free, lies=lies, stored=stored, bias=ranks == 2, returned=returned)
        for _ in range(3):
            outputs = call.run()
            assert len(outputs) == len(call.wanted)
            assert all(torch.equal(a, b) for a, b in zip(outputs, call.wanted, strict=True))
        launched = [launch for launch in gpu.driver.launched if launch.name == "gather_blocks"][-len(free) :]
        assert [launch.values["ack"] for launch in launched] == [-1] * (len(free) - 1) + [ACK]
        assert [launch.args[1] for launch in launched] == [returned] + [False] * (len(free) - 1)
        assert (launched[0].values["X"] == launched[0].values["A"]) == (len(outers) > 1)


def test_what_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """To each peer its own part, the previous rank's first, and one flag behind all of it: what is short, behind the last copy."""
    gpu = gpu_with(monkeypatch, 1, 4)
    call = Call(gpu, (1, 1), 16, 64, (72,))
    call.run()
    copies = [step for step in gpu.driver.issued if step["kind"] in (stream.COPY_ROWS, stream.WRITE)]
    side = [step for step in copies if step["stream"] == SIDE]
    assert [step["kind"] for step in side] == [stream.COPY_ROWS] * 6 + [stream.WRITE] * 4
    assert side.pop()["dst"] == gpu.memory.bases[1] + (FLAGS + 1) * 4, "for itself, behind all copies"
    part, line = 16 * 64 * 2, 4 * 64 * 2
    slot = gpu.link.slot_offset(1)
    for first, peer in enumerate((0, 3, 2)):
        q, k, flag = *side[2 * first : 2 * first + 2], side[6 + first]
        assert flag["dst"] == gpu.memory.bases[peer] + (FLAGS + gpu.link.rank) * 4
        assert [step["src"] for step in (q, k)] == [x.data_ptr() + peer * part for x in call.own]
        assert [step["dst"] - gpu.memory.bases[peer] - slot for step in (q, k)] == [128, line + 128]
        assert {(s["rows"], s["bytes"], s["src_pitch"], s["dst_pitch"]) for s in (q, k)} == {(16, 128, 128, 2 * line)}
        assert flag["value"] == 1
    own = [step for step in copies if step["stream"] == MAIN]
    assert [step["src"] for step in own] == [x.data_ptr() + part for x in call.own]
    # Captured, it opens first and acknowledges last.
    gpu.driver.launched.clear()
    gpu.torch.capturing = True
    outputs = call.run()
    assert torch.equal(outputs[0], call.wanted[0])
    assert [launch.name for launch in gpu.driver.launched] == ["service", "gather_blocks"]
    assert gpu.driver.launched[-1].values["ack"] == ACK and gpu.link.pinned == [call.site.recipe]


@pytest.mark.parametrize("outers", [(1,), (2,), (1, 1)], ids=str)
def test_an_operand_in_chunks(monkeypatch: pytest.MonkeyPatch, outers: tuple[int, ...]) -> None:
    """Chunk by chunk to all peers; the flags of the last one are those that whoever waits for everything waits for."""
    monkeypatch.setattr(all_to_all_gemm, "chunk_count", lambda *_: (3, 0.0))
    gpu = gpu_with(monkeypatch, 1, 4)
    call = Call(gpu, outers, 128 * 5 + 40, 64, (264,), returned=True)
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(call.run(), call.wanted, strict=True))
    gpu.driver.issued.clear()
    call.run()
    side = [step for step in gpu.driver.issued if step["stream"] == SIDE]
    flags = []
    for step in side:
        if step["kind"] == stream.WRITE:
            peer = next(peer for peer in range(4) if 0 <= step["dst"] - gpu.memory.bases[peer] < 1 << 32)
            flags.append((peer, (step["dst"] - gpu.memory.bases[peer]) // 4 - FLAGS))  # the third call has slot 1
    own = (1, 1)  # behind all copies
    assert flags == [*((peer, 8 * chunk + 1) for chunk in (2, 1, 0) for peer in (0, 3, 2)), own]
    copies = [step for step in side if step["kind"] == stream.COPY_ROWS]
    assert len(copies) == 9 * copies_of([(outer, 64) for outer in outers])
    assert sum(step["rows"] * step["bytes"] for step in copies) == 3 * sum(x[0].nbytes for x in call.own)


def test_operands_of_one_exchange_are_read_where_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = gpu_with(monkeypatch, 2, 4)
    for lies in ("together", "apart"):
        call = Call(gpu, (2,), 16, 64, (72,), lies=lies)
        call.run()
        (x,) = call.own
        assert gpu.driver.launched[-1].values["X"] == x.data_ptr() + 2 * x.stride(0) * 2
    copied = Call(gpu, (2,), 16, 64, (72,), lies="strided")
    copied.run()
    x = copied.own[0]
    address = gpu.driver.launched[-1].values["X"]
    assert not x.data_ptr() <= address < x.data_ptr() + x.nbytes
    odd = Call(gpu, (1,), 16, 64, (72,))
    odd.own = [torch.cat([torch.zeros(1, dtype=torch.bfloat16), odd.own[0].flatten()])[1:].view(4, 16, 1, 64)]
    assert odd.own[0].data_ptr() % 16
    assert torch.equal(odd.run()[0], odd.wanted[0])


def test_a_matmul_that_no_kernel_takes_follows_on_what_was_received(monkeypatch: pytest.MonkeyPatch) -> None:
    for returned in (False, True):
        gpu = gpu_with(monkeypatch, 1, 3)
        call = Call(gpu, (1,), 16, 64, (72, 71), returned=returned)
        outputs = call.run()
        assert all(torch.equal(a, b) for a, b in zip(outputs, call.wanted, strict=True))
        assert len(gpu.driver.launched) == 1 and gpu.driver.launched[0].values["ack"] == -1


PROBLEM = FusionProblem(
    KIND,
    4,
    True,
    "cuda",
    BF16,
    3 * 128 * 4 * 64 * 2,
    (Gemm(128, 72, 3 * 4 * 64),),
    gemm_dtypes=(BF16,),
    pieces=3 * 128,
    exchanges=3,
    panels_of=((1, 64),) * 3,
)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, None),
        ({"panels_of": ((1, 128), (1, 32), (1, 32))}, "different widths"),
        ({"gemms": (Gemm(128, 71, 3 * 4 * 64),)}, "multiples of 16 bytes"),
        ({"dtype": "float32"}, "float32"),
        ({"group_size": 9}, "9"),
        ({"intra_host": False}, "several hosts"),
    ],
)
def test_supports(change: dict[str, Any], said: str | None) -> None:
    template = find_template(KIND, "nvlink")
    assert template is not None
    reason = template.supports(replace(PROBLEM, **change), Plan(KIND, "", "", BF16, uses=(USE,)))
    assert reason is None if said is None else said in str(reason)


def test_sizes_that_are_not_served_run_the_original_ops() -> None:
    """Symbolic sizes may turn out so."""
    template = find_template(KIND, "nvlink")
    assert template is not None
    plan = Plan(KIND, "", "nvlink", BF16, uses=(USE,))

    def need(*inners: int, columns: int = 72) -> int:
        inputs = [small(4, 16, 1, inner) for inner in inners]
        return template.scratch_bytes(plan, 4, inputs, [small(4 * sum(inners), columns)], [None])

    assert need(64) == 16 * 4 * 64 * 2 and need(64, 64) == 2 * need(64)
    assert need(64, 32) == need(64, columns=71) == need(36) == -1


def test_large_operands_travel_in_chunks_and_small_ones_whole() -> None:
    """A copy and its flag take the copy engine as long as 2.6 MiB of data."""

    def chosen(tokens: int, ranks: int, count: int) -> int:
        shape = ((1, 4096 // ranks),) * count
        return chunk_count(tokens // ranks, 4096, count * 4096, shape, ranks, USE)[0]

    assert chosen(2048, 4, 1) == chosen(2048, 2, 3) == 1
    assert min(chosen(32768, 4, 1), chosen(65536, 4, 3), chosen(16384, 2, 3)) >= 3


def test_the_time_of_a_matmul_of_panels() -> None:
    """It hides all but the first chunk of a transport that is shorter than it, and itself in one that is longer."""
    whole, cut = (panels_us(1024, 100.0, 4, 96.0, 1, chunks) for chunks in (1, 4))
    gemm = 8 * 100.0
    assert gemm < cut < whole < gemm + 10 + 24 + 96 * 3.1 + 20
    assert cut < gemm + (10 + 24 + 24 * 3.1) + 20
    long = panels_us(132, 10.0, 4, 1000.0, 1, 1)
    assert 3100 < long < 3100 + 60


# ---- what is returned, by the device code on the host ----------------------------------------------------------------


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    tile = host_code.kernel_text("tile.h")
    names = ("copy_words", "copy_rows", "collect_wait", "collect_shards")
    parts = [
        host_code.part(tile, "enum { TSK_COPIED"),
        *(host_code.part(tile, f"TSL void tsk_{name}") for name in names),
    ]
    runner = (host_code.HERE / "host_collect.h").read_text()
    return host_code.build(tmp_path_factory.mktemp("collect"), *parts, runner=runner)


@pytest.mark.parametrize("placed", [False, True])
@pytest.mark.parametrize(
    ("ranks", "ctas", "pieces", "words"),
    [
        (2, 2, 1, 1),
        (2, 2, 1, 5000),  # all share it, more than once around
        (3, 2, 37, 3),  # a warp for each
        (2, 1, 5, 700),
        (4, 3, 40, 256),
        (8, 2, 9, 17),
    ],
)
def test_the_device_code_returns_what_was_received(
    library: ctypes.CDLL, ranks: int, ctas: int, pieces: int, words: int, placed: bool
) -> None:
    """placed: the own shard is in the slot, too."""
    whole = [torch.randint(0, 1 << 30, (pieces, ranks, 4 * words), dtype=torch.int32) for _ in range(ranks)]
    slots = [each.clone() for each in whole]
    shards = [each[:, rank].contiguous() for rank, each in enumerate(whole)]
    if placed:
        shards = slots
    else:
        for rank, slot in enumerate(slots):
            slot[:, rank] = -1
    outs = [torch.full_like(each, -1) for each in whole]
    group = host_code.Group.of(ranks)
    flags = [torch.full((8,), 5, dtype=torch.int32) for _ in range(ranks)]
    contexts = group.contexts(slots, flags)
    lists = [host_code.pointers(each) for each in (contexts, outs, shards)]
    sizes = 7, ranks, ctas, pieces, ctypes.c_int64(16 * words), 3  # and 2 of the cell
    host_code.call(library.collect, group, *sizes, *lists)
    assert all(torch.equal(out, each) for out, each in zip(outs, whole, strict=True))
