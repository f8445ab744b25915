"""Memory primitives of tscompile.language between GPUs, over the symmetric heap: copies, loads, stores, atomics, tiles, and bandwidth.

    torchrun --nproc-per-node 2 --local-ranks-filter 0 -m pytest tests/gpu/test_language.py tests/gpu/test_language_sync.py -s

Every rank runs this file. The kernels are those of tests/language, compiled before the first test (tests/language/forms.py).
"""

from __future__ import annotations

import math
import random

import pytest
import torch

from tests.gpu.language_group import Group, agree
from tests.language import forms, kernels, plans
from tests.language.copy_kernels import TILE
from tests.language.rank_kernels import ADD_FORMS, RANKS, RED_FORMS, threads_of

# ---- copies ----


@pytest.mark.parametrize("seed", range(4))
def test_copies(group: Group, seed: int) -> None:
    """All alignments, sizes from nothing to some MiB, by blocks and warps, to and from all ranks at once."""
    copy(group, "copies", forms.JOBS, seed)


@pytest.mark.parametrize("seed", range(2))
def test_tiles(group: Group, seed: int) -> None:
    ok = group.zeros(forms.TILES)
    copy(group, "tiles", forms.TILES, seed, unit=16, largest=TILE, ok=ok)
    assert ok.tolist() == [1] * forms.TILES


def copy(group: Group, name: str, jobs: int, seed: int, unit: int = 1, largest: int = 1 << 40, **more) -> None:
    layout = plans.Layout(group.size, group.memory.data_bytes)
    sources = [plans.source(layout, rank).to(group.ranks.device) for rank in range(group.size)]
    planned = [plans.plan(layout, rank, jobs, seed, unit, largest) for rank in range(group.size)]
    data = group.memory.data(group.rank)
    plans.prepare(layout, data, sources[group.rank])
    table = plans.table(planned[group.rank]).to(group.ranks.device)
    group.meet()
    group.run(name, jobs, ctx=group.context(), table=table, **more)
    group.meet()
    assert not (fault := plans.faults(layout, group.rank, data, planned, sources)), fault


@pytest.mark.parametrize(("dtype", "item"), forms.TYPED)
def test_copies_of_elements(group: Group, dtype: str, item: int) -> None:
    if not group.cuda and dtype == "bfloat16":
        pytest.skip("C has no such type")
    size, kind = 3000, getattr(torch, dtype)

    def drawn(rank: int, turn: int) -> tuple[torch.Tensor, int, int, int]:
        chance = random.Random(f"{rank} {turn}")
        start, at = chance.randrange(100), chance.randrange(100)
        x = torch.randint(0, 256, (size * item,), dtype=torch.uint8, generator=torch.Generator().manual_seed(rank))
        return x.to(group.ranks.device), start, at, chance.choice([1, 7, 128, size - 100, chance.randrange(2900)])

    problems = []
    for turn in range(20):
        there = group.memory.data(group.rank)[: 2 * size * item].view(2, -1)
        there.fill_(plans.POISON)
        y = torch.full((2, size * item), plans.POISON, dtype=torch.uint8, device=group.ranks.device)
        x, start, at, count = drawn(group.rank, turn)
        typed = {"x": x.view(kind), "y": y.view(kind)}
        group.meet()
        group.run(
            "typed_copies", dtype, item, ctx=group.context(), to=group.next, start=start, at=at, count=count, **typed
        )
        group.meet()
        want = torch.full_like(y, plans.POISON)
        want[:, start * item : (start + count) * item] = x[start * item : (start + count) * item]
        if not torch.equal(y, want):
            problems.append(f"turn {turn}: what came back of elements {start} to {start + count}")
        x, start, at, count = drawn(group.last, turn)
        want = torch.full_like(y, plans.POISON)
        want[:, at * item : (at + count) * item] = x[start * item : (start + count) * item]
        if not torch.equal(there, want):
            problems.append(f"turn {turn}: what rank {group.last} put, {count} elements of {start} to {at}")
        group.meet()
    agree(problems)


# ---- loads, stores and atomics, in memory of every rank ----


@pytest.mark.parametrize(("dtype", "element"), forms.ELEMENTS)
def test_loads_and_stores(group: Group, dtype: str, element: str) -> None:
    if not group.cuda and "float" in dtype and torch.finfo(getattr(torch, dtype)).bits < 32:
        pytest.skip("C has no such type")
    kind, loads, stores = getattr(torch, dtype), kernels.word_forms("ld"), kernels.word_forms("st")
    sent = torch.arange(1, len(stores) + 1).to(kind)
    access(group, ("every_word", dtype, element), torch.arange(100, 36, -1).to(kind), (32,), sent, loads, stores)


@pytest.mark.parametrize(("dtype", "lanes"), forms.WIDE)
def test_loads_and_stores_of_128_bits(group: Group, dtype: str, lanes: int) -> None:
    cells = torch.arange(32 * lanes).to(getattr(torch, dtype)).view(32, lanes)
    loads, stores = kernels.word_forms("ld", wide=True), kernels.word_forms("st", wide=True)
    form = ("every_wide_word", dtype, lanes)
    access(group, form, cells, (16, lanes), 2 * cells[: len(stores)], loads, stores)


def access(group: Group, form: tuple, cells: torch.Tensor, shape: tuple, sent: torch.Tensor, loads, stores) -> None:
    """Run the form on cells of each rank by every rank: load the first ones, store `sent` to those of the second half."""
    device, room = group.ranks.device, cells.numel() * cells.element_size()
    half, problems = len(cells) // 2, []
    want = cells.clone()
    want[half : half + len(sent)] = sent
    want, cells = (t.view(torch.uint8).view(len(cells), -1).to(device) for t in (want, cells))
    places = group.memory.data(group.rank)[: RANKS * room].view(RANKS, len(cells), -1)
    places.copy_(cells)
    group.meet()
    kind = getattr(torch, form[1])
    for owner in range(group.size):
        out = group.zeros(math.prod(shape) * kind.itemsize, dtype=torch.uint8).view(kind).view(shape)
        there = group.memory.data(owner)[group.rank * room :][:room].view(kind)
        group.run(*form, cells=there.view(-1, *shape[1:]), out=out)
        group.ranks.synchronize()
        got = out.view(torch.uint8).view(shape[0], -1)
        problems += [
            f"{how} of rank {owner}'s memory: {got[i].tolist()}, not {cells[i].tolist()}"
            for i, how in loads
            if not torch.equal(got[i], cells[i])
        ]
        if got[len(loads) :].any():
            problems.append("something beside what was loaded")
    group.meet()
    for by in range(group.size):
        problems += [
            f"{how} by rank {by}: {places[by, half + i].tolist()}, not {want[half + i].tolist()}"
            for i, how in stores
            if not torch.equal(places[by, half + i], want[half + i])
        ]
        if not torch.equal(places[by], want):
            problems.append(f"rows of rank {by} are wrong: {(places[by] != want).any(1).nonzero().flatten().tolist()}")
    agree(problems)


@pytest.mark.parametrize("dtype", forms.SUMS)
def test_atomics(group: Group, dtype: str) -> None:
    """All threads of all ranks at once; a cell is shared as far as the scope allows. Each must find another value there."""
    kind, blocks, threads = getattr(torch, kernels.carrier(dtype)), forms.ADDERS, threads_of(group.dialect)
    all_forms, problems = ADD_FORMS + RED_FORMS, []
    count, room = len(all_forms) * RANKS * blocks, len(ADD_FORMS) * RANKS * blocks * threads
    for owner in [*range(group.size)] * 3:
        data = group.memory.data(owner, kind)
        cells = data[:count].view(len(all_forms), RANKS, blocks)
        before = data[1 << 15 :][:room].view(len(ADD_FORMS), RANKS, blocks, threads)
        if owner == group.rank:
            cells.zero_()
            before.fill_(-1)
        group.meet()
        group.run("adds", dtype, blocks, cells=cells, before=before, rank=group.rank)
        group.meet()
        if owner == group.rank:
            problems += wrong_sums(cells.cpu(), before[:, : group.size].cpu(), group.size)
    agree(problems)


def wrong_sums(cells: torch.Tensor, before: torch.Tensor, size: int) -> list[str]:
    _, _, blocks, threads = before.shape
    shapes = {"sys": (1, 1), "gpu": (size, 1), "cta": (size, blocks)}
    problems = []
    for i, (name, order, scope) in enumerate(ADD_FORMS + RED_FORMS):
        rows, columns = shapes[scope]
        each = size * blocks * threads // rows // columns
        want = torch.zeros_like(cells[i])
        want[:rows, :columns] = each
        if not torch.equal(cells[i], want):
            problems.append(f"{name} {order} {scope}: sums {cells[i].tolist()}, not {each}")
        if i < len(before):
            found = before[i].reshape(rows, -1) if columns == 1 else before[i].reshape(rows * blocks, -1)
            if not torch.equal(found.sort().values, torch.arange(each).to(found.dtype).expand_as(found)):
                problems.append(f"{name} {order} {scope}: old values that are not each there once")
    return problems


def test_bulk_copies(group: Group) -> None:
    x, ok = (
        [torch.randn(1024, generator=torch.Generator().manual_seed(rank)) for rank in range(group.size)],
        group.zeros(1),
    )
    group.run("bulk", ctx=group.context(), x=x[group.rank].to(group.ranks.device), to=group.next, ok=ok)
    group.meet()
    assert ok.tolist() == [1]
    assert torch.equal(group.memory.data(group.rank, torch.float32)[:2048].cpu(), torch.cat([x[group.last]] * 2))
    assert group.memory.flags(group.rank, torch.int32)[:2].tolist() == [1, 2]


# ---- bandwidth ----


@pytest.mark.gpu
def test_bandwidth(group: Group) -> None:
    """Of 64 MiB by many blocks: 0.95 or more of what plain kernels push and pull in the same run."""
    from benchmarks import bench_language
    from benchmarks.gpu_harness import Timer

    rows = [group.memory.data(rank) for rank in range(group.size)]
    cases = bench_language.measure(rows, group.rank, Timer(group.ranks.device), 64 << 20, rounds=9)
    for case in cases:
        group.ranks.say(*(f"\n{line}" for line in bench_language.lines(case)))
    shares = {case["name"]: case["of_peak"]["value"] for case in cases}
    assert min(shares.values()) >= 0.95, shares
