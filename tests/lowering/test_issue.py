"""What a launch asks of the CUDA driver, from the runtime down to stream.c: each call costs the host a microsecond or two."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks import driver_calls, host_issue
from tests.cases import Case
from tests.cases import projected as projected_case
from tests.templates.nvlink.fake_gpu import large_forms, most_chunks
from tests.templates.nvlink.stub_gpu import CALLS, StubRank
from tscompile.errors import HeapError, PeerError
from tscompile.lowering import mesh, runtime
from tscompile.lowering.mesh_state import MeshState
from tscompile.problem import Delivery, GatherUse, Plan
from tscompile.templates.nvlink import gemm_all_to_all, recipe
from tscompile.templates.nvlink.channel import FLAGS, Site

BF16 = "bfloat16"
ROWS, GRADIENT = GatherUse("lhs", False, "rows", BF16), GatherUse("lhs", True, "rows", BF16)
SUM = Plan("matmul_all_reduce", "g/sum", "nvlink", BF16, coefficients=(1.0,))
SCATTER = Plan("matmul_reduce_scatter", "g/scatter", "nvlink", BF16, coefficients=(1.0,))
GATHER = Plan("all_gather_matmul", "g/gather", "nvlink", BF16, uses=(ROWS,))
ALONE = ["launch", "record"]  # the watchdog asks for the event
FORK, SENDS, JOIN = ["record", "await"], ["copy"] * 3 + ["flags"], ["record", "await"]


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[StubRank]:
    large_forms(monkeypatch)
    with torch.no_grad():
        yield StubRank(monkeypatch)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).to(torch.bfloat16)


def terms(x: torch.Tensor, weight: torch.Tensor, *outer: int) -> tuple[Any, ...]:
    return [x], [weight], [None], [], *outer


def calls(rank: StubRank, plan: Plan, args: tuple[Any, ...]) -> list[str]:
    rank.driver.calls()
    rank.launch(plan, args)
    return rank.driver.calls()


@pytest.mark.parametrize("plan", [SUM, SCATTER], ids=lambda plan: plan.kind)
def test_a_sum_is_one_launch_and_one_event(rank: StubRank, plan: Plan) -> None:
    x, other, weight = random(512, 64), random(512, 64), random(256, 64).t()
    outer = (1,) if plan is SCATTER else ()
    for _ in range(2):  # one for each slot
        assert calls(rank, plan, terms(x, weight, *outer)) == ["encode", "encode", *ALONE]
    for _ in range(6):
        assert calls(rank, plan, terms(x, weight, *outer)) == ALONE
    assert calls(rank, plan, terms(other, weight, *outer)) == ["encode", *ALONE]
    assert calls(rank, plan, terms(x, weight, *outer)) == ALONE  # the other slot still has it


def test_a_gather_of_four_ranks(rank: StubRank) -> None:
    shard, other, weight = random(1, 128 * 64), random(1, 128 * 64), random(256, 64).t()
    args = shard, [weight], [None]
    steady = [*FORK, *SENDS, *ALONE]
    for _ in range(2):
        assert calls(rank, GATHER, args) == [*FORK, *SENDS, *["encode"] * 3, *ALONE]
    for _ in range(6):
        assert calls(rank, GATHER, args) == steady and len(steady) == 8
    # The maps of the slot and of the weight stay.
    assert calls(rank, GATHER, (other, [weight], [None])) == [*FORK, *SENDS, "encode", *ALONE]


def test_one_call_sets_the_flags_of_all_peers(rank: StubRank) -> None:
    """Each peer's, to the epoch of the call, which kernels compare as 32 bits."""
    args = random(1, 128 * 64), [random(256, 64).t()], [None]
    for epoch in (1, 2, 3):
        assert "flags" in calls(rank, GATHER, args)
        addresses = [rank.link.address(peer, ((epoch & 1) * FLAGS + 1) * 4) for peer in (0, 3, 2, 1)]
        assert rank.driver.flags(4) == [(address, epoch) for address in addresses], "its own last, behind all copies"
    rank.link._eager = (1 << 32) - 2
    rank.launch(GATHER, args)
    assert [value for _, value in rank.driver.flags(3)] == [(1 << 32) - 1] * 3


def test_long_copies_have_a_flag_each(rank: StubRank, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that waits for one shard is not to wait for those of other ranks."""
    monkeypatch.setattr(recipe, "_TOGETHER_BYTES", 128 * 64 * 2 - 1)
    monkeypatch.setattr(gemm_all_to_all, "_TOGETHER_BYTES", 1)
    args = random(1, 128 * 64), [random(256, 64).t()], [None]
    for _ in range(3):
        found = calls(rank, GATHER, args)
    assert found == [*FORK, *["copy", "flag"] * 2, "copy", "flags", *ALONE]
    case = projection((2,), monkeypatch)
    for _ in range(3):
        found = calls(rank, case.plan, case.args[1])
    # Nobody waits for the first chunk before the last one is sent.
    assert found == [*FORK, *["rows"] * 3, "flags", *FORK, *["rows", "flag"] * 3, "launch", *JOIN, "record"]


def test_the_driver_refuses_flags(rank: StubRank) -> None:
    args = random(1, 128 * 64), [random(256, 64).t()], [None]
    rank.launch(GATHER, args)
    (call,) = rank.group.memo(None, GATHER, args).kept.recipe._calls.values()  # type: ignore[arg-type]
    rank.driver.refused.value = CALLS.index("flags")
    with pytest.raises(HeapError, match=r"CUDA refused a flag \(step 6 of 11: CUresult 700\)"):
        rank.link.issue(call.steps)


def test_what_a_rank_of_a_ulysses_block_asks_of_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """8K tokens on four ranks: q, k and v of one projection, sent; and the exchange behind the attention."""
    rank, matmuls = StubRank(monkeypatch, slot_bytes=host_issue.SLOT_BYTES), host_issue.Matmuls()
    monkeypatch.setattr(torch, "mm", matmuls)
    plan, args = host_issue.ulysses()
    with torch.no_grad():
        for _ in range(3):
            matmuls.count = 0
            found = calls(rank, plan, args)
        assert found == [*[*FORK, *["rows"] * 3, "flags"] * 2, "launch", *JOIN, "record"] and len(found) == 16
        assert matmuls.count == 2
        for _ in range(3):
            found = calls(rank, *host_issue.back())
        assert found == ALONE


def test_the_benchmark_of_the_drivers_calls_counts_calls(rank: StubRank) -> None:
    """Flags that follow one another are one call."""
    found = {}
    for name, steps in driver_calls.kinds(1 << 40, 1 << 41).items():
        rank.driver.calls()
        assert 0 < driver_calls.measure(rank.driver, rank.link._queues, steps, rounds=1) < 1000
        found[name] = rank.driver.calls()
        assert len(found[name]) == driver_calls.CALLS
    assert [row[:2] for row in found.values()] == [
        ["copy", "copy"],
        ["rows", "rows"],
        ["copy", "flag"],
        ["copy", "flags"],
        ["record", "await"],
    ]


def test_what_an_op_of_a_mesh_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two ranks each; the driver's calls for the left operand's group and for the right one's. Steady: addresses stay."""
    large_forms(monkeypatch)
    with torch.no_grad():
        row, column = StubRank(monkeypatch, 1, 2, "row"), StubRank(monkeypatch, 0, 2, "column")
        mesh_state = MeshState((row.group, column.group), {})
        monkeypatch.setitem(runtime.current_world().meshes, ("row", "column"), mesh_state)
        uses = (GatherUse("lhs", False, "cols", BF16), GatherUse("rhs", False, "rows", BF16))
        plan = Plan("mesh_matmul", "g/mesh", "nvlink", BF16, uses=uses, second_size=2)
        args = (random(256, 64), random(1, 64 * 256), None, 128, "column")
        for _ in range(3):
            row.driver.calls()
            mesh.launch(plan, "row", args, lambda: pytest.fail("the original ops ran"))
            found = row.driver.calls()  # of both: there is one library
        ends = [*JOIN, "record"]
        assert found[-15:] == [*FORK, "copy", "flag", *FORK, "rows", "flag", "launch", *ends, *ends]
        assert set(found[:-15]) <= {"encode"}


@pytest.mark.parametrize("plan", [SUM, GATHER], ids=lambda plan: plan.kind)
def test_small_ops_are_one_launch_and_one_event(monkeypatch: pytest.MonkeyPatch, plan: Plan) -> None:
    """Their kernels send everything themselves."""
    rank, weight = StubRank(monkeypatch), random(256, 64).t()
    args = (random(1, 16 * 64), [weight], [None]) if plan is GATHER else terms(random(64, 64), weight)
    with torch.no_grad():
        for _ in range(3):
            found = calls(rank, plan, args)
    assert found == ALONE


def exchanged(rows: int = 16, padding: int = 0) -> tuple[Plan, tuple[Any, ...]]:
    """Two exchanges of four ranks, permuted on their way; the second one goes to two places."""
    deliveries = Delivery(0, (2, 0, 1, 3)), Delivery(1, (0, 1, 2, 3)), Delivery(1, (1, 0, 3), ((2, 1),))
    plan = Plan("all_to_all_permute", "g/exchange", "nvlink", BF16, deliveries=deliveries, joins=(1, 1, 1))
    inputs = [random(rows, 4, 2, 64 + padding)[..., :64].transpose(0, 1) for _ in range(2)]
    return plan, (inputs,)


def test_an_exchange_is_one_launch_and_one_event(rank: StubRank) -> None:
    """However many tensors are exchanged: nothing is encoded, and the copy stream rests."""
    plan, args = exchanged()
    for _ in range(4):
        assert calls(rank, plan, args) == ALONE
    assert calls(rank, plan, exchanged()[1]) == ALONE
    rank.torch.capturing = True
    for _ in range(3):
        assert calls(rank, plan, args) == ["launch", "launch"]
    rank.torch.capturing = False
    assert calls(rank, plan, args) == ALONE


def test_an_exchange_of_another_layout_is_another_recipe(rank: StubRank) -> None:
    """Other sizes and other strides have tables of their own, and each call the one of its layout."""
    plan, args = exchanged()
    layouts = [args, exchanged(rows=24)[1], exchanged(padding=8)[1]]
    for _ in range(3):
        for each in layouts:
            assert calls(rank, plan, each) == ALONE
    memos = rank.group._memos[plan.site]
    assert len(memos) == 3 and len({id(memo.kept.recipe) for memo in memos.values()}) == 3
    tables = {memo.kept.recipe._launch._fixed["table"] for memo in memos.values()}
    assert len(tables) == 3


@pytest.mark.parametrize("returned", [False, True])
def test_a_gather_that_a_gradient_reads(rank: StubRank, returned: bool) -> None:
    """Its matmul follows. Without a gathered tensor of its own it reads the slot, so the event comes again behind it."""
    plan = Plan("all_gather_matmul", "g/two", "nvlink", BF16, uses=(ROWS, GRADIENT), return_gathered=returned)
    args = random(1, 128 * 64), [random(256, 64).t(), random(512, 32)], [None, None]
    for _ in range(4):
        found = calls(rank, plan, args)
    copies = [] if returned else ["copy"]  # the own shard, for the matmul behind
    assert found == [*FORK, *SENDS, *copies, *ALONE, *([] if returned else ["record"])]


def projection(parts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> Case:
    """Matmuls whose results are exchanged by four ranks, in as many chunks as there are exchanges."""
    most_chunks(monkeypatch)
    case = projected_case(4, 0, BF16, parts=parts, dim=8)
    return replace(case, plan=replace(case.plan, executor="nvlink"))


@pytest.mark.parametrize("parts", [(3,), (1, 1, 1), (1,)])
def test_projections_send_behind_each_chunk(
    rank: StubRank, monkeypatch: pytest.MonkeyPatch, parts: tuple[int, ...]
) -> None:
    """Each chunk forks the copy stream; at the end there are one kernel, one join and the event."""
    case = projection(parts, monkeypatch)
    one = [*FORK, *["rows"] * 3, "flags"]
    for _ in range(4):
        assert calls(rank, case.plan, case.args[1]) == [*one * sum(parts), "launch", *JOIN, "record"]


def test_captured_projections_open_behind_the_first_chunk(rank: StubRank, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slot's last readers are waited for before anything is sent; a flag is a copy of the epoch, and nothing is recorded."""
    case = projection((2,), monkeypatch)
    rank.launch(case.plan, case.args[1])
    rank.torch.capturing = True
    sends = ["rows", "copy"] * 3
    for _ in range(3):
        found = calls(rank, case.plan, case.args[1])
        assert found == ["launch", *FORK, *sends, *FORK, *sends, "launch", *JOIN]


def test_maps_are_of_the_operands_of_the_call(rank: StubRank) -> None:
    """A map that is kept must never outlive the address that it was made of."""
    weights = [random(256, 64).t() for _ in range(2)]
    xs = [random(512, 64) for _ in range(3)]
    rank.launch(SUM, terms(xs[0], weights[0]))
    ((_, _, kernel),) = [known for known in rank.kernels._kernels.values() if known[0] == "reduce"]
    spec = kernel.spec
    rank.driver.show(len(spec.parameters))
    for number in range(24):
        x, weight = xs[number * 7 % 5 % 3], weights[number % 3 % 2]
        (out,) = rank.launch(SUM, terms(x, weight))
        given = dict(zip(spec.parameters, rank.driver.parameters(), strict=True))
        at = {tensor.tensor: given[name] for name, tensor in spec.maps.items()}
        assert at == {"A0": x.data_ptr(), "B0": weight.data_ptr()}
        assert given["C"] == out.data_ptr() and given["epoch"] == number + 2


def test_other_sizes_are_other_maps(rank: StubRank) -> None:
    memory = random(512, 128)
    weight = random(256, 64).t()
    for rows in (512, 256, 512, 256):  # the same address
        found = calls(rank, SUM, terms(memory.view(-1)[: rows * 64].view(rows, 64), weight))
    assert found[-2:] == ALONE and len(rank.group._memos[SUM.site]) == 2


@pytest.mark.parametrize(
    ("call", "step"), [("encode", "kernel"), ("launch", "kernel"), ("record", "event")], ids=lambda name: name
)
def test_a_step_that_the_driver_refuses(rank: StubRank, call: str, step: str) -> None:
    args = terms(random(512, 64), random(256, 64).t())
    rank.launch(SUM, args)
    steps = next(iter(rank.group.memo(None, SUM, args).kept.recipe._calls.values())).steps  # type: ignore[arg-type]
    number = 2 if call == "record" else 1
    rank.driver.refused.value = CALLS.index(call)
    message = rf"CUDA refused a {step} \(step {number} of 2: CUresult 700\)"
    with pytest.raises(HeapError, match=message):  # the other slot's maps are still to be made
        rank.launch(SUM, args)
    with pytest.raises(PeerError, match=message):
        rank.launch(SUM, args)
    rank.driver.refused.value = -1
    rank.link.issue(steps)
    assert rank.driver.calls()[-2:] == ALONE


def test_a_map_that_was_refused_is_made_again(rank: StubRank) -> None:
    args = terms(random(512, 64), random(256, 64).t())
    rank.driver.refused.value = CALLS.index("encode")
    with pytest.raises(HeapError):
        rank.launch(SUM, args)
    (call,) = rank.group.memo(None, SUM, args).kept.recipe._calls.values()  # type: ignore[arg-type]
    rank.driver.refused.value = -1
    rank.driver.calls()
    rank.link.issue(call.steps)
    assert rank.driver.calls() == ["encode", "encode", *ALONE]


def test_a_captured_sum_opens_and_records_nothing(rank: StubRank) -> None:
    args = terms(random(512, 64), random(256, 64).t())
    rank.launch(SUM, args)
    rank.torch.capturing = True
    for _ in range(2):
        assert calls(rank, SUM, args) == ["launch", "encode", "encode", "launch"]
    assert calls(rank, SUM, args) == ["launch", "launch"]
    rank.torch.capturing = False
    assert calls(rank, SUM, args)[-2:] == ALONE


def test_another_stream_waits_for_the_last_one(rank: StubRank) -> None:
    args = terms(random(512, 64), random(256, 64).t())
    for _ in range(2):
        rank.launch(SUM, args)
    rank.torch.stream = 9
    assert calls(rank, SUM, args) == ["await", *ALONE]
    assert calls(rank, SUM, args) == ALONE
    assert rank.link._queues.streams[0] == 9


def test_groups_of_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = [StubRank(monkeypatch, group=f"group {number}") for number in range(2)]
    failures: list[BaseException] = []

    def work(rank: StubRank, plan: Plan, args: tuple[Any, ...]) -> None:
        try:
            with torch.no_grad():
                for _ in range(300):
                    rank.launch(plan, args)
        except BaseException as error:
            failures.append(error)

    # Two threads share the first group, and a site of it.
    args = terms(random(512, 64), random(256, 64).t())
    gather = random(1, 128 * 64), [random(256, 64).t()], [None]
    jobs = [(ranks[0], SUM, args), (ranks[0], SUM, args), (ranks[1], GATHER, gather)]
    threads = [threading.Thread(target=work, args=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == [] and [rank.group.epoch for rank in ranks] == [600, 300]
    assert ranks[0].link.open(Site(1)).epoch == 601
