"""What calls of `tl.nvshmem` must do, checked by all ranks of a group at once: on CPU ranks and on GPUs alike.

Every rank calls the same functions with the same arguments. Problems are returned and not raised, so that no rank is left waiting.
"""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

import tscompile.language as tl
from tscompile.language.compile import parse

from . import nvshmem_kernels as k

SHARE = k.BYTES // tl.MAX_RANKS
POISON = 0xA5
BEFORE = {"LE": 8, "LT": 8}
FORMS = [("moves", scope) for scope in k.SCOPES] + [("collectives", scope) for scope in k.SCOPES] + [("signals",)]


def dialect_of(group: tl.SymmetricGroup) -> Any:
    return tl.dialect("cuda", nvshmem="inline") if group.device.type == "cuda" else tl.dialect("cpu")


@lru_cache(maxsize=32)
def _compiled(target: str, way: str | None, name: str, *args: str) -> Any:
    d = tl.dialect(target, nvshmem=way)
    return d.compile(parse(lambda: getattr(k, name)(d, *args)))


def kernel(group: tl.SymmetricGroup, name: str, *args: str, way: str = "inline") -> Any:
    return _compiled("cuda" if group.device.type == "cuda" else "cpu", way, name, *args)


def compile_all(group: tl.SymmetricGroup, workers: int = 4) -> None:
    """Every kernel of this file, at once."""
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(lambda form: kernel(group, *form), FORMS))


@dataclass(frozen=True)
class Move:
    """A copy of `size` bytes from src[start] to dst[at], by the call number `which` of MOVES, to or from `pe`."""

    which: int
    at: int
    start: int
    size: int
    value: int
    pe: int


def plan(rank: int, size: int, turn: int, seed: int) -> Move:
    """Any alignment on both sides, and sizes from nothing to a share; each rank writes in a share of its own."""
    chance = random.Random(f"{seed} {rank} {turn}")
    number = chance.choice([0, 1, 2, 3, 7, 16, 17, 64, 100, 1000, 4096, chance.randrange(SHARE - 64)])
    at, start = (chance.randrange(SHARE - number) // step * step for step in chance.choices([1, 1, 2, 4, 16], k=2))
    which = turn % len(k.MOVES)
    return Move(which, rank * SHARE + at, start, number, chance.randrange(1, 1 << 40), chance.randrange(size))


def source(rank: int, turn: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * turn + rank)
    return torch.randint(0, 256, (k.BYTES,), dtype=torch.uint8, generator=generator)


def check_moves(group: tl.SymmetricGroup, scope: str, turns: int, seed: int) -> list[str]:
    run, problems = kernel(group, "moves", scope), []
    dst, src = group.tensor((k.BYTES,), torch.uint8), group.tensor((k.BYTES,), torch.uint8)
    signals = group.tensor((tl.MAX_RANKS, k.SLOTS), torch.int64)  # a row for each writer
    total = [0] * group.size
    for turn in range(turns):
        plans = [plan(rank, group.size, turn, seed) for rank in range(group.size)]
        own = plans[group.rank]
        dst.fill_(POISON)
        src.copy_(source(group.rank, turn))
        group.barrier()
        run(group.nvshmem(), dst, src, signals[group.rank], own.which, own.at, own.start, own.size, own.value, own.pe)
        group.barrier()
        want = torch.full((k.BYTES,), POISON, dtype=torch.uint8)
        for writer, move in enumerate(plans):
            pulls = k.MOVES[move.which].startswith("get")
            if pulls and writer == group.rank:
                data = source(move.pe, turn)
            elif not pulls and move.pe == group.rank:
                data = source(writer, turn)
            else:
                continue
            want[move.at : move.at + move.size] = data[move.start : move.start + move.size]
            name = k.MOVES[move.which]
            if name == "putmem_signal" and int(signals[writer, 0]) != move.value:
                problems.append(f"{name}{scope} of {writer}: the signal is {int(signals[writer, 0])}: {move}")
            if name == "putmem_signal_nbi":
                total[writer] += move.value
                if int(signals[writer, 1]) != total[writer]:
                    problems.append(f"{name}{scope} of {writer}: the sum is {int(signals[writer, 1])}: {move}")
        if not torch.equal(dst.cpu(), want):
            wrong = (dst.cpu() != want).nonzero().flatten()
            problems.append(f"turn {turn}, scope {scope!r}: {len(wrong)} bytes from {int(wrong[0])} on: {plans}")
    if not any(total):
        problems.append("no sum was checked")
    return problems


def check_signals(group: tl.SymmetricGroup, turns: int, pauses: int) -> list[str]:
    run, problems = kernel(group, "signals"), []
    word, signals = group.tensor((k.SLOTS,), torch.int32), group.tensor((k.SLOTS,), torch.int64)
    out = torch.zeros(2 * k.SLOTS, dtype=torch.int32, device=group.device)
    to, last = (group.rank + 1) % group.size, (group.rank - 1) % group.size
    for turn in range(turns):
        before = [BEFORE.get(cmp.name, 0) for cmp in k.COMPARISONS]
        signals.zero_()
        signals[: len(before)].copy_(torch.tensor(before))
        word.zero_()
        group.barrier()
        values = [1 + rank * 1000 + turn * 100000 for rank in range(group.size)]
        run(group.nvshmem(), word, signals, to, last, values[group.rank], pauses * (group.rank + turn) % 5, out)
        group.barrier()
        got = out.tolist()
        waits = [part for i in range(len(k.COMPARISONS)) for part in (1, values[last] + i)]
        if got[:15] != [group.rank, group.size, *waits, 1]:
            problems.append(f"turn {turn}: {got[:15]}, not {[group.rank, group.size, *waits, 1]}")
        if signals[:7].tolist() != [7] * 6 + [2]:
            problems.append(f"turn {turn}: signals {signals.tolist()}")
    return problems


def check_collectives(group: tl.SymmetricGroup, scope: str, rounds: int, count: int, launches: int = 2) -> list[str]:
    run = kernel(group, "collectives", scope)
    words = [
        group.tensor((number,), torch.int32) for number in (k.WORDS, k.WORDS, tl.MAX_RANKS * k.WORDS, tl.MAX_RANKS)
    ]
    threads = k.ALONE[scope] if group.device.type == "cuda" else 1
    made = rounds * (6 + (6 if scope == "_block" else 4))
    for _ in range(launches):
        words[3].zero_()
        bad = torch.full((3, 128), -1, dtype=torch.int32, device=group.device)
        group.barrier()
        run(group.nvshmem(), *words, rounds, count, bad)
        group.barrier()
        if bad[:, :threads].unique(dim=1).tolist() != [[0], [0], [made]]:
            return [f"scope {scope!r}: {bad[:, :threads].tolist()}, not 0, 0, {made}"]
    return []


def check_stream(group: tl.SymmetricGroup, turns: int) -> list[str]:
    """What the host issues: a ring of copies behind waits, sums by all to all, and barriers."""
    ops, problems = group.on_stream(), []
    inbox, outbox = group.tensor((1000,), torch.float32), group.tensor((1000,), torch.float32)
    narrow, wide, counts = (
        group.tensor((3,), torch.int32),
        group.tensor((3,), torch.int64),
        group.tensor((2,), torch.int64),
    )
    kept = torch.zeros(1000, device=group.device)
    to, last = (group.rank + 1) % group.size, (group.rank - 1) % group.size
    for turn in range(1, turns + 1):
        data = torch.full((1000,), 1.0 * turn + 1000 * group.rank, device=group.device)
        outbox.copy_(data)
        ops.putmem_signal(inbox, data, narrow[0:1], turn, to)
        ops.wait_value(narrow[0:1], "ge", turn, peer=last, site=1)
        ops.cpengine_cpasync(kept, inbox, wide[2:3], (turn << 40) + 5)
        ops.signal_op(wide[0:1], turn << 33, to)
        ops.wait_value(wide[0:1], "eq", turn << 33, peer=last, site=2)
        for pe in range(group.size):
            ops.signal_op(counts[0:1], 3, pe, "add")
        ops.wait_value(counts[0:1], "ge", 3 * turn * group.size)
        ops.barrier_all(site=3)
        pulled = torch.empty(1000, device=group.device)
        ops.getmem(pulled, outbox, last)
        ops.write_value(narrow[1:2], -turn)
        ops.barrier_all(site=4)
        group.check()
        want = 1.0 * turn + 1000 * last
        if kept.unique().tolist() != [want] or pulled.unique().tolist() != [want]:
            problems.append(f"turn {turn}: put {kept.unique().tolist()}, got {pulled.unique().tolist()}, not {want}")
        found = [int(narrow[1]), int(wide[2]), int(counts[0])]
        if found != [-turn, (turn << 40) + 5, 3 * turn * group.size]:
            problems.append(f"turn {turn}: {found}")
        group.barrier()
    return problems
