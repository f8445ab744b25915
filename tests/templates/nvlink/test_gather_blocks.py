"""Uses of a gather beyond gathered rows on the left: tables, sizes, and what is launched; the kernel itself is played in Python."""

from __future__ import annotations

import ctypes
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cases import GATHER_USES
from tscompile.fx_passes.all_gather_matmul import gathered_operand
from tscompile.problem import GatherUse, Plan
from tscompile.templates import find_template
from tscompile.templates.nvlink import gather_blocks, gather_rows, tiles
from tscompile.templates.nvlink.channel import ACK, Site
from tscompile.templates.nvlink.gather_blocks import blocks_of
from tscompile.templates.nvlink.kernels.gather_blocks import blocked
from tscompile.templates.nvlink.tiles import block_tiles, contraction_tiles

from .blocks_protocol import BlockGatherer, BlockWorld, Form
from .fake_gpu import Gpu, Launched
from .protocol import Actor, Claims, run_all

BF16 = "bfloat16"
QUICK = settings(deadline=None, max_examples=300)
SEEDS = st.integers(0, 10**6)
USES = [use for use in GATHER_USES if use != ("lhs", False, "rows")]


@st.composite
def problems(draw: st.DrawFn) -> tuple[Form, int, int, int, int, int]:
    """form, ranks, pieces, inner, width, free"""
    form = Form(
        draw(st.booleans()),
        draw(st.booleans()),
        (draw(st.booleans()), draw(st.booleans())),
        4,
        draw(st.integers(3, 9)),
        3,
    )
    return form, draw(st.integers(2, 8)), *(draw(st.integers(1, top)) for top in (3, 11, 13, 13))


def tables(form: Form, rank: int, ranks: int, pieces: int, inner: int, width: int, free: int) -> tuple[Any, Any]:
    """Rows of the tiles, and of the walks over blocks that follow them."""
    if form.contracts:
        m, n = (width, free) if form.gathered_left else (free, width)
        rows = contraction_tiles(rank, ranks, pieces, m, n, form.tile_n)
        walks = ranks * ranks * pieces
        return rows[:-walks], rows[-walks:]
    return block_tiles(rank, ranks, pieces, inner, free, form.gathered_left, form.tile_n), []


@QUICK
@given(problem=problems(), workers=st.integers(1, 5), seed=SEEDS)
def test_whatever_arrives_when(problem: tuple[Form, int, int, int, int, int], workers: int, seed: int) -> None:
    """Each element of the result is stored once, from blocks that are there; and no order of events holds it up."""
    form, ranks, *sizes = problem
    rank = seed % ranks
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "TILE_M", 4)
        patch.setattr(tiles, "BAND", 3)
        rows, blocks = tables(form, rank, ranks, *sizes)
    assert len(set(rows)) == len(rows)
    world = BlockWorld(form, rank, ranks, *sizes, [*rows, *blocks], seed)
    claims, dice = Claims(rows), random.Random(seed)
    sources = [source for source in range(ranks) if source != rank]
    dice.shuffle(sources)
    engine = Actor(Claims([(source,) for source in sources]), 1, lambda row: world.arrive(row[0]) is None)  # type: ignore[misc]
    turns = [Actor(claims, dice.randint(1, 4), Steps(world.gatherer)) for _ in range(workers)]
    run_all([engine, *turns], seed)
    assert torch.equal(world.gatherer.written, torch.ones_like(world.gatherer.written))
    assert torch.equal(world.gatherer.out, world.truth)


class Steps:
    """All blocks of a tile that are there."""

    def __init__(self, gatherer: BlockGatherer) -> None:
        self._gatherer = gatherer

    def __call__(self, entry: Any) -> bool:
        while True:
            before = self._gatherer.held.get(entry, (0, None))[0]
            if self._gatherer.compute(entry):
                return True
            if self._gatherer.held.get(entry, (0, None))[0] == before:
                return False


@QUICK
@given(problem=problems(), seed=SEEDS)
def test_what_a_table_waits_for(problem: tuple[Form, int, int, int, int, int], seed: int) -> None:
    """Ranks are waited for in the order of their arrival, and all of them: two slots suffice only then."""
    form, ranks, *sizes = problem
    rank = seed % ranks
    rows, blocks = tables(form, rank, ranks, *sizes)
    arrival = [1 << (rank + step) % ranks for step in range(1, ranks)]
    assert all(bool(row[3]) == (row[6] == 0) for row in blocks or rows)
    if not blocks:
        assert list(dict.fromkeys(row[6] for row in rows if row[6])) == arrival
        return
    assert all(row[6] == 0 for row in rows)
    starts = [row[4] for row in rows]
    count = sizes[0] * ranks
    for first in range(0, len(blocks), count):
        walk = blocks[first : first + count]
        assert sorted(row[5] for row in walk) == list(range(count))
        sources = [row[5] % ranks for row in walk]
        assert sources == [(first // count + step) % ranks for step in range(ranks) for _ in range(sizes[0])]
    # The walks that begin with what is there come first.
    used = list(dict.fromkeys((start - len(rows)) // count for start in starts))
    assert [(walk - rank) % ranks for walk in used] == sorted((walk - rank) % ranks for walk in used)


@QUICK
@given(problem=problems())
def test_every_rank_sums_a_tile_in_the_same_order(problem: tuple[Form, int, int, int, int, int]) -> None:
    """Ranks that hold the same operands get the same bits, as they do without this backend."""
    form, ranks, *sizes = problem
    form = replace(form, contracts=True)
    walks = []
    for rank in range(ranks):
        rows, blocks = tables(form, rank, ranks, *sizes)
        count = sizes[0] * ranks
        at = {row[:2]: row[4] - len(rows) for row in rows}
        walks.append({tile: [row[5] for row in blocks[first : first + count]] for tile, first in at.items()})
    assert all(walk == walks[0] for walk in walks)


def at(address: int, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Memory of this process as a tensor."""
    nbytes = torch.Size(shape).numel() * dtype.itemsize
    return torch.frombuffer((ctypes.c_uint8 * nbytes).from_address(address), dtype=dtype).view(shape)


def emulate(gpu: Gpu, launched: Launched) -> None:
    """The kernel, with everything arrived."""
    if launched.name != "gather_blocks":
        return
    config, _ = launched.args
    v = launched.values
    sizes = v["inner"], v["width"]
    gathered, local = config.k_first
    slots = {gpu.memory.bases[gpu.memory.rank] + gpu.link.slot_offset(slot): slot for slot in range(4)}
    A = gpu.link.slot_view(slots[v["A"]], blocked(gathered, config.contracts, v["blocks"], *sizes), torch.bfloat16)
    own = A if v["X"] in slots else None  # the own blocks are in the slot
    X = own if own is not None else at(v["X"], *blocked(gathered, config.contracts, v["own_blocks"], *sizes))
    B = at(v["B"], *blocked(local, True, v["k_blocks"], v["k_inner"], v["free"]))
    for operand in (A, X, B):  # TMA steps by multiples of 16 bytes
        assert operand.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in operand.stride()[:2])
    span = v["width"] if config.contracts else v["blocks"] * v["inner"]
    shape = (span, v["free"]) if config.gathered_left else (v["free"], span)
    tiles = at(v["table"], v["tiles"], 8, dtype=torch.int32)
    rows = int(tiles[:, 4].max()) + v["blocks"] if config.contracts else v["tiles"]  # the last walk that a tile takes
    table = [tuple(row) for row in at(v["table"], rows, 8, dtype=torch.int32).tolist()]
    form = Form(config.gathered_left, config.contracts, config.k_first, config.tile_m, config.tile_n, config.tile_k)
    played = BlockGatherer(form, X.float(), A.float(), B.float(), table, torch.full(shape, torch.nan))
    played.arrived = set(range(32))
    for row in table[: v["tiles"]]:
        assert Steps(played)(row)
    assert torch.equal(played.written, torch.ones_like(played.written))
    if config.bias:
        played.out += at(v["V"], shape[1]).float()
    at(v["C"], *shape).copy_(played.out)


def gpu_of(patch: pytest.MonkeyPatch, rank: int, ranks: int) -> Gpu:
    gpu = Gpu(patch, rank, ranks)
    gpu.driver.on_launch = lambda launched: emulate(gpu, launched)
    patch.setattr(gather_blocks, "kernel", gpu.driver.kernel)
    patch.setattr(gather_rows, "kernel", None)
    return gpu


def run(
    gpu: Gpu, uses: list[tuple[str, bool, str]], pieces: int, inner: int, width: int, free: int, stored: str, bias: bool
):
    """Run a gather of these uses; its outputs, and what they should be."""
    ranks, rank = gpu.link.size, gpu.link.rank
    in_rows = uses[0][2] == "rows"
    p, q = (pieces, inner * width) if in_rows else (width * pieces, inner)
    whole = torch.randint(-2, 3, (p, ranks, q)).to(torch.bfloat16)
    others, wanted, biases = [], [], []
    for side, transposed, axis in uses:
        use = GatherUse(side, transposed, axis, BF16)  # type: ignore[arg-type]
        matrix = whole.reshape(-1, width) if in_rows else whole.reshape(width, -1)
        operand = matrix.t() if transposed else matrix
        shape = (operand.shape[1], free) if side == "lhs" else (free, operand.shape[0])
        other = torch.randint(-2, 3, shape).to(torch.bfloat16)
        if stored == "transposed":
            other = other.t().contiguous().t()
        elif stored == "strided":
            other = torch.cat([other, other], 1)[:, : shape[1]]
        assert torch.equal(gathered_operand(use, whole.reshape(p, -1), other), operand)
        left, right = (operand, other) if side == "lhs" else (other, operand)
        product = left.float() @ right.float()
        biases.append(torch.randint(-2, 3, (product.shape[1],)).to(torch.bfloat16) if bias else None)
        wanted.append((product + (biases[-1].float() if bias else 0)).to(torch.bfloat16))
        others.append(other)
    plan_uses = tuple(GatherUse(*use, BF16) for use in uses)  # type: ignore[arg-type]
    plan = Plan("all_gather_matmul", f"g/{uses}{pieces}{inner}{width}{free}", "nvlink", BF16, uses=plan_uses)
    template = find_template("all_gather_matmul", "nvlink")
    assert template is not None
    shard = whole[:, rank].contiguous()
    need = template.scratch_bytes(plan, ranks, shard, others, biases)
    assert need == whole.nbytes
    channel = gpu.link.open(Site(5))
    slot = channel.view((p, ranks, q), torch.bfloat16)
    slot.copy_(whole)
    slot[:, rank] = torch.nan  # nobody writes it
    return template.run(channel, plan, shard, others, biases), wanted


@pytest.mark.parametrize("stored", ["plain", "transposed", "strided"])
@pytest.mark.parametrize("use", USES, ids=str)
def test_every_use_in_every_layout(monkeypatch: pytest.MonkeyPatch, use, stored: str) -> None:
    for rank, ranks, pieces, inner, width, free in (
        (1, 4, 1, 128, 64, 72),
        (0, 2, 3, 40, 136, 264),
        (2, 3, 2, 72, 8, 8),
    ):
        gpu = gpu_of(monkeypatch, rank, ranks)
        outputs, wanted = run(gpu, [use], pieces, inner, width, free, stored, bias=ranks == 2)
        assert all(torch.equal(a, b) for a, b in zip(outputs, wanted, strict=True))
        launched = gpu.driver.launched[-1]
        config, _ = launched.args
        assert (config.gathered_left, config.contracts) == (use[0] == "lhs", GatherUse(*use, BF16).contracts_ranks)
        assert launched.values["ack"] == ACK


def test_ragged_rows_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a rank may be any number where they are rows of both operands: nothing of the next rank's is taken in."""
    gpu = gpu_of(monkeypatch, 1, 4)
    for use in (("lhs", True, "rows"), ("rhs", False, "rows")):
        for stored in ("plain", "transposed"):
            outputs, wanted = run(gpu, [use], 2, 37, 64, 72, stored, bias=False)
            assert torch.equal(outputs[0], wanted[0])


def test_any_mix_of_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    """What needs all shards for its first tile comes last, and the last kernel acknowledges the slot."""
    gpu = gpu_of(monkeypatch, 1, 4)
    uses = [("lhs", True, "rows"), ("rhs", True, "rows"), ("rhs", False, "rows")]
    outputs, wanted = run(gpu, uses, 2, 40, 64, 72, "plain", bias=True)
    assert all(torch.equal(a, b) for a, b in zip(outputs, wanted, strict=True))
    launched = gpu.driver.launched
    assert [launch.args[0].contracts for launch in launched] == [False, True, True]
    assert [launch.values["ack"] for launch in launched] == [-1, -1, ACK]


def test_a_use_that_no_kernel_takes_follows_on_the_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = gpu_of(monkeypatch, 1, 4)
    uses = [("lhs", True, "rows"), ("rhs", True, "rows")]
    outputs, wanted = run(gpu, uses, 1, 37, 64, 72, "plain", bias=False)  # 37 columns of a rank are not aligned
    assert all(torch.equal(a, b) for a, b in zip(outputs, wanted, strict=True))
    (launched,) = gpu.driver.launched
    assert launched.args[0].contracts and launched.values["ack"] == -1


@pytest.mark.parametrize(
    ("use", "shard", "other", "served"),
    [
        (("rhs", False, "rows"), (2, 37 * 64), (72, 8 * 37), True),
        (("rhs", False, "rows"), (2, 37 * 64), (71, 8 * 37), False),  # neither columns of 71 nor blocks of 37
        (("rhs", False, "rows"), (2, 40 * 60), (72, 8 * 40), False),  # gathered rows of 60
        (("lhs", True, "rows"), (2, 40 * 64), (8 * 40, 60), False),  # rows of the result of 60
        (("rhs", True, "rows"), (1, 37 * 64), (72, 64), False),  # columns of a rank
        (("rhs", True, "rows"), (1, 40 * 64), (71, 64), True),
        (("rhs", True, "rows"), (1, 40 * 60), (72, 60), False),
        (("lhs", False, "cols"), (64, 40), (4 * 40, 72), True),
        (("lhs", False, "cols"), (64, 36), (4 * 36, 72), False),
        (("lhs", True, "cols"), (64 * 3, 40), (64, 72), True),
        (("rhs", False, "cols"), (64, 40), (72, 64), True),
        (("rhs", False, "cols"), (60, 40), (72, 60), True),
        (("rhs", False, "cols"), (60, 40), (71, 60), False),  # the local operand has no aligned layout
        (("rhs", False, "rows"), (2, 0), (72, 0), False),
    ],
)
def test_sizes_that_are_served(use, shard: tuple[int, int], other: tuple[int, int], served: bool) -> None:
    asked = GatherUse(*use, BF16)
    local = torch.empty(other)
    assert (blocks_of(asked, BF16, 4, shard, local) is not None) == served
    assert blocks_of(replace(asked, dtype="float16"), BF16, 4, shard, local) is None
