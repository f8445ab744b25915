"""What the templates over NVLink issue to the driver; on the CPU, with the kernels' real parameters and a driver that only notes."""

from __future__ import annotations

import ctypes
import struct
from typing import Any

import pytest
import torch

from tscompile.nvshmem import stream
from tscompile.nvshmem.device import CONTROL_BYTES
from tscompile.problem import GatherUse, Plan
from tscompile.templates import find_template
from tscompile.templates.nvlink import gather_blocks, gather_rows, gemm_reduce, widths
from tscompile.templates.nvlink.channel import ACK, FLAGS, JOIN, SIDE, Site
from tscompile.templates.nvlink.sums import SumPlan, push_plans

from .fake_gpu import SLOT_BYTES, Gpu, Launched, large_forms

BF16 = "bfloat16"
ROWS, GRADIENT = GatherUse("lhs", False, "rows", BF16), GatherUse("lhs", True, "rows", BF16)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    made = Gpu(monkeypatch)
    for module in (gather_blocks, gather_rows, gemm_reduce):
        monkeypatch.setattr(module, "kernel", made.driver.kernel)
    return made


def run(gpu: Gpu, site: Site, plan: Plan, *args: Any) -> list[torch.Tensor]:
    template = find_template(plan.kind, "nvlink")
    assert template is not None
    outputs: list[torch.Tensor] = template.run(gpu.link.open(site), plan, *args)
    return outputs


@pytest.fixture
def pulls(monkeypatch: pytest.MonkeyPatch) -> None:
    large_forms(monkeypatch)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).to(torch.bfloat16)


def fused(gpu: Gpu) -> list[Launched]:
    return [launched for launched in gpu.driver.launched if launched.name != "service"]


def test_what_a_gather_launches(gpu: Gpu) -> None:
    shard = random(2, 16 * 64)  # two pieces of 16 rows, k = 64: tiles span ranks
    weights = [random(64, 32), random(40, 64).t(), *(random(64, n) for n in (8, 16, 24))]
    gradient = random(2 * 4 * 16, 8)
    plan = Plan("all_gather_matmul", "g/site", "nvlink", BF16, uses=(*[ROWS] * 5, GRADIENT))
    bias = torch.ones(24, dtype=torch.bfloat16)
    args = [*weights, gradient], [None, None, None, None, bias, None]
    site = Site(5)
    outputs = run(gpu, site, plan, shard, *args)
    assert [tuple(output.shape) for output in outputs] == [(128, n) for n in (32, 40, 8, 16, 24)] + [(64, 8)]
    # One layout, one bias, at most three weights a kernel.
    launched = fused(gpu)
    configs = [launch.args[0] for launch in launched]
    assert [(config.transposed, config.bias, config.operands) for config in configs] == [
        (False, False, 3),
        (True, False, 1),
        (False, True, 1),
    ]
    assert [launch.values["B0"] for launch in launched] == [weights[i].data_ptr() for i in (0, 1, 4)]
    assert [launch.values["C0"] for launch in launched] == [outputs[i].data_ptr() for i in (0, 1, 4)]
    assert launched[0].values["B2"] == weights[3].data_ptr() and launched[2].values["V0"] == bias.data_ptr()
    for launch, columns in zip(launched, ([32, 8, 16], [40], [24]), strict=True):
        sizes = {"M": 128, "MR": 32, "K": 64, **{f"N{i}": n for i, n in enumerate(columns)}}
        known = {name: value for name, value in launch.values.items() if name in sizes}
        assert known and known.items() <= sizes.items()
        assert launch.values["epoch"] == 1 and launch.values["site"] == 5
        assert launch.values["A"] == gpu.memory.bases[1] + CONTROL_BYTES + SLOT_BYTES
        assert launch.values["ack"] == -1  # the weight gradient reads the slot after them
    side = [step for step in gpu.driver.issued if step["kind"] in (stream.COPY_ROWS, stream.WRITE)]
    local = side.pop(-1)  # the own shard is copied, too: a tile has rows of several ranks
    assert [step["kind"] for step in side] == [stream.COPY_ROWS] * 3 + [stream.WRITE] * 4
    flags = [base + (FLAGS + 1) * 4 for base in gpu.memory.bases]
    assert [step["dst"] for step in side[3:]] == [flags[peer] for peer in (0, 3, 2, 1)]  # its own behind all copies
    assert {step["stream"] for step in side} == {SIDE} != {local["stream"]}
    base = [owner + CONTROL_BYTES + SLOT_BYTES for owner in gpu.memory.bases]
    nbytes = 16 * 64 * 2
    assert [step["dst"] for step in [*side[:3], local]] == [base[peer] + nbytes for peer in (0, 3, 2, 1)]
    for step in [*side[:3], local]:
        assert (step["rows"], step["bytes"], step["dst_pitch"]) == (2, nbytes, 4 * nbytes)
        assert step["src"] == shard.data_ptr()
    assert [step["value"] for step in side[3:]] == [1] * 4
    assert [waits_for_itself(launch) for launch in launched] == [[], [], [launched[2].values["tiles"] - 1]]
    # Captured, it opens first and acknowledges last.
    gpu.driver.launched.clear()
    gpu.driver.issued.clear()
    gpu.torch.capturing = True
    run(gpu, site, plan, shard, *args)
    assert [waits_for_itself(launch) for launch in fused(gpu)] == [[]] * 3
    own = [step for step in gpu.driver.issued if step["dst"] == gpu.memory.bases[1] + (2 * FLAGS + FLAGS + 1) * 4]
    joins = [step for step in gpu.driver.issued if step["kind"] == stream.AWAIT and step["event"] == JOIN]
    assert own == [] and len(joins) == 1, "a copy within the GPU might need an SM"
    names = [launch.args[0] if launch.name == "service" else launch.name for launch in gpu.driver.launched]
    assert names == ["tsk_open", *["all_gather"] * 3, "tsk_acknowledge"]
    assert gpu.link.pinned == [site.recipe]
    assert {launch.values["epoch"] for launch in gpu.driver.launched} == {0}


def table_of(launch: Launched, walk: int = 0) -> list[list[int]]:
    """The table of a gather's launch. walk: rows behind the tiles."""
    words = (ctypes.c_int32 * (8 * (launch.values["tiles"] + walk))).from_address(launch.values["table"])
    return [words[row : row + 8] for row in range(0, len(words), 8)]


def waits_for_itself(launch: Launched, rank: int = 1, walk: int = 0) -> list[int]:
    """The rows that wait for the rank's own copies."""
    return [number for number, row in enumerate(table_of(launch, walk)) if row[6] >> rank & 1]


@pytest.mark.parametrize("use", [("lhs", True, "rows"), ("rhs", False, "cols"), ("rhs", False, "rows")], ids=str)
def test_a_kernel_of_blocks_ends_behind_the_copies(gpu: Gpu, use: tuple[str, bool, str]) -> None:
    """Its last tile waits for them, of a sum at the end of a walk of its own, in the order that it has without."""
    gathered = GatherUse(*use, BF16)
    plan = Plan("all_gather_matmul", "g/site", "nvlink", BF16, uses=(gathered,))
    shard = random(1, 64 * 64) if use[2] == "rows" else random(64, 64)
    k = 256 if gathered.contracts_ranks else 64
    other = random(k, 72) if use[0] == "lhs" else random(72, k)
    site, walk = Site(5), 16 if gathered.contracts_ranks else 0
    run(gpu, site, plan, shard, [other], [None])
    run(gpu, site, plan, shard, [other], [None])
    first, second = fused(gpu)
    assert first.name == "gather_blocks" and first.values["table"] == second.values["table"]
    eager = table_of(first, walk + walk // 4)
    assert waits_for_itself(first, walk=walk + walk // 4) == [len(eager) - 1]
    assert not [step for step in gpu.driver.issued if step["kind"] == stream.AWAIT and step["event"] == JOIN]
    gpu.torch.capturing = True
    run(gpu, site, plan, shard, [other], [None])
    captured = table_of(fused(gpu)[-1], walk)
    assert waits_for_itself(fused(gpu)[-1], walk=walk) == []
    tiles = first.values["tiles"]
    *others, last = eager[:tiles]
    assert others == captured[: tiles - 1] and eager[tiles : tiles + walk] == captured[tiles:]
    if walk:
        begin, end = last[4], captured[tiles - 1][4]
        assert [row[:6] for row in eager[begin : begin + 4]] == [row[:6] for row in captured[end : end + 4]]


def copies(patch: pytest.MonkeyPatch) -> None:
    """Have the copy engine send shards of any size."""
    patch.setattr(widths, "pushes", lambda *_: False)


def test_an_eager_gather_again_brings_its_own_epoch_operands_and_results(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies(monkeypatch)
    plan = Plan("all_gather_matmul", "g/site", "nvlink", BF16, uses=(ROWS,), return_gathered=True)
    site = Site(5)
    kept = []  # no address is used twice
    for epoch in range(1, 6):
        shard, weight = random(1, 128 * 64), random(64, 32)
        gpu.driver.issued.clear()
        product, gathered = run(gpu, site, plan, shard, [weight], [None])
        kept += [shard, weight, product, gathered]
        assert product.shape == (512, 32) and gathered.shape == (1, 4 * 128 * 64)
        copied = [step for step in gpu.driver.issued if step["kind"] == stream.COPY]
        flags = [step for step in gpu.driver.issued if step["kind"] == stream.WRITE]
        slot = gpu.link.slot_offset(epoch & 1)
        assert [step["dst"] - gpu.memory.bases[peer] for step, peer in zip(copied, (0, 3, 2), strict=True)] == [
            slot + shard.nbytes
        ] * 3
        assert {step["src"] for step in copied} == {shard.data_ptr()}
        assert {step["value"] for step in flags} == {epoch}
        values = fused(gpu)[-1].values
        assert (values["epoch"], values["site"], values["ack"]) == (epoch, 5, ACK)
        assert (values["X"], values["B0"], values["C0"], values["gathered"]) == tuple(t.data_ptr() for t in kept[-4:])
        assert values["A"] == gpu.memory.bases[1] + slot
    assert gpu.link.pinned == []


def test_a_gather_that_pushes_is_one_launch(gpu: Gpu) -> None:
    """No copy stream, no events but the watchdog's, and in a captured call the opening; epochs, operands and results change."""
    plan = Plan("all_gather_matmul", "g/site", "nvlink", BF16, uses=(ROWS, ROWS), return_gathered=True)
    site, kept = Site(5), []
    for epoch in range(1, 4):
        shard, weights = random(3, 40 * 4096), [random(4096, 32), random(4096, 8)]
        bias = torch.ones(32, dtype=torch.bfloat16), torch.ones(8, dtype=torch.bfloat16)
        gpu.driver.issued.clear()
        *products, gathered = run(gpu, site, plan, shard, weights, list(bias))
        kept.append((shard, weights, bias, products, gathered))
        assert [tuple(product.shape) for product in products] == [(480, 32), (480, 8)]
        assert gathered.shape == (3, 4 * 40 * 4096)
        assert [step["kind"] for step in gpu.driver.issued] == [stream.LAUNCH, stream.RECORD]
        launched = fused(gpu)[-1]
        config, collects = launched.args
        assert launched.name == "gather_push" and collects
        assert (config.operands, config.bias, config.transposed) == (2, True, False)
        slot = gpu.memory.bases[1] + gpu.link.slot_offset(epoch & 1)
        sizes = {"M": 480, "K": 4096, "rows": 120, "inner": 40, "pieces": 3, "shard_bytes": 40 * 4096 * 2}
        sizes |= {"slices": 3, "slice_steps": 22, "tiles": 2 * 4, "N0": 32, "N1": 8}
        calls = {"epoch": epoch, "site": 5, "ack": ACK, "A": slot, "X": shard.data_ptr()}
        calls |= {"gathered": gathered.data_ptr(), "B0": weights[0].data_ptr(), "C1": products[1].data_ptr()}
        assert (sizes | calls).items() <= launched.values.items()
        assert all(launched.values.values())
    gpu.driver.issued.clear()
    gpu.torch.capturing = True
    run(gpu, site, plan, *kept[0][:2], list(kept[0][2]))
    assert [step["kind"] for step in gpu.driver.issued] == [stream.LAUNCH] * 2
    assert [launched.args[0] for launched in gpu.driver.launched if launched.name == "service"] == ["tsk_open"]
    assert fused(gpu)[-1].values["epoch"] == 0 and gpu.link.pinned == [site.recipe]


def test_weights_in_several_layouts_are_pushed_for_once(gpu: Gpu) -> None:
    """Ranks must send alike whatever their weights' layout. The first kernel pushes and waits; the others read the slot."""
    plan = Plan("all_gather_matmul", "g/site", "nvlink", BF16, uses=(ROWS, ROWS), return_gathered=True)
    site = Site(5)  # which keeps the tables
    shard, weights = random(1, 128 * 64), [random(64, 32), random(40, 64).t()]
    run(gpu, site, plan, shard, weights, [None, None])
    first, second = fused(gpu)
    assert (first.name, second.name) == ("gather_push", "all_gather")
    assert (first.args[1], second.args[1]) == (True, False)
    assert (first.values["ack"], second.values["ack"]) == (-1, ACK)
    assert {step["kind"] for step in gpu.driver.issued} == {stream.LAUNCH, stream.RECORD}
    tables = [words(launch.values["table"], launch.values["tiles"]) for launch in (first, second)]
    assert {row[6] for row in tables[0]} == {1 << rank for rank in range(4)}
    for row, other in zip(*tables, strict=True):
        assert other == [*row[:6], 0, row[7]] and not row[3]


def words(address: int, rows: int) -> list[list[int]]:
    """A table of tiles."""
    flat = (ctypes.c_int32 * (8 * rows)).from_address(address)
    return [list(flat[first : first + 8]) for first in range(0, 8 * rows, 8)]


def test_operands_that_tma_cannot_read_are_copied(gpu: Gpu) -> None:
    plan = Plan("all_gather_matmul", "g/site", "nvlink", BF16, uses=(ROWS,))
    odd = random(64 * 32 + 1)[1:].view(64, 32)
    assert odd.data_ptr() % 16
    for weight in (odd, random(128, 32)[::2], random(64, 64)[:, :32]):
        run(gpu, Site(5), plan, random(1, 128 * 64)[:, :], [weight], [None])
        address = fused(gpu)[-1].values["B0"]
        assert address % 16 == 0 and address != weight.data_ptr()
    shard = random(1, 128 * 64).float()
    run(gpu, Site(5), plan, shard, [random(64, 32)], [None])  # it travels in the plan's dtype
    assert fused(gpu)[-1].values["X"] != shard.data_ptr()


@pytest.mark.usefixtures("pulls")
@pytest.mark.parametrize("kind", ["matmul_reduce_scatter", "matmul_all_reduce"])
@pytest.mark.parametrize("transposed", [False, True])
def test_what_a_sum_launches(gpu: Gpu, kind: str, transposed: bool) -> None:
    plan = Plan(kind, "g/site", "nvlink", BF16, coefficients=(2.0, -1.0), reduce_op="avg")
    lhs = [random(512, k) for k in (64, 128)]
    rhs = [random(k, 264) for k in (64, 128)]
    if transposed:
        rhs = [b.t().contiguous().t() for b in rhs]
    biases = [torch.full((264,), 3.0, dtype=torch.bfloat16), torch.full((264,), 4.0, dtype=torch.bfloat16)]
    outer = [2] if kind == "matmul_reduce_scatter" else []
    (out,) = run(gpu, Site(5), plan, lhs, rhs, biases, [], *outer)
    assert out.shape == ((512 if kind == "matmul_all_reduce" else 128), 264)
    (launched,) = fused(gpu)
    config, all_reduce = launched.args
    assert (config.transposed, config.operands, config.bias) == (transposed, 2, True)
    assert all_reduce == (kind == "matmul_all_reduce")
    # The sum is scaled once, in float32: by the first coefficient over the ranks. The other operands bring the rest of theirs.
    given = launched.values
    assert struct.unpack("<f", struct.pack("<i", given["scale"])) == (2.0 / 4,)
    assert given["A0"] == lhs[0].data_ptr() and given["A1"] != lhs[1].data_ptr()
    assert (given["M"], given["N"], given["K0"], given["K1"]) == (512, 264, 64, 128)
    assert given["rows"] == len(out) and given["C"] == out.data_ptr()
    tiles = given["tiles"]
    assert tiles == (2 * 3 if kind == "matmul_reduce_scatter" else 3) and config.tile_n == 128
    assert given["pulls_entries"] == 3 * tiles and given["pulls"] != given.get("results")
    if all_reduce:
        assert given["results_entries"] == 3 * tiles and given["result_offset"] == 3 * tiles * 128 * 128 * 2
    assert (given["epoch"], given["site"], given["ack"]) == (1, 5, ACK)
    assert given["slot"] == gpu.memory.bases[1] + CONTROL_BYTES + SLOT_BYTES
    template = find_template(kind, "nvlink")
    assert template is not None
    need = template.scratch_bytes(plan, 4, lhs, rhs, biases, [], *outer)
    assert need == (3 + all_reduce) * tiles * 128 * 128 * 2


@pytest.mark.parametrize(
    ("kind", "m", "form", "share"),
    [
        ("matmul_reduce_scatter", 512, "scatter", 8 * 5),  # 128 rows of each rank are 8 stripes high
        ("matmul_reduce_scatter", 128, "scatter", 2 * 5),
        ("matmul_all_reduce", 40, "one_shot", 8 * 5),
        ("matmul_all_reduce", 512, "two_shot", 4 * 5 * 2),  # each rank sums two stripes of each tile
    ],
)
def test_what_a_small_sum_launches(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch, kind: str, m: int, form: str, share: int
) -> None:
    def only(*sizes: Any) -> SumPlan:
        return next(
            plan
            for plan in push_plans(m, 264, 64, 4, 2 if form == "scatter" else 1, form != "scatter")
            if (plan.form, plan.width) == (form, 64)
        )

    monkeypatch.setattr(gemm_reduce, "terms_plan", only)
    plan = Plan(kind, "g/site", "nvlink", BF16, coefficients=(1.0,))
    outer = [2] if form == "scatter" else []
    a, b = random(m, 64), random(64, 264)
    (out,) = run(gpu, Site(5), plan, [a], [b], [None], [], *outer)
    (launched,) = fused(gpu)
    assert launched.name == "sum_push" and launched.args[1] == form
    given = launched.values
    assert out.shape == (m // 4 if form == "scatter" else m, 264) and given["rows"] == len(out)
    assert (given["M"], given["N"], given["K0"], given["C"]) == (m, 264, 64, out.data_ptr())
    assert (given["columns"], given["table_entries"], given["share"]) == (5, -(-m // 128) * 5, share)
    assert given["inner"] == (m // 8 if form == "scatter" else m)
    assert (given["epoch"], given["site"], given["ack"]) == (1, 5, ACK)
    template = find_template(kind, "nvlink")
    assert template is not None
    need = template.scratch_bytes(plan, 4, [a], [b], [None], [], *outer)
    sums = given["table_entries"] * 8 if form == "two_shot" else 0
    assert need == (4 * share + sums) * 16 * 64 * 2
    assert [step["kind"] for step in gpu.driver.issued] == [stream.LAUNCH, stream.RECORD]


@pytest.mark.usefixtures("pulls")
@pytest.mark.parametrize("pushed", [False, True])
def test_every_value_of_a_kernel_is_given(gpu: Gpu, monkeypatch: pytest.MonkeyPatch, pushed: bool) -> None:
    """What no name stands for would be 0, which is an address that faults, or a size of nothing."""
    monkeypatch.setattr(widths, "pushes", lambda *_: pushed)
    bias = torch.ones(24, dtype=torch.bfloat16)
    gather = Plan("all_gather_matmul", "g/a", "nvlink", BF16, uses=(ROWS, ROWS), return_gathered=True)
    run(gpu, Site(5), gather, random(2, 128 * 64), [random(64, 24), random(64, 24)], [bias, bias])
    scatter = Plan("matmul_reduce_scatter", "g/b", "nvlink", BF16, coefficients=(1.0, 1.0))
    operands = [random(512, 64), random(512, 64)], [random(64, 24), random(64, 24)], [bias, bias]
    run(gpu, Site(5), scatter, *operands, [], 1)
    run(gpu, Site(5), Plan("matmul_all_reduce", "g/c", "nvlink", BF16, coefficients=(1.0, 1.0)), *operands, [])
    assert len(fused(gpu)) == 3
    for launched in fused(gpu):
        missing = {name for name, value in launched.values.items() if not value}
        assert missing <= ({"results", "results_entries"} if launched.args[1:] == (False,) else set()), launched


def test_another_bias_in_the_same_layout_is_another_recipe(gpu: Gpu) -> None:
    """Recipes belong to a layout: lowering/group.py tells sites with and without a bias, and other pieces, apart."""
    a, b = random(512, 64), random(64, 256)
    bias = torch.ones(256, dtype=torch.bfloat16)
    for given in (None, bias):
        run(gpu, Site(5), Plan("all_gather_matmul", "g/a", "nvlink", BF16, uses=(ROWS,)), a.view(1, -1), [b], [given])
        run(gpu, Site(5), Plan("matmul_all_reduce", "g/b", "nvlink", BF16), [a], [b], [given], [])
        assert [launched.args[0].bias for launched in fused(gpu)[-2:]] == [given is not None] * 2


def test_a_new_link_needs_a_new_recipe(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, site = Plan("matmul_all_reduce", "g/b", "nvlink", BF16), Site(5)
    a, b = random(512, 64), random(64, 256)
    run(gpu, site, plan, [a], [b], [None], [])
    first = site.recipe
    run(gpu, site, plan, [a], [b], [None], [])
    assert site.recipe is first
    other = Gpu(monkeypatch)  # as after a growth of the group's memory
    monkeypatch.setattr(gemm_reduce, "kernel", other.driver.kernel)
    run(other, site, plan, [a], [b], [None], [])
    assert site.recipe is not first and len(fused(other)) == 1
