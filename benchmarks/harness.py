"""Interleaved races between several ways of computing one thing on all ranks, and the statistics of their outcome.

Method. A race has *sides* (for instance this backend, Inductor, and the matmul alone). It consists of rounds; each
round times every side once, in an order shuffled anew, and everything that is reported is computed within rounds
and only then condensed: the median of per-round ratios or differences, never the ratio of two medians of different
moments. The uncertainty is a percentile bootstrap over rounds.

Protocol of one timing: barrier, then as many back-to-back calls as make 50 ms or more, then the clock; the number
of calls is agreed between ranks, and the slowest rank counts.

Traps that have produced wrong conclusions elsewhere, and what stands against each here:
* Fixed order. A side that is timed after a light one starts on cooler clocks and emptier caches; with an order that
  never changes that has passed for a gain of several per cent. Hence the shuffle, with one seed on all ranks.
* One rank's clock. Fast ranks wait for slow ones inside a collective, so a single rank's time says little: slowest
  rank.
* Short timings. Ranks leave a barrier up to some 100 us apart, which is more than what a call may take: hence the
  50 ms.
* A roof from an idle machine. The matmul alone is timed on all ranks at once too, since ranks share memory
  bandwidth and clocks.
* Fast because wrong. An op that does not wait for its peers is quick and, on unchanged inputs, even right from the
  second call on: `check` uses new inputs at every call and hands the ops memory full of NaN.

Not for deciding what to measure: the cases are in the benchmarks.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

Round = Mapping[str, float]  # side -> seconds per call, slowest rank
Verdict = Literal["met", "missed", "undecided"]


@dataclass(frozen=True)
class Interval:
    """A statistic of the rounds as they were, and its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def bootstrap(
    rounds: Sequence[Round], statistic: Callable[[Sequence[Round]], float], resamples: int = 2000, seed: int = 0
) -> Interval:
    """Percentile bootstrap: rounds are drawn with replacement and stay whole, so the pairing survives."""
    if not rounds:
        raise ValueError("no rounds to compute statistics of")
    draw = random.Random(seed)
    values = sorted(statistic(draw.choices(rounds, k=len(rounds))) for _ in range(resamples))
    edge = int(0.025 * resamples)
    return Interval(statistic(rounds), values[edge], values[-1 - edge])


def paired_difference(rounds: Sequence[Round], side: str, base: str) -> float:
    """Median over rounds of `side - base`, in seconds."""
    return statistics.median(r[side] - r[base] for r in rounds)


def paired_ratio(rounds: Sequence[Round], numerator: str, denominator: str) -> float:
    """Median over rounds of `numerator / denominator`."""
    return statistics.median(r[numerator] / r[denominator] for r in rounds)


@dataclass(frozen=True)
class Statistics:
    """What a race between `ours`, `inductor` and `alone` (the matmul without communication) says.

    exposed_*: time that is not hidden behind the matmul, in seconds: side - alone.
    exposed_ratio: exposed_ours / exposed_inductor. None where Inductor's own exposed time is not clearly above
        zero: either there is nothing to hide, or the machine was too noisy, and a quotient by noise would be noise.
    speedup: inductor / ours.
    """

    alone: float
    exposed_ours: Interval
    exposed_inductor: Interval
    exposed_ratio: Interval | None
    speedup: Interval


def summarize(rounds: Sequence[Round], resamples: int = 2000) -> Statistics:
    def ratio(sample: Sequence[Round]) -> float:
        base = paired_difference(sample, "inductor", "alone")
        return paired_difference(sample, "ours", "alone") / base if base > 0 else math.inf

    exposed_inductor = bootstrap(rounds, lambda sample: paired_difference(sample, "inductor", "alone"), resamples)
    return Statistics(
        alone=statistics.median(r["alone"] for r in rounds),
        exposed_ours=bootstrap(rounds, lambda sample: paired_difference(sample, "ours", "alone"), resamples),
        exposed_inductor=exposed_inductor,
        exposed_ratio=bootstrap(rounds, ratio, resamples) if exposed_inductor.low > 0 else None,
        speedup=bootstrap(rounds, lambda sample: paired_ratio(sample, "inductor", "ours"), resamples),
    )


def at_most(interval: Interval, limit: float) -> Verdict:
    """Is the quantity at most `limit`? "undecided" where the interval contains the limit."""
    if interval.high <= limit:
        return "met"
    return "missed" if interval.low > limit else "undecided"


def at_least(interval: Interval, limit: float) -> Verdict:
    if interval.low >= limit:
        return "met"
    return "missed" if interval.high < limit else "undecided"


def orders(sides: Sequence[str], rounds: int, seed: int) -> list[list[str]]:
    """The order of the sides in each round: shuffled, and the same on all ranks that pass the same seed."""
    shuffle = random.Random(seed)
    return [shuffle.sample(sides, len(sides)) for _ in range(rounds)]


def slowest(seconds: Sequence[float]) -> list[float]:
    """Elementwise maximum over ranks."""
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    times = torch.tensor(seconds, dtype=torch.float64, device=device)
    dist.all_reduce(times, dist.ReduceOp.MAX)
    return [float(t) for t in times.cpu()]


def time_calls(function: Callable[[], object], calls: int) -> float:
    """Seconds per call on this rank, of `calls` back-to-back calls that start together on all ranks."""
    dist.barrier()
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls


def race(
    sides: Mapping[str, Callable[[], object]], rounds: int, seed: int, min_seconds: float = 0.05
) -> tuple[list[dict[str, float]], dict[str, int]]:
    """Race the sides. Every rank calls this with the same arguments.

    Returns the rounds, and how many calls one timing of each side consists of.
    """
    for function in sides.values():
        time_calls(function, 2)  # warm-up
    estimates = slowest([time_calls(function, 3) for function in sides.values()])
    calls = {side: max(1, math.ceil(1.1 * min_seconds / t)) for side, t in zip(sides, estimates, strict=True)}
    local: list[dict[str, float]] = []
    gc.collect()
    gc.disable()  # a collection inside one timing would be charged to one side
    try:
        local += [{s: time_calls(sides[s], calls[s]) for s in order} for order in orders(list(sides), rounds, seed)]
    finally:
        gc.enable()
    # the maximum over ranks is taken at the end, so that no other collective runs between timings
    merged = iter(slowest([times[side] for times in local for side in sides]))
    return [{side: next(merged) for side in sides} for _ in local], calls


def as_tuple(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def poison(like: Sequence[Tensor]) -> None:
    """Leave freed memory of these sizes full of NaN, so that an output element that nobody writes is seen."""
    blocks = [torch.full_like(t, math.nan) for t in like for _ in range(2)]
    del blocks


def check(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    reference: Callable[..., Tensor | tuple[Tensor, ...]],
    make_inputs: Callable[[int], list[Tensor]],
    calls: int = 3,
) -> float:
    """Compare `function` with `reference` in float64, on new inputs at each call; if one rank is off, all raise.

    The limit is four times the error of the reference in the inputs' own dtype: rounding may differ, no more.
    Returns the largest error over calls and ranks, relative to the largest element of the truth.
    """
    worst, allowed = 0.0, 0.0
    for call in range(calls):
        inputs = make_inputs(call)
        truth = as_tuple(reference(*(t.double() for t in inputs)))
        plain = as_tuple(reference(*inputs))
        poison([*plain, *inputs])
        result = as_tuple(function(*inputs))
        for got, want, base in zip(result, truth, plain, strict=True):
            scale = float(want.abs().max())
            error = float((got.double() - want).abs().max()) / scale
            worst = max(worst, math.inf if math.isnan(error) else error)
            allowed = max(allowed, 4 * float((base.double() - want).abs().max()) / scale)
    worst, allowed = slowest([worst, allowed])
    if worst > allowed:
        raise AssertionError(f"wrong result before any timing: relative error {worst:.1e}, limit {allowed:.1e}")
    return worst
