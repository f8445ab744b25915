"""The pure parts of the benchmark: statistics, verdicts, order. Timing itself is not tested, it is measured."""

from __future__ import annotations

import math
import random

import pytest

from benchmarks import harness, plot
from benchmarks.harness import Interval


def noisy_rounds(ours: float, inductor: float, alone: float, rounds: int = 15) -> list[dict[str, float]]:
    """Rounds on a machine whose speed drifts by a factor of up to two, common to all sides of a round."""
    rng = random.Random(1)
    result = []
    for _ in range(rounds):
        drift = 1 + rng.random()
        result.append(
            {
                side: t * drift * rng.uniform(0.99, 1.01)
                for side, t in {"ours": ours, "inductor": inductor, "alone": alone}.items()
            }
        )
    return result


def test_pairing_removes_drift() -> None:
    stats = harness.summarize(noisy_rounds(ours=1.05, inductor=1.3, alone=1.0), resamples=500)
    assert stats.speedup.value == pytest.approx(1.3 / 1.05, rel=0.02)
    assert stats.speedup.high - stats.speedup.low < 0.05
    assert stats.exposed_ratio is not None
    assert stats.exposed_ratio.low < 1 / 6 < stats.exposed_ratio.high


def test_median_of_pairs_is_not_pair_of_medians() -> None:
    rounds = [{"a": 1.0, "b": 2.0}, {"a": 3.0, "b": 3.0}, {"a": 10.0, "b": 5.0}]
    assert harness.paired_difference(rounds, "a", "b") == 0.0
    assert harness.paired_ratio(rounds, "b", "a") == 1.0


def test_no_ratio_where_nothing_is_exposed() -> None:
    stats = harness.summarize(noisy_rounds(ours=1.0, inductor=1.0, alone=1.0), resamples=200)
    assert stats.exposed_ratio is None


def test_bootstrap_is_reproducible_and_contains_the_value() -> None:
    rounds = noisy_rounds(1.1, 1.3, 1.0)

    def statistic(sample: object) -> float:
        return harness.paired_ratio(sample, "inductor", "ours")  # type: ignore[arg-type]

    first = harness.bootstrap(rounds, statistic, resamples=300, seed=7)
    assert first == harness.bootstrap(rounds, statistic, resamples=300, seed=7)
    assert first.low <= first.value <= first.high


def test_bootstrap_of_equal_rounds_has_no_width() -> None:
    rounds = [{"a": 2.0, "b": 1.0}] * 5
    assert harness.bootstrap(rounds, lambda s: harness.paired_ratio(s, "a", "b"), resamples=50) == Interval(
        2.0, 2.0, 2.0
    )


def test_bootstrap_needs_rounds() -> None:
    with pytest.raises(ValueError, match="no rounds"):
        harness.bootstrap([], lambda _: 0.0)


def test_verdicts_respect_the_interval() -> None:
    assert harness.at_most(Interval(0.2, 0.1, 0.24), 0.25) == "met"
    assert harness.at_most(Interval(0.24, 0.2, 0.3), 0.25) == "undecided"
    assert harness.at_most(Interval(0.4, 0.3, math.inf), 0.25) == "missed"
    assert harness.at_least(Interval(1.0, 0.98, 1.1), 0.97) == "met"
    assert harness.at_least(Interval(0.98, 0.96, 1.1), 0.97) == "undecided"
    assert harness.at_least(Interval(0.9, 0.8, 0.96), 0.97) == "missed"


def test_order_is_shuffled_and_shared() -> None:
    sides = ["ours", "inductor", "alone"]
    order = harness.orders(sides, rounds=20, seed=3)
    assert order == harness.orders(sides, rounds=20, seed=3)
    assert all(sorted(o) == sorted(sides) for o in order)
    assert {o[0] for o in order} == set(sides)


def result() -> dict:
    """A result file with a fused, a kept and an unreported case."""
    fused, kept = (
        {"decision": "fused", "code": "", "reason": ""},
        {"decision": "kept", "code": "small", "reason": "too small"},
    )
    sizes = {"function": "all_gather_matmul", "m": 2048, "n": 128, "k": 1024}
    environment = {"date": "2026-01-31 10:00 UTC", "cpu": "a CPU", "cores": 2, "ranks": 2, "threads_per_rank": 1}
    return {
        "environment": {**environment, "dtype": "float32", "torch": "2", "tscompile": "0"},
        "backend": "tilescale",
        "cases": [
            {**sizes, "sites": [fused], "rounds": noisy_rounds(1.0, 1.5, 1.0)},
            {**sizes, "sites": [fused, kept], "rounds": noisy_rounds(1.5, 1.5, 1.0)},
            {**sizes, "sites": [], "rounds": noisy_rounds(2.0, 1.5, 1.0)},
        ],
        "compile_time": {"inductor_s": 20.0, "ours_s": 21.0, "pass_s": 1.0, "share": 0.05},
    }


def test_table_judges_exposed_time_of_fused_sites_only() -> None:
    table = plot.markdown(result())
    assert "| fused |" in table
    assert "| fused, kept (small) |" in table
    assert "| not reported |" in table
    assert "Inductor's: met 1, undecided 0, missed 0 (of 1)" in table
    assert "fused or kept: met 2, undecided 0, missed 1 (of 3)" in table
    assert "5.0 % (target <= 10 %: met)" in table


def test_picture_from_the_result_alone(tmp_path) -> None:
    plot.picture(result(), tmp_path / "cpu.png")
    assert (tmp_path / "cpu.png").stat().st_size > 10_000
