"""Predicted times of a site on CPU ranks, fused over shared memory and as the original gloo collective plus matmul.

Only ratios matter: the matmul is the same on both sides, so the model compares what is left exposed of the communication.
The constants were measured with benchmarks/bench_cpu.py (see benchmarks/results) on 2 ranks with one thread each.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..problem import FusionProblem

MUST_GAIN = 0.98  # fuse only if the fused time is predicted below this share of the original
_MIB = float(1 << 20)


@dataclass(frozen=True)
class Link:
    """Time of one exchange: latency_us + us_per_mib * MiB, MiB being what one rank sends (or receives) in all."""

    latency_us: float
    us_per_mib: float

    def us(self, mib: float) -> float:
        return self.latency_us + self.us_per_mib * mib


# [measured 2026-11-20, AMD EPYC, 2 cores, 2 ranks with one thread each, torch 2.13.0+cpu: exposed time of each function from
# 0.5 KiB to 16 MiB, medians of 11 interleaved rounds, fitted by eye; see benchmarks/results]
GLOO = {
    "all_gather_matmul": Link(500.0, 1300.0),
    "matmul_reduce_scatter": Link(1100.0, 1900.0),
    "matmul_all_reduce": Link(700.0, 1600.0),
    "matmul_all_gather": Link(500.0, 1150.0),
}
SHM = {
    "all_gather_matmul": Link(85.0, 120.0),
    "matmul_reduce_scatter": Link(85.0, 170.0),
    "matmul_all_reduce": Link(75.0, 400.0),
    "matmul_all_gather": Link(75.0, 240.0),
}
GFLOPS = 100.0  # float32 matmul, one thread
GATHERED_US_PER_MIB = 100.0  # writing the gathered tensor out as well


@dataclass(frozen=True)
class Prediction:
    fused_us: float
    original_us: float


def predict(problem: FusionProblem) -> Prediction:
    """Both times of a site, in us; the planner's only source of them."""
    matmul_us = sum(2.0 * g.m * g.n * g.k for g in problem.gemms) / (GFLOPS * 1e3)
    sent = problem.comm_bytes / _MIB * (problem.group_size - 1) / problem.group_size
    fused = SHM[problem.kind].us(sent)
    if problem.return_gathered:
        fused += problem.comm_bytes / _MIB * GATHERED_US_PER_MIB
    return Prediction(matmul_us + fused, matmul_us + GLOO[problem.kind].us(sent))
