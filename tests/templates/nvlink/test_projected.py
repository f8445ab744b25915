"""Matmuls whose results are exchanged over NVLink: chunks, copies and the kernel's table, run by plain Python, give what is asked."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cases import Case, projected
from tscompile.lowering import cost_model, planner
from tscompile.options import Options
from tscompile.problem import Delivery, Departure, Fuse, FusionProblem, Gemm, Keep, Plan
from tscompile.templates.all_to_all import output_shapes
from tscompile.templates.attention import sent_shapes
from tscompile.templates.nvlink import widths
from tscompile.templates.nvlink.kernels.config import WORD_BYTES
from tscompile.templates.nvlink.legs import rows_of
from tscompile.templates.nvlink.projected import Chunk, Projection, _best, _Way, project

from .fake_gpu import most_chunks
from .test_legs import ITEMS, offset, words_of


def gemms_of(case: Case) -> list[Gemm]:
    lhs, rhs, *_ = case.args[0]
    return [Gemm(a.shape[0], b.shape[1], a.shape[1]) for a, b in zip(lhs, rhs, strict=True)]


def projection_of(case: Case) -> Projection:
    found = project(case.plan, len(case.args), gemms_of(case), case.args[0][3])
    assert found is not None
    return found


def computed(found: Projection, args: Sequence[Any]) -> list[Tensor]:
    """The chunks of a rank."""
    lhs, rhs, biases, _ = args
    chunks = []
    for chunk in found.chunks:
        columns = slice(chunk.first, chunk.end)
        chunks.append(lhs[chunk.matmul] @ rhs[chunk.matmul][:, columns])
        if biases[chunk.matmul] is not None:
            chunks[-1] += biases[chunk.matmul][columns]
    return chunks


def sent(found: Projection, chunks: Sequence[Tensor], owner: int) -> Tensor:
    """A rank's part of the slot of `owner`, as words, from the copies alone."""
    part = torch.full((found.batches.count * found.batches.words, ITEMS), float("nan"), dtype=chunks[0].dtype)
    for parcel in (parcel for parcels in found.parcels for parcel in parcels):
        source = words_of(chunks[parcel.tensor])
        start, place = (parcel.source + owner * parcel.step) // WORD_BYTES, parcel.target // WORD_BYTES
        pitch, target, width = (value // WORD_BYTES for value in (parcel.pitch, parcel.target_pitch, parcel.width))
        for row in range(parcel.rows):
            there = part[place + row * target : place + row * target + width]
            assert there.isnan().all(), "each word is sent once"
            there.copy_(source[start + row * pitch : start + row * pitch + width])
    return part


def collected(found: Projection, case: Case, computed: Sequence[Sequence[Tensor]], rank: int) -> list[Tensor]:
    """What the kernel makes of the slot: the own block from its chunk, the others in the order of each leg's grid."""
    plan, sizes = case.plan, case.args[0][3]
    shapes = output_shapes(plan.deliveries, plan.joins, sent_shapes(plan.departures, sizes))
    outputs = [torch.full(shape, float("nan"), dtype=computed[0][0].dtype) for shape in shapes]
    rows = rows_of(found.legs, found.batches)
    for source, chunks in enumerate(computed):
        part = None if source == rank else sent(found, chunks, rank)
        for number, leg in enumerate(found.legs):
            _, words, first, count, *_ = row = rows[number]
            for target, place in zip(leg.targets, rows[len(found.legs) + first :][:count], strict=True):
                out = words_of(outputs[target.tensor])
                for word in range(words):
                    here, there = offset(row, word), offset(place, word)
                    assert here is not None
                    if part is None:
                        value = words_of(chunks[leg.source.tensor])[leg.source.start + rank * row[4] + here]
                    else:
                        value = part[found.batches.firsts[number] * found.batches.words + word]
                    if there is not None:
                        out[target.start + source * place[4] + there] = value
    return outputs


def check(case: Case, chunks: int) -> None:
    found = projection_of(case)
    assert len(found.chunks) == chunks
    assert sorted(leg for chunk in found.chunks for leg in chunk.legs) == list(range(len(found.legs)))
    results = [computed(found, args) for args in case.args]
    rank = len(case.args) - 1
    case.check(rank, collected(found, case, results, rank))


@pytest.mark.parametrize("spelling", [0, 1, 2])
@pytest.mark.parametrize(("parts", "chunks"), [((3,), 3), ((1, 1, 1), 3), ((2, 3), 5), ((1,), 1), ((4,), 3)])
@pytest.mark.parametrize("ranks", [2, 3])
def test_results(
    monkeypatch: pytest.MonkeyPatch, ranks: int, parts: tuple[int, ...], chunks: int, spelling: int
) -> None:
    if spelling == 2 and sum(parts) > 4:
        pytest.skip(
            "a joined output for each of five exchanges, beside one of its own: more places than the kernel has"
        )
    most_chunks(monkeypatch)
    check(projected(ranks, sum(parts), "bfloat16", parts=parts, dim=8, bias=True, spelling=spelling), chunks)


@pytest.mark.parametrize("seed", range(12))
def test_ragged_sizes(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    most_chunks(monkeypatch)
    dice = random.Random(seed)
    sizes = {"batch": dice.choice([1, 2, 5]), "tokens": dice.choice([1, 3, 7]), "dim": dice.choice([8, 16, 24])}
    parts = dice.choice([(3,), (2,), (1, 2), (1, 1, 1)])
    case = projected(dice.choice([2, 3]), seed, "bfloat16", parts=parts, spelling=dice.choice([0, 1]), **sizes)
    check(case, sum(parts))


@pytest.mark.parametrize("spelling", [0, 1, 2])
@pytest.mark.parametrize(("parts", "chunks", "copies"), [((3,), 1, [1]), ((4,), 2, [1, 1, 1]), ((2, 3), 3, [1, 1, 1])])
@pytest.mark.parametrize("batch", [1, 3])
def test_legs_that_lie_equally_far_apart_are_one(
    monkeypatch: pytest.MonkeyPatch, batch: int, parts: tuple[int, ...], chunks: int, copies: list[int], spelling: int
) -> None:
    """One copy to each peer sends them, whatever the number of parts; targets take their index of the dim that is new."""
    most_chunks(monkeypatch, chunks)
    if spelling == 2 and sum(parts) > 4:
        pytest.skip("more places than the kernel has")
    case = projected(3, sum(parts), "bfloat16", parts=parts, batch=batch, tokens=5, dim=16, spelling=spelling)
    found = projection_of(case)
    sent = [sum(len(found.parcels[leg]) for leg in chunk.legs) for chunk in found.chunks]
    assert sent == [1] * chunks, "a copy of each chunk"
    assert sum(len(leg.targets) for leg in found.legs) == len(case.plan.deliveries)
    check(case, chunks)


def test_one_chunk_where_nothing_is_gained() -> None:
    """A small matmul is not cut: each part would cost a launch, and copies of their own."""
    case = projected(2, 0, "bfloat16", dim=8)
    assert [chunk.columns for chunk in projection_of(case).chunks] == [3 * 2 * 8]
    check(case, 1)


def attention(
    tokens: int, ranks: int, heads: Sequence[int] = (32, 32, 32), dim: int = 128
) -> tuple[Plan, Gemm, list[int]]:
    """So many heads of q, k and v of one projection side by side, for the tokens of a rank, as Ulysses exchanges them."""
    sizes, departures, first = list[int](), [], 0
    for count in heads:
        sizes += [tokens, ranks, count // ranks, dim]
        departures.append(Departure(0, 4, (), (1, 0, 2, 3), columns=(first * dim, count * dim)))
        first += count
    deliveries = tuple(Delivery(i, (0, 1, 2, 3)) for i in range(3))
    plan = Plan(
        "matmul_all_to_all", "", "", "bfloat16", deliveries=deliveries, joins=(1,) * 3, departures=tuple(departures)
    )
    return plan, Gemm(tokens, sum(heads) * dim, heads[0] * dim), sizes


@pytest.mark.parametrize(("tokens", "ranks"), [(8192, 2), (4096, 4), (16384, 4)])
def test_queries_travel_while_keys_and_values_are_projected(tokens: int, ranks: int) -> None:
    plan, gemm, sizes = attention(tokens, ranks)
    found = project(plan, ranks, [gemm], sizes)
    assert found is not None and [(chunk.first, chunk.columns, chunk.legs) for chunk in found.chunks] == [
        (0, 2 * gemm.k, (0,)),  # queries and keys together: a third matmul would take the host more than it gains
        (2 * gemm.k, gemm.k, (1,)),  # what is exposed in the end is as short as can be
    ]
    assert [leg.words for leg in found.legs] == [2 * found.legs[1].words, found.legs[1].words]
    assert all([parcel.width for parcel in leg] == [32 * 128 * 2 // ranks] for leg in found.parcels), (
        "rows of a rank's heads"
    )
    one = widths.cublas_us(gemm.m, gemm.n, gemm.k)
    sent = 3 * found.legs[1].words * WORD_BYTES * (ranks - 1) / (1 << 20)
    assert one < found.us < one + widths.copied_us(sent, 3 * (ranks - 1))


def question(tokens: int, ranks: int) -> tuple[FusionProblem, Plan]:
    plan, gemm, sizes = attention(tokens, ranks)
    grids = tuple(tuple(sizes[4 * i : 4 * i + 4]) for i in range(3))
    sent = 2 * gemm.m * gemm.n
    problem = FusionProblem(plan.kind, ranks, True, "cuda", "bfloat16", sent, (gemm,), exchanges=3, grids=grids)
    return problem, plan


@pytest.mark.parametrize(("tokens", "ranks"), [(8192, 2), (4096, 4), (16384, 4)])
def test_the_planner_takes_it(tokens: int, ranks: int) -> None:
    problem, plan = question(tokens, ranks)
    decision = planner.plan(problem, plan, Options())
    assert isinstance(decision, Fuse) and decision.executor == "nvlink"
    gemm = problem.gemms[0]
    alone = cost_model.predict(replace(problem, kind="all_to_all_permute")).fused_us
    behind = widths.cublas_us(gemm.m, gemm.n, gemm.k) + alone
    assert behind - alone < decision.predicted_fused_us < behind < decision.predicted_original_us


def test_the_planner_keeps_what_is_small() -> None:
    decision = planner.plan(*question(64, 2), Options())
    assert isinstance(decision, Keep) and "with the exchange and its permutes fused" in decision.reason


def test_one_exchange_of_one_matmul_is_left_to_the_kernel_that_pushes() -> None:
    problem, plan = question(4096, 4)
    one = replace(plan, departures=plan.departures[:1], deliveries=plan.deliveries[:1], joins=(1,))
    kept = planner.plan(replace(problem, grids=problem.grids[:1]), one, Options(fuse="always"))
    assert isinstance(kept, Keep) and "nothing would be left to compute" in kept.reason


def test_fewer_keys_and_values_than_queries() -> None:
    plan, gemm, sizes = attention(4096, 4, heads=(32, 8, 8))
    found = project(plan, 4, [gemm], sizes)
    assert found is not None
    assert [(chunk.first, chunk.columns) for chunk in found.chunks] == [(0, 4096), (4096, 2048)]


def way(chunks: int, gpu_us: float, host_us: float) -> _Way:
    return _Way([Chunk(0, 0, 8, 8, ())] * chunks, [], gpu_us, host_us)


@pytest.mark.parametrize(
    ("ways", "best"),
    [
        ([way(1, 500, 50), way(2, 410, 140), way(3, 397, 200)], 2),  # as good as the best, as far as is known
        ([way(1, 500, 50), way(2, 430, 140), way(3, 397, 200)], 3),
        ([way(1, 90, 80), way(2, 70, 140), way(3, 60, 200)], 1),  # the GPU would wait for the host
        ([way(2, 100, 140), way(2, 99, 140), way(2, 120, 140)], 2),
    ],
)
def test_the_host_counts_where_it_takes_longer_and_where_nothing_else_does(ways: list[_Way], best: int) -> None:
    found = _best(ways)
    assert len(found.chunks) == best and found.us == min(w.us for w in ways if len(w.chunks) == best)


def test_what_copies_cannot_send() -> None:
    case = projected(2, 0, "bfloat16", dim=8)
    gemms, sizes = gemms_of(case), case.args[0][3]
    (first, *others) = case.plan.departures

    def refused(**changes: Any) -> bool:
        plan = replace(case.plan, **changes)
        return project(plan, 2, gemms, sizes) is None

    assert not refused()
    turned = replace(first, order=(2, 0, 3, 1))  # its rows are tokens
    assert refused(departures=(turned, *others))
    short = projected(2, 0, "bfloat16", dim=4)
    assert project(short.plan, 2, gemms_of(short), short.args[0][3]) is None, "heads of 8 bytes"
    # Of each token every other word, in blocks of three: rows of a word, of nine places that no pitch leads to.
    departure = Departure(0, 5, (), (0, 1, 2, 3, 4))
    many = Plan(
        "matmul_all_to_all",
        "",
        "",
        "bfloat16",
        deliveries=(Delivery(0, (0, 1, 2, 3)),),
        joins=(1,),
        departures=(replace(departure, sizes=6, fixed=((2, 0), (4, 0)), order=(0, 1, 2, 3)),),
    )
    for blocks in (2, 9):
        found = project(many, 2, [Gemm(2 * 9, 2 * blocks * 2 * 8, 8)], [2, 9, 2, blocks, 2, 8])
        assert (found is None) == (blocks > 4)
