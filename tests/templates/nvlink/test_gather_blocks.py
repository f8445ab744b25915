"""Uses of a gather beyond gathered rows on the left: tables, sizes, and what is launched; the kernel itself is played in Python."""

from __future__ import annotations

import ctypes
import random
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tscompile.templates.nvlink.registered  # noqa: F401  (registers the templates)
from tests.cases import GATHER_USES
from tscompile.fx_passes.all_gather_matmul import gathered_operand
from tscompile.problem import GatherUse, Plan
from tscompile.templates import find_template
from tscompile.templates.nvlink import all_gather_gemm, gather_blocks, tiles
from tscompile.templates.nvlink.channel import ACK
from tscompile.templates.nvlink.gather_blocks import blocks_of
from tscompile.templates.nvlink.kernels.gather_blocks import gather_blocks_kernel
from tscompile.templates.nvlink.kernels.gemm import BlocksConfig
from tscompile.templates.nvlink.tiles import block_tiles, contraction_tiles

from .blocks_protocol import BlockGatherer, BlockWorld, Form
from .fake_gpu import Gpu
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
    if form.contracts:
        m, n = (width, free) if form.gathered_left else (free, width)
        return contraction_tiles(rank, ranks, pieces, m, n, form.tile_n)
    return block_tiles(rank, ranks, pieces, inner, free, form.gathered_left, form.tile_n), []


@QUICK
@given(problem=problems(), workers=st.integers(1, 5), seed=SEEDS)
def test_whatever_arrives_when(problem: tuple[Form, int, int, int, int, int], workers: int, seed: int) -> None:
    """Each element of the result is stored once, from blocks that are there; and no order of events holds it up."""
    form, ranks, *sizes = problem
    rank = seed % ranks
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "TILE_M", 4)
        patch.setattr(tiles, "_BAND", 3)
        rows, blocks = tables(form, rank, ranks, *sizes)
    assert len(set(rows)) == len(rows)
    world = BlockWorld(form, rank, ranks, *sizes, blocks, seed)
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
    masks = [row[6] for row in blocks or rows]
    order = list(dict.fromkeys(mask for mask in masks if mask))
    assert order == [1 << (rank + step) % ranks for step in range(1, ranks)]
    assert all(bool(row[3]) == (row[6] == 0) for row in blocks or rows)
    if blocks:
        assert sorted(row[5] for row in blocks) == list(range(sizes[0] * ranks))
        assert all(row[6] == 0 for row in rows)


def emulate(config: BlocksConfig, arguments: dict[str, Any]) -> None:
    """The kernel, with everything arrived."""
    given_rows = (ctypes.c_int32 * (8 * 4096)).from_address(arguments["table"])
    words = torch.frombuffer(given_rows, dtype=torch.int32).view(-1, 8)
    count = arguments["tiles"]
    gathered, local = config.k_first
    B = arguments["B"]
    k_blocks = B.shape[0 if local else 1]
    rows = [tuple(row) for row in words[: count + (k_blocks if config.contracts else 0)].tolist()]
    X, A = arguments["X"], arguments["A"]
    blocks, inner, width = A.shape if gathered == config.contracts else (A.shape[1], A.shape[2], A.shape[0])
    span, free = width if config.contracts else blocks * inner, B.shape[2 if local else 0]
    shape = (span, free) if config.gathered_left else (free, span)
    memory = (ctypes.c_uint16 * (span * free)).from_address(arguments["C"])
    result = torch.frombuffer(memory, dtype=torch.bfloat16).view(shape)
    form = Form(config.gathered_left, config.contracts, config.k_first, config.tile_m, config.tile_n, config.tile_k)
    played = BlockGatherer(form, X.float(), A.float(), B.float(), rows[count:], torch.full(shape, torch.nan))
    played.arrived = set(range(8))
    for row in rows[:count]:
        assert Steps(played)(row)
    assert torch.equal(played.written, torch.ones_like(played.written))
    if config.bias:
        held = (ctypes.c_uint16 * shape[1]).from_address(arguments["V"])
        played.out += torch.frombuffer(held, dtype=torch.bfloat16).float()
    result.copy_(played.out)


@lru_cache
def parameters_of(config: BlocksConfig) -> list[Any]:
    function = gather_blocks_kernel(config, True)
    return [function.buffer_map.get(parameter, parameter) for parameter in function.params]


class Played:
    """Stands for `jit.kernel`."""

    def __init__(self) -> None:
        self.calls: list[tuple[BlocksConfig, dict[str, Any]]] = []

    def __call__(self, build: Any, config: BlocksConfig, flag: bool) -> Any:
        assert build is gather_blocks_kernel
        parameters = parameters_of(config)

        def launch(*args: Any) -> None:
            arguments = {parameter.name: value for parameter, value in zip(parameters, args, strict=True)}
            for parameter, value in zip(parameters, args, strict=True):
                assert isinstance(value, torch.Tensor) == hasattr(parameter, "shape")
                if isinstance(value, torch.Tensor):
                    assert value.dim() == 3 and value.is_contiguous() and value.data_ptr() % 16 == 0
                    assert all(stride % 8 == 0 for stride in value.stride()[:2])  # TMA steps by multiples of 16 bytes
            self.calls.append((config, arguments))
            emulate(config, arguments)

        return launch


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
    channel = gpu.link.open(5)
    slot = channel.view((p, ranks, q), torch.bfloat16)
    slot.copy_(whole)
    slot[:, rank] = torch.nan  # nobody writes it
    return template.run(channel, plan, shard, others, biases), wanted


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Played:
    found = Played()
    monkeypatch.setattr(gather_blocks, "kernel", found)
    monkeypatch.setattr(all_gather_gemm, "kernel", None)
    return found


@pytest.mark.parametrize("stored", ["plain", "transposed", "strided"])
@pytest.mark.parametrize("use", USES, ids=str)
def test_every_use_in_every_layout(monkeypatch: pytest.MonkeyPatch, played: Played, use, stored: str) -> None:
    for rank, ranks, pieces, inner, width, free in (
        (1, 4, 1, 128, 64, 72),
        (0, 2, 3, 40, 136, 264),
        (2, 3, 2, 72, 8, 8),
    ):
        gpu = Gpu(monkeypatch, rank, ranks)
        outputs, wanted = run(gpu, [use], pieces, inner, width, free, stored, bias=ranks == 2)
        assert all(torch.equal(a, b) for a, b in zip(outputs, wanted, strict=True))
        config, arguments = played.calls[-1]
        assert (config.gathered_left, config.contracts) == (use[0] == "lhs", GatherUse(*use, BF16).contracts_ranks)
        assert arguments["ack"] == ACK and arguments["pieces"] == (pieces if use[2] == "rows" else pieces * width)


def test_ragged_rows_of_blocks(monkeypatch: pytest.MonkeyPatch, played: Played) -> None:
    """Rows of a rank may be any number where they are rows of both operands: nothing of the next rank's is taken in."""
    gpu = Gpu(monkeypatch, 1, 4)
    for use in (("lhs", True, "rows"), ("rhs", False, "rows")):
        for stored in ("plain", "transposed"):
            outputs, wanted = run(gpu, [use], 2, 37, 64, 72, stored, bias=False)
            assert torch.equal(outputs[0], wanted[0])


def test_any_mix_of_uses(monkeypatch: pytest.MonkeyPatch, played: Played) -> None:
    """What needs all shards for its first tile comes last, and the last kernel acknowledges the slot."""
    gpu = Gpu(monkeypatch, 1, 4)
    uses = [("lhs", True, "rows"), ("rhs", True, "rows"), ("rhs", False, "rows")]
    outputs, wanted = run(gpu, uses, 2, 40, 64, 72, "plain", bias=True)
    assert all(torch.equal(a, b) for a, b in zip(outputs, wanted, strict=True))
    assert [config.contracts for config, _ in played.calls] == [False, True, True]
    assert [arguments["ack"] for _, arguments in played.calls] == [-1, -1, ACK]


def test_a_use_that_no_kernel_takes_follows_on_the_slot(monkeypatch: pytest.MonkeyPatch, played: Played) -> None:
    gpu = Gpu(monkeypatch, 1, 4)
    uses = [("lhs", True, "rows"), ("rhs", True, "rows")]
    outputs, wanted = run(gpu, uses, 1, 37, 64, 72, "plain", bias=False)  # 37 columns of a rank are not aligned
    assert all(torch.equal(a, b) for a, b in zip(outputs, wanted, strict=True))
    ((config, arguments),) = played.calls
    assert config.contracts and arguments["ack"] == -1


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
