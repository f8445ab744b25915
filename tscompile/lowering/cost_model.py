"""Predicted times of a site, fused and as the original collective plus matmul: on CPU ranks and on H200 GPUs.

Only ratios matter: the matmul is the same on both sides, so the model compares what is left exposed of the communication.
Every constant has its unit and where it was measured.
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
    return _predict_gpu(problem) if problem.device == "cuda" else _predict_cpu(problem)


def _predict_cpu(problem: FusionProblem) -> Prediction:
    matmul_us = sum(2.0 * g.m * g.n * g.k for g in problem.gemms) / (GFLOPS * 1e3)
    sent = problem.comm_bytes / _MIB * (problem.group_size - 1) / problem.group_size
    fused = SHM[problem.kind].us(sent)
    if problem.return_gathered:
        fused += problem.comm_bytes / _MIB * GATHERED_US_PER_MIB
    return Prediction(matmul_us + fused, matmul_us + GLOO[problem.kind].us(sent))


# [measured 2026-11-20, 4x H200 with NVLink, torch 2.11.0+cu130, NCCL 2.28.9, bfloat16, slowest rank]
SMS = 132
TILE = (128, 256)  # rows and columns that one SM computes at a time
TILE_US_PER_K = 0.0122  # of one tile per unit of k, all SMs busy; a GEMM [8192, 7168, 4096] takes 0.69 ms
LAUNCH_US = 6.0
NCCL = {  # of the whole tensor on 4 ranks
    "all_gather_matmul": Link(20.0, 4.05),
    "matmul_reduce_scatter": Link(18.0, 4.1),
    "matmul_all_reduce": Link(22.0, 6.6),
    "matmul_all_gather": Link(20.0, 4.05),
}
COPY_ENGINE = Link(10.0, 3.1)  # a pass over NVLink, per MiB that one rank sends
SLOWDOWN = {
    "all_gather_matmul": 1.04,
    "matmul_reduce_scatter": 1.05,
    "matmul_all_reduce": 1.08,
}  # of the GEMM by the traffic beside it
TAIL_US = {"all_gather_matmul": 6.0, "matmul_reduce_scatter": 15.0, "matmul_all_reduce": 30.0}


def _gemm_us(m: int, n: int, k: int) -> float:
    """Whole waves of tiles; a last wave that is not full costs as much as a full one."""
    tiles = -(-m // TILE[0]) * -(-n // TILE[1])
    return LAUNCH_US + -(-tiles // SMS) * k * TILE_US_PER_K


def _predict_gpu(problem: FusionProblem) -> Prediction:
    matmul_us = sum(_gemm_us(g.m, g.n, g.k) for g in problem.gemms)
    total = problem.comm_bytes / _MIB
    sent = total * (problem.group_size - 1) / problem.group_size
    original = matmul_us + NCCL[problem.kind].us(total * 4 / 3 * (problem.group_size - 1) / problem.group_size)
    passes = 2 if problem.kind == "matmul_all_reduce" else 1
    transport = COPY_ENGINE.us(sent * passes)
    fused = max(matmul_us * SLOWDOWN.get(problem.kind, 1.0), transport) + TAIL_US.get(problem.kind, 0.0)
    return Prediction(fused, original)
