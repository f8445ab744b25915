"""The kernels of all ranks of a group on one GPU, for any number of ranks: python -m pytest tests/one_gpu

Also what to run under compute-sanitizer, which sees nothing here but these kernels.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch

from tests.direct_ops import Shape
from tests.fused_programs import GATHER, REDUCE, SCATTER

from .group import Group, Op, forms_of

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]
if not torch.cuda.is_available():
    pytestmark.append(pytest.mark.skip(reason="needs an NVIDIA GPU (H100 or H200)"))


@pytest.fixture
def patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as made:
        yield made


def shapes(ranks: int) -> list[Shape]:
    """Sizes of each kernel and regime; `m` is what a rank has."""
    found = [
        Shape(GATHER, 16, (512,), 512),
        Shape(GATHER, 128, (264, 128, 128), 512, bias=True),
        Shape(GATHER, 37, (512,), 520, gathered=True),
        Shape(GATHER, 256, (512, 256), 512, gathered=True, plain_layout=True),
    ]
    for kind in (SCATTER, REDUCE):
        found += [
            Shape(kind, 16 * ranks, (512,), 512),
            Shape(kind, 64 * ranks, (264,), 256, bias=True, plain_layout=True),
            Shape(kind, 48 * ranks, (520,), 520, average=True),
            Shape(kind, 512 * ranks, (1024,), 256),
            Shape(kind, 520 * ranks, (1032,), 128, bias=True),
        ]
    return [
        *found,
        Shape(REDUCE, 5, (256,), 512),
        Shape(REDUCE, 200, (2056,), 512),
        Shape(SCATTER, 37 * ranks, (264,), 64),
    ]


@pytest.mark.timeout(600)  # racecheck takes minutes
@pytest.mark.parametrize("ranks", [2, 3, 4, 5, 8])
def test_results_and_bits(patch: pytest.MonkeyPatch, ranks: int) -> None:
    """Every shape in every form: the right results, and the same bits again."""
    group = Group(patch, ranks)
    for shape in shapes(ranks):
        for form in forms_of(shape, ranks):
            op = Op(group, shape, form=form)
            for _ in range(2):
                op.refill()
                truth = op.truth()
                torch.cuda.synchronize()
                first = group.each(op.call)
                torch.cuda.synchronize()
                op.check(first, truth)
                again = group.each(op.call)
                torch.cuda.synchronize()
                for a, b in zip(first, again, strict=True):
                    same = all(torch.equal(one, other) for one, other in zip(a, b, strict=True))
                    assert same, f"{shape}, {form}: other bits"


def test_float16(patch: pytest.MonkeyPatch) -> None:
    group = Group(patch, 4)
    for shape in shapes(4)[::3]:
        op = Op(group, shape, torch.float16)
        truth = op.truth()
        torch.cuda.synchronize()
        outputs = group.each(op.call)
        torch.cuda.synchronize()
        op.check(outputs, truth)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_a_deep_queue_with_pauses(patch: pytest.MonkeyPatch, pytestconfig: pytest.Config, ranks: int) -> None:
    """Ops of changing kinds follow each other on the same memory; ranks are held up at random. --iterations 10000 for the long run."""
    group = Group(patch, ranks)
    ops = [Op(group, shape, form=form) for shape in shapes(ranks) for form in forms_of(shape, ranks)[:2]]
    truths = [op.truth() for op in ops]
    for op in ops:
        group.each(op.call)  # loads the kernels and makes the tables
        torch.cuda.synchronize()
    dice = random.Random(ranks)
    for _ in range(0, pytestconfig.getoption("--iterations"), 12):
        order = [dice.randrange(len(ops)) for _ in range(12)]
        results = []
        for which in order:
            if dice.random() < 0.5:
                with torch.cuda.stream(group.streams[dice.randrange(ranks)]):
                    torch.cuda._sleep(int(dice.random() * 300_000))
            results.append(group.each(ops[which].call))
        torch.cuda.synchronize()
        for which, outputs in zip(order, results, strict=True):
            ops[which].check(outputs, truths[which])


@pytest.mark.parametrize("ranks", [2, 4])
def test_graphs_among_eager_calls(patch: pytest.MonkeyPatch, ranks: int) -> None:
    """Captured calls are replayed an odd number of times between eager ones."""
    group = Group(patch, ranks)
    ops = [Op(group, shape, form=form) for shape in shapes(ranks)[::2] for form in forms_of(shape, ranks)[:2]]
    for op in ops:
        group.each(op.call)
        torch.cuda.synchronize()
    dice = random.Random(ranks)
    used = [*ops[:3], *ops[3:-2:3], *ops[-2:]]
    graphs = [torch.cuda.CUDAGraph() for _ in range(ranks)]
    captured: list[list[list[torch.Tensor]]] = []
    for rank, graph in enumerate(graphs):
        with torch.cuda.graph(graph, stream=group.streams[rank]):
            captured.append([op.call(rank) for op in used])
    for _ in range(6):
        for op in ops:
            op.refill()
        truths = [op.truth() for op in ops]
        torch.cuda.synchronize()
        for _ in range(dice.choice((1, 2, 3))):
            group.each(lambda rank: graphs[rank].replay())
        torch.cuda.synchronize()
        for number, op in enumerate(used):
            op.check([captured[rank][number] for rank in range(ranks)], truths[ops.index(op)])
        for _ in range(dice.choice((0, 1, 3))):
            which = dice.randrange(len(ops))
            outputs = group.each(ops[which].call)
            torch.cuda.synchronize()
            ops[which].check(outputs, truths[which])


@pytest.mark.parametrize("pushed", [False, True])
@pytest.mark.parametrize("kind", [GATHER, SCATTER, REDUCE])
def test_a_rank_that_stays_away(patch: pytest.MonkeyPatch, kind: str, pushed: bool) -> None:
    """The others give up in time, fill their outputs with NaN and leave a record."""
    group = Group(patch, 3, timeout_s=1.5)
    shape = Shape(kind, 48 if kind == GATHER else 144, (512,), 512)
    op = Op(group, shape, form=forms_of(shape, 3)[pushed])
    group.each(op.call)
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record(group.streams[0])
    outputs = group.each(op.call, ranks=[0, 1])
    end.record(group.streams[0])
    torch.cuda.synchronize()
    assert 1e3 <= start.elapsed_time(end) <= 6e3
    for rank in (0, 1):
        assert outputs[rank][0].isnan().all(), rank
        assert group.links[rank].has_record()
    records = [group.links[rank].read_record() for rank in (0, 1)]
    first_hand = [record for record in records if record.site]
    assert first_hand and all(record.site == 7 and record.expected > record.seen for record in first_hand)
    if kind != REDUCE:  # there a rank may also wait for a sum of one that waits itself
        assert any(record.peer == 2 for record in first_hand)


@pytest.mark.parametrize("shape", [Shape(GATHER, 256, (512,), 512), Shape(GATHER, 37, (512, 264), 520)], ids=str)
@pytest.mark.parametrize("ranks", [2, 4])
def test_what_follows_a_gather_may_overwrite_its_shard(patch: pytest.MonkeyPatch, ranks: int, shape: Shape) -> None:
    """However late the copy stream is: the kernel ends behind the rank's own copies."""
    group = Group(patch, ranks)
    op = Op(group, shape, form=False)
    group.each(op.call)  # loads the kernels and makes the tables
    torch.cuda.synchronize()
    dice = random.Random(ranks)

    def call(rank: int) -> list[torch.Tensor]:
        outputs = op.call(rank)
        op.x[rank].fill_(float("nan"))
        return outputs

    for _ in range(12):
        op.refill()
        truth = op.truth()
        torch.cuda.synchronize()
        for link in group.links:
            with torch.cuda.stream(link.side):
                torch.cuda._sleep(int(dice.choice((0, 0.1, 1)) * 2_000_000))
        outputs = group.each(call)
        torch.cuda.synchronize()
        op.check(outputs, truth)
