"""Synchronising primitives of tscompile.language between GPUs: signals, waits, messages, barriers, warps. See test_language.py."""

from __future__ import annotations

import random
import time

import pytest
import torch

from tests.gpu.language_group import Group, agree
from tests.language import forms, kernels
from tests.language.message_kernels import OUT, PAUSES, WAYS, WORDS
from tests.language.rank_kernels import MOVES, PRIMITIVES, RANKS, START
from tests.language.thread_kernels import PART, SHUFFLES, VOTES

GPU = pytest.mark.gpu


# ---- signals, waits and messages ----


def words(dtype: str) -> tuple[torch.dtype, list[int]]:
    """The dtype of the carrier, and values about which a comparison of the wrong signedness errs."""
    bits = int(dtype.removeprefix("u")[3:])
    return getattr(torch, f"int{bits}"), [-1] if dtype.startswith("i") else [-(1 << (bits - 1))]


@pytest.mark.parametrize(
    ("dtype", "wrapped"), [*((dtype, False) for dtype in forms.FLAGS), *((dtype, True) for dtype in forms.WRAPPED)]
)
def test_signals_and_waits(group: Group, dtype: str, wrapped: bool) -> None:
    """In a ring of every step, in both directions: nobody gets through before the signal, or without what it announces."""
    kind, (value,) = words(dtype)
    compares = ["epoch"] if wrapped else list(START)
    form = ("signals", dtype, ("epoch",)) if wrapped else ("signals", dtype)
    if wrapped:  # from the largest value to the smallest
        value = 0 if dtype.startswith("u") else torch.iinfo(kind).min
    count, problems = 2 * len(compares), []
    first = [(value + START[c] + (1 << 63)) % (1 << 64) - (1 << 63) for c in compares] * 2
    first = torch.tensor(first).to(kind)
    for step in [*range(1, group.size)] * 5:
        pauses = [
            [random.Random(f"{rank} {step} {i}").randrange(200) for i in range(count)] for rank in range(group.size)
        ]
        to, source = (group.rank + step) % group.size, (group.rank - step) % group.size
        flags = group.memory.flags(group.rank, kind)[: RANKS * count].view(RANKS, count)
        flags.copy_(first.to(group.ranks.device))
        group.memory.data(group.rank, torch.int32)[: RANKS * count].zero_()
        results = group.zeros(count, 2)
        mine = group.tensor(pauses[group.rank], torch.int32)
        group.meet()
        time.sleep(random.random() / 200)
        group.run(*form, ctx=group.context(), value=value, to=to, source=source, pauses=mine, results=results)
        group.meet()
        want = [[1, pauses[source][i] + 1000 + i] for i in range(count)]
        problems += [
            f"{('wait', 'warp_wait')[i // len(compares)]} {compares[i % len(compares)]} from rank {source}: {got}, not {row}"
            for i, (got, row) in enumerate(zip(results.tolist(), want, strict=True))
            if got != row
        ]
        moved = first[0].item() + MOVES[compares[0]]
        if not wrapped and flags[source, 0].item() != moved:
            problems.append(f"the flag is {flags[source, 0].item()}, not {moved}")
    agree(problems)


@pytest.mark.parametrize("way", WAYS)
def test_messages(group: Group, way: str) -> None:
    """Never stale: data, then a flag, thousands of times, with pauses at random."""
    near, rounds = way == "fence_gpu", 4000 if group.cuda else 20
    if near and not group.cuda:
        pytest.skip("blocks run one after another")
    chance = random.Random(group.rank)
    pauses = [chance.choice([0, 0, chance.randrange(5), chance.randrange(40)]) for _ in range(PAUSES)]
    mine, out = group.zeros(forms.MESSENGERS, WORDS), group.zeros(forms.MESSENGERS, OUT)
    to, source = (group.rank, group.rank) if near else (group.next, group.last)
    group.memory.data(group.rank).zero_()
    group.meet()
    begin = time.monotonic()
    group.run(
        "messages",
        way,
        forms.MESSENGERS,
        ctx=group.context(),
        to=to,
        source=source,
        rounds=rounds,
        pauses=group.tensor(pauses, torch.int32),
        mine=mine,
        out=out,
    )
    group.ranks.synchronize()
    seconds = time.monotonic() - begin
    group.meet()
    group.ranks.say(f"{way}: {1e6 * seconds / rounds:.1f} us a round")
    agree(
        [
            f"block {block}: {row[0]} stale words (round, index, value {row[1:4]}), {row[4]} of {2 * rounds} waits ended well"
            f"; record {group.memory.record(group.rank)}"
            for block, row in enumerate(out.tolist())
            if row[0] or row[4] != 2 * rounds
        ]
    )


@pytest.mark.parametrize("which", range(len(PRIMITIVES)), ids=PRIMITIVES)
def test_waits_that_are_given_up(group: Group, which: int) -> None:
    """One rank runs out of time; it says so, and the waits of all others end at once, whatever they wait in."""
    if not group.cuda and which >= 3:
        pytest.skip("not on the C target")
    giver, others = (
        which % group.size,
        [0, 1, 3, 4, 5] if group.cuda else [0, 1],
    )  # a barrier of all others would be met
    gives = group.rank == giver
    chosen = which if gives else others[(which + group.rank) % len(others)]
    flags = group.memory.flags(group.rank, torch.uint8)
    flags[:16].view(torch.int32)[1] = 9
    flags[64:96].view(torch.int64)[1] = -2
    word, problems = group.zeros(1, dtype=torch.int64), []
    want = [
        group.rank + 1,
        group.next,
        *[(60, 5, 9), (61, 1 << 40, -2), (62, 77, 0), (63, 0, 1), (64, 1, 0), (65, 1, 0)][which],
    ]
    if PRIMITIVES[which] in ("gpu_wait", "grid_sync"):
        want[1] = group.rank  # it waited for its own blocks
    group.meet()
    for again in (False, True):  # then once more, in a group that is aborted already
        word.zero_()  # arrivals of a wait that was given up
        results = group.tensor([7, 7], torch.int32)
        begin = time.monotonic()
        context = group.context(0.3 if gives and not again else 60.0)
        group.run("stuck", ctx=context, which=chosen, peer=group.next, word=word, results=results)
        group.ranks.synchronize()
        seconds = time.monotonic() - begin
        if results.tolist() != [0, 1]:
            problems.append(f"{PRIMITIVES[chosen]} returned {results.tolist()}, not [0, 1]")
        if not (0.3 if gives and not again else 0) <= seconds < 10:
            problems.append(f"{PRIMITIVES[chosen]} took {seconds:.2f} s")
        group.meet()
        record = group.memory.record(group.rank)
        if PRIMITIVES[which] == "barrier" and gives and record[1] != group.rank and 0 <= record[1] < group.size:
            record[1] = want[1]  # whichever of the others it looked at first
        if record != (want if gives else [0] * 5):
            problems.append(f"record {record}, not {want if gives else 'zeros'}")
        if group.memory.abort(group.rank) != giver + 1:
            problems.append(f"the abort word is {group.memory.abort(group.rank)}, not {giver + 1}")
        group.meet()
    group.clean()
    problems += met(group, 1, 3)
    agree(problems)


# ---- threads, blocks and ranks that meet ----


def met(group: Group, blocks: int, rounds: int) -> list[str]:
    """All ranks (and blocks) meet in every round, and see what the others wrote before."""
    word, out = group.zeros(1, dtype=torch.int64), group.zeros(blocks, 2)
    group.memory.data(group.rank, torch.int32)[: RANKS * blocks].zero_()
    group.meet()
    group.run("meetings", blocks, ctx=group.context(), word=word, rounds=rounds, out=out)
    group.meet()
    wrong, times = out[:, 0].tolist(), out[:, 1].tolist()
    if any(wrong) or times != [2 * rounds, *[0] * (blocks - 1)]:
        record = group.memory.record(group.rank)
        return [f"{sum(wrong)} words before their time, {times[0]} of {2 * rounds} meetings, record {record}"]
    return []


def test_barrier_of_ranks(group: Group) -> None:
    agree(met(group, 1, 5000 if group.cuda else 50))


@GPU
def test_all_blocks_of_all_ranks_meet(group: Group) -> None:
    agree(met(group, forms.GRID, 500))


@GPU
def test_blocks_of_a_grid_meet_in_every_launch(group: Group) -> None:
    blocks, problems = forms.GRID, []
    cells, word, out = group.zeros(2, blocks), group.zeros(2, dtype=torch.int64), group.zeros(3, blocks)
    for launch in range(1, 101):
        group.run("grid", blocks, ctx=group.context(), cells=cells, word=word, out=out)
        if out.tolist() != [[launch] * blocks, [launch] * blocks, [1, *[0] * (blocks - 1)]]:
            problems.append(f"launch {launch}: {out.tolist()}")
        if word.tolist() != [2 * launch << 32, launch << 32]:
            problems.append(f"launch {launch}: {word.tolist()}")
    group.meet()
    agree(problems)


def test_fences_votes_and_a_barrier(group: Group) -> None:
    x, out = group.tensor([1.0, 2.0, 4.0, 0.0], torch.float32), group.zeros(16)
    group.run("threads", ctx=group.context(), epoch=3, out=out, x=x)
    group.meet()
    alone, lane = not group.cuda, int(out[5])  # a warp of one
    assert out[:5].tolist() == [1, 1, int(alone), 1, lane if alone else min(lane + 1, 31)]
    assert x.tolist() == [1, 2, 4, 7]
    assert group.memory.flags(group.rank, torch.int32)[64:72].tolist() == [3] * group.size + [0] * (8 - group.size)


@GPU
def test_votes(group: Group) -> None:
    chance, warps, problems = random.Random(3), 4, []
    for turn in range(50):
        bits = [chance.choice([0, -1, 1, PART, ~PART, chance.getrandbits(32)]) & 0xFFFFFFFF for _ in range(warps)]
        out = group.zeros(32 * warps, VOTES)
        group.run("votes", bits=group.tensor([signed(word) for word in bits], torch.int32), out=out)
        heard = out.view(warps, 32, VOTES).tolist()
        for word, lanes in zip(bits, heard, strict=True):
            part = word & PART
            votes = [int(word != 0), int(word == 0xFFFFFFFF), signed(word)]
            some = [int(part != 0), int(part == PART), signed(part)]
            for lane, row in enumerate(lanes):
                want = [*votes, row[3], lane, *(some if 8 <= lane < 24 else [0] * 3)]
                if row != want:
                    problems.append(f"turn {turn}, bits {word:#x}, lane {lane}: {row}, not {want}")
            if sorted(row[3] for row in lanes) != [*[0] * 31, 1]:
                problems.append(f"elected: {[row[3] for row in lanes]}")
    agree(problems)


def signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word


@GPU
@pytest.mark.parametrize("dtype", forms.SHUFFLED)
def test_shuffles(group: Group, dtype: str) -> None:
    kind = getattr(torch, kernels.carrier(dtype))
    x = torch.arange(32).to(torch.float64).mul(1.25 if "float" in dtype else 1 << 24).sub(7).abs().to(kind)
    out = torch.zeros(len(SHUFFLES) + 1, 32, dtype=kind, device=group.ranks.device)
    group.run("shuffles", dtype, x=x.to(group.ranks.device), out=out)
    values, lanes = x.tolist(), range(32)
    want = [
        [values[(7 * lane + 3) % 32] for lane in lanes],
        [values[lane ^ 5] for lane in lanes],
        [values[lane - 3 if lane >= 3 else lane] for lane in lanes],
        [values[lane + 6 if lane + 6 < 32 else lane] for lane in lanes],
        [values[31 - lane] if 8 <= lane < 24 else 0 for lane in lanes],
    ]
    assert out.tolist() == want


@GPU
def test_named_barriers(group: Group) -> None:
    cells, wrong = group.zeros(64), group.zeros(1)
    group.run("handovers", cells=cells, rounds=20000, wrong=wrong)
    assert wrong.tolist() == [0]
    assert cells.tolist() == [20000] * 64


def test_who_and_where(group: Group) -> None:
    out, memory, size = group.zeros(4, RANKS, dtype=torch.int64), group.memory, group.size
    group.run("who", ctx=group.context(), out=out)
    regions = (memory.data, memory.flags, memory.control)
    want = [
        [region(rank).data_ptr() + 8 * rank + 1 for rank in range(size)] + [0] * (RANKS - size) for region in regions
    ]
    assert out.tolist() == [*want, [group.rank, size, *[0] * (RANKS - 2)]]


def test_short_forms_on_a_peer_and_the_epoch_of_a_launch(group: Group) -> None:
    results = group.zeros(8)
    group.memory.control(group.rank)[:4].view(torch.int32)[0] = 30
    group.memory.flags(group.rank, torch.int32)[16:22] = group.tensor([42, 41, 42, 43, 42, 41], torch.int32)
    group.meet()
    group.run("named_waits", ctx=group.context(), to=group.next, passed=12, results=results)
    group.meet()
    assert results.tolist() == [1] * 6 + [group.rank * 10 + group.size, 42]
