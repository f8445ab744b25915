"""Predicted times of a site, fused and as the original collective plus matmul: on CPU ranks and on H200 GPUs.

Only ratios matter: the matmul is the same on both sides, so the model compares what is left exposed of the communication.
Every constant has its unit and where it was measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..problem import FusionProblem, GatherUse, Gemm, Plan
from ..templates.attention import head_groups
from ..templates.mesh_gemm import CANNON, STREAM, SUMMA
from ..templates.nvlink import sums, widths
from ..templates.nvlink.gather_rows import one_kernel
from ..templates.nvlink.kernels.config import ITEM_BYTES, SMS
from ..templates.nvlink.mesh_tiles import Operand, mesh_us
from ..templates.nvlink.panels import chunk_count, copies_of
from ..templates.nvlink.projected import project
from ..templates.nvlink.refusal import block_sizes, serves_use, shard_of, sides_of

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
# Exchanges with their permutes, one or three at a time. [measured 2026-11-28, the same ranks on a machine with other load, from 32 KiB
# to 12 MiB: the fourth fastest of 25 rounds; the original ops are underestimated on purpose]
GLOO_EXCHANGE = Link(500.0, 1600.0)
SHM_EXCHANGE = Link(250.0, 500.0)
# Keys and values of an attention, in one gather or two, and the scatter of their gradients. [measured 2026-11-28, the same machine, 4
# to 16 heads of 64 or 128, 64 to 2048 keys a rank, what the fourth fastest of 15 rounds took more than the attention alone; the
# original ops, with the copies that put ranks side by side, are underestimated on purpose]
GLOO_GATHERED = Link(500.0, 1300.0)
SHM_GATHERED = Link(150.0, 120.0)
# What a chunk of keys costs beside its share of the attention: one more call, and adding up partial results. [measured alone, float32
# and bfloat16, 0.1 to 4 MiB]
CHUNK_US = 60.0
MERGE_US_PER_MIB = 120.0
# What a group of heads costs an all_to_all_attention: copies, signals, one more call of the attention. [measured likewise, 4 groups]
HEAD_GROUP_US = 250.0
GFLOPS = 100.0  # float32 matmul, one thread
GATHERED_US_PER_MIB = 100.0  # writing the gathered tensor out as well


@dataclass(frozen=True)
class Prediction:
    """partial_us: with less of it fused, where that is an alternative. mesh_matmul: one gather fused and the other one as it was;
    all_to_all_matmul, matmul_all_to_all: the exchanges as all_to_all_permute, behind the matmuls or before them."""

    fused_us: float
    original_us: float
    partial_us: float = math.inf


def pays(problem: FusionProblem, predicted: Prediction) -> bool:
    """True if the fused op is predicted to gain more than a prediction may be wrong by."""
    if predicted.fused_us >= predicted.partial_us:
        return False
    if problem.device == "cuda":
        return predicted.fused_us < min(MUST_GAIN_GPU * predicted.original_us, predicted.original_us - MUST_GAIN_US)
    if problem.kind == "all_to_all_attention":  # if it is not chosen, its exchanges are, as two ops
        separate = _predict_exchanges(problem, SHM_EXCHANGE, GLOO_EXCHANGE).fused_us + SHM_EXCHANGE.latency_us
        predicted = Prediction(predicted.fused_us, min(predicted.original_us, separate))
    return predicted.fused_us < MUST_GAIN * predicted.original_us


def predict(problem: FusionProblem, uses: Sequence[GatherUse] = (), plan: Plan | None = None) -> Prediction:
    """Both times of a site, in us; the planner's only source of them.

    Args:
        problem: the site.
        uses: how the matmuls of a gather read it, one each; without them, as rows of their left operands.
        plan: matmul_all_to_all: what is sent of the matmuls' results.
    """
    if problem.device != "cuda":
        return _predict_cpu(problem)
    if problem.kind == "matmul_all_to_all":
        assert plan is not None
        return _predict_projected_gpu(problem, plan)
    if problem.kind == "all_to_all_permute":
        return _predict_exchanges_gpu(problem)
    if problem.kind == "all_to_all_matmul":
        return _predict_panels_gpu(problem, uses)
    return _predict_mesh_gpu(problem, uses) if problem.kind == "mesh_matmul" else _predict_gpu(problem, uses)


def schedule(problem: FusionProblem) -> str:
    """How an all_to_all_attention cuts its heads, the order in which a mesh_matmul takes its shards, "" for other kinds.

    On a square mesh Cannon's: at every step each rank of a group reads another arena, where SUMMA's ranks all wait for the same
    one. On CPU ranks no difference was measured (docs/dev/plan-mesh.md), and sums of 16-bit types would be rounded at every panel; on
    GPUs they are not.
    """
    if problem.kind == "all_to_all_attention":
        return f"{head_groups(problem.heads)} head groups"
    if problem.kind != "mesh_matmul":
        return ""
    rounds = problem.device != "cuda" and any(name in ("bfloat16", "float16") for name in problem.gemm_dtypes)
    if not problem.panels or rounds:
        return STREAM
    return CANNON if problem.group_size == problem.second_group_size else SUMMA


def _predict_mesh(problem: FusionProblem, matmul_us: float) -> Prediction:
    """Both gathers are under way at once in the fused op, and one after the other in the original program."""
    sides = (
        (problem.comm_bytes, problem.group_size, problem.return_gathered),
        (problem.second_comm_bytes, problem.second_group_size, problem.return_second),
    )
    sent = [nbytes / _MIB * (size - 1) / max(size, 1) for nbytes, size, _ in sides]
    copied = sum(nbytes / _MIB for nbytes, _, returned in sides if returned) * GATHERED_US_PER_MIB
    fused = sum(SHM["all_gather_matmul"].us(mib) for mib in sent) + copied
    return Prediction(matmul_us + fused, matmul_us + sum(GLOO["all_gather_matmul"].us(mib) for mib in sent))


def _predict_exchanges(problem: FusionProblem, fused: Link, original: Link) -> Prediction:
    """The op has the latency of one exchange; the original ops have it once each."""
    sent = problem.comm_bytes / _MIB * (problem.group_size - 1) / problem.group_size
    return Prediction(fused.us(sent), (problem.exchanges - 1) * original.latency_us + original.us(sent))


def _predict_panels(problem: FusionProblem, matmul_us: float) -> Prediction:
    """As the exchanges alone: what is not written is won, and as much is lost by adding panels to a sum in memory.

    [measured 2026-11-28, 2 ranks with one thread each, 64 to 2048 rows of 1024 columns, float32 and bfloat16: within noise]
    """
    moved = _predict_exchanges(problem, SHM_EXCHANGE, GLOO_EXCHANGE)
    return Prediction(matmul_us + moved.fused_us, matmul_us + moved.original_us, matmul_us + moved.fused_us)


def _predict_chunks(problem: FusionProblem, attention_us: float) -> Prediction:
    """An attention by chunks of keys against the one that waits for all of them."""
    moved = _predict_exchanges(problem, SHM_GATHERED, GLOO_GATHERED)
    chunk_us = CHUNK_US + problem.merged_bytes / _MIB * MERGE_US_PER_MIB
    copied = problem.comm_bytes / _MIB * GATHERED_US_PER_MIB if problem.return_gathered else 0.0
    fused = moved.fused_us + problem.group_size * chunk_us + copied
    return Prediction(attention_us + fused, attention_us + moved.original_us)


def _predict_cpu(problem: FusionProblem) -> Prediction:
    matmul_us = sum(2.0 * g.m * g.n * g.k for g in problem.gemms) / (GFLOPS * 1e3)
    if problem.kind == "mesh_matmul":
        return _predict_mesh(problem, matmul_us)
    if problem.kind in ("all_to_all_permute", "all_to_all_attention", "matmul_all_to_all"):
        moved = _predict_exchanges(problem, SHM_EXCHANGE, GLOO_EXCHANGE)
        if problem.kind == "matmul_all_to_all":  # a rank's core multiplies or copies: nothing is hidden
            fused = matmul_us + moved.fused_us
            return Prediction(fused, matmul_us + moved.original_us, fused)
        groups = head_groups(problem.heads) if problem.kind == "all_to_all_attention" else 0
        return Prediction(moved.fused_us + groups * HEAD_GROUP_US, moved.original_us)
    if problem.kind == "all_to_all_matmul":
        return _predict_panels(problem, matmul_us)
    if problem.kind in _AS_GEMM:
        return _predict_chunks(problem, matmul_us)
    sent = problem.comm_bytes / _MIB * (problem.group_size - 1) / problem.group_size
    fused = SHM[problem.kind].us(sent)
    if problem.return_gathered:
        fused += problem.comm_bytes / _MIB * GATHERED_US_PER_MIB
    return Prediction(matmul_us + fused, matmul_us + GLOO[problem.kind].us(sent))


# [measured 2026-11-28, 4x H200 with NVLink, torch 2.11.0+cu130, NCCL 2.28.9, bfloat16, slowest rank, GPU warm: the 52 sizes of
# benchmarks/results/gpu-ops-4xh200-2026-11-28.json, 128 to 8192 rows; most times are met within 8 %]
ORIGINAL_US = 3.0  # between the two ops of the original sequence
# Time of the collective by the MiB of the whole tensor, 4 ranks: the lesser of both, since NCCL sends a few MiB by another protocol,
# in which every rank beyond two adds a latency. [few MiB: gpu-forms-4xh200-2026-11-28.json and gpu-forms-2xh200-2026-11-28.json, 16 to
# 1024 rows]
NCCL = {
    "all_gather_matmul": (Link(43.0, 2.6), Link(12.0, 8.0)),
    "matmul_reduce_scatter": (Link(25.0, 2.75), Link(8.5, 7.0)),
    "matmul_all_reduce": (Link(27.0, 4.9), Link(11.0, 12.0)),
    "matmul_all_gather": (Link(43.0, 2.6), Link(12.0, 8.0)),
}
_NCCL_RANK_US = {**dict.fromkeys(NCCL, 1.0), "matmul_all_reduce": 4.0}
# One all_to_all of NCCL by what a rank sends to others, one permuting copy by what it holds, and the op that does all of this for
# several exchanges at once, by what a rank sends in all; of two links the lesser time. [measured 2026-11-28, 2x H200, 4 to 384 MiB
# sent: benchmarks/results/gpu-exchange-2xh200-2026-11-28.json; ours within 4 %]
NCCL_EXCHANGE = (Link(40.0, 2.75), Link(10.0, 4.6))
PERMUTE = Link(4.0, 1.65)
PUSH_EXCHANGE = (Link(35.0, 2.87), Link(22.6, 3.43))
# Copying own panels into the slot, each by a copy of the main stream. Not measured.
OWN_PANEL = Link(3.0, 0.6)
# Attention by chunks of keys: the rate of attention, the launches of a chunk, and reading a partial result. [one measurement,
# 2026-11-28, 2x H200, 16K tokens of 32 heads: 4.17 ms where 4.2 are predicted; gpu-kv-gather-2xh200-2026-11-28.json]
ATTENTION_TFLOPS = 550.0
CHUNK_LAUNCHES_US = 25.0
MERGE_GPU_US_PER_MIB = 1.5
_AS_GEMM = {"all_gather_attention": "all_gather_matmul", "attention_reduce_scatter": "matmul_reduce_scatter"}
MUST_GAIN_GPU = 0.98  # a fused op costs the host less than the collective and the matmul that it replaces
MUST_GAIN_US = 4.0  # ops of a few tens of us are not known better


@dataclass(frozen=True)
class _Gemm:
    """All matmuls of a site as one kernel. waves: of tiles over the SMs; the last one costs as much as a full one."""

    tiles: int
    wave_us: float

    @property
    def waves(self) -> int:
        return widths.waves_of(self.tiles)

    @property
    def us(self) -> float:
        return widths.LAUNCH_US + self.waves * self.wave_us


def _rows_us(gemms: Sequence[Gemm], ranks: int, received: float, served: bool) -> float:
    """Gather and matmuls of gathered rows in one kernel: they share waves. served: these are all uses, and the kernel takes them."""
    rows, columns, k = gemms[0].m, [gemm.n for gemm in gemms], max(gemm.k for gemm in gemms)
    pushed = served and one_kernel([gemm.k for gemm in gemms]) and widths.pushes(rows, columns, k, ranks)
    width = widths.gather_width(rows, columns, k, ranks, transposed=True, pushed=pushed)
    return widths.gather_us(width, rows, columns, k, ranks, pushed, received)


def _blocks_gemm(problem: FusionProblem, use: GatherUse, gemm: Gemm) -> _Gemm:
    """A matmul in the kernel of blocks."""
    blocks = block_sizes(use, problem.group_size, shard_of(problem), gemm.k)
    free = gemm.n if use.side == "lhs" else gemm.m
    tiling, k = widths.blocks_tiling(use, problem.group_size, blocks, free, transposed=True)
    return _Gemm(tiling.tiles, widths.tile_us(tiling.width, k))


def _gather_us(problem: FusionProblem, uses: Sequence[GatherUse], received: float) -> float:
    """Of all matmuls of a gather. The first kernel hides the transport: that of the uses that read rows, else of one that has the ranks
    in its result, else of one that sums over them. The other matmuls come after it."""
    reads: Sequence[GatherUse | None] = uses or [None] * len(problem.gemms)
    ranks = problem.group_size
    rows: list[Gemm] = []
    others: list[tuple[GatherUse, Gemm]] = []
    for gemm, use in zip(problem.gemms, reads, strict=True):
        if use is None or use.reads_rows:
            rows.append(gemm)
        else:
            others.append((use, gemm))
    others.sort(key=lambda other: other[0].contracts_ranks)
    if rows:
        after = sum(_cublas_us(gemm) for _, gemm in others)  # torch's own, of the gathered tensor
        served = not others and all(
            use is None or serves_use(use, problem.dtype, gemm.k, gemm.n) for gemm, use in zip(rows, reads, strict=True)
        )
        return _rows_us(rows, ranks, received, served) + after
    first, *rest = (_blocks_gemm(problem, use, gemm) for use, gemm in others)
    if not others[0][0].contracts_ranks:  # the tiles that wait for the shard that comes last
        tail = -(-first.tiles // ranks // SMS) * first.wave_us
    else:  # every tile needs it: the last part of the first wave, and all other waves
        tail = (first.waves - 1 + 1 / ranks) * first.wave_us
    longest = max(first.us, widths.push_us(received, ranks) + tail)
    return longest + widths.COPIED_TAIL_US + sum(gemm.us for gemm in rest)


def _predict_exchanges_gpu(problem: FusionProblem) -> Prediction:
    """The original program permutes what it sends, or what it receives, once for each exchange; some do both."""
    held, count = problem.comm_bytes / _MIB, problem.exchanges
    sent = held * (problem.group_size - 1) / problem.group_size
    moved = count * min(link.us(sent / count) for link in NCCL_EXCHANGE)
    permuted = (count - 1) * PERMUTE.latency_us + PERMUTE.us(held)
    return Prediction(min(link.us(sent) for link in PUSH_EXCHANGE), moved + permuted)


def _predict_projected_gpu(problem: FusionProblem, plan: Plan) -> Prediction:
    """Against cuBLAS and the exchanges behind it, those of the original program or all_to_all_permute."""
    found = project(plan, problem.group_size, problem.gemms, [size for grid in problem.grids for size in grid])
    assert found is not None, "the template supports it"
    matmuls = sum(_cublas_us(gemm) for gemm in problem.gemms)
    moved = _predict_exchanges_gpu(problem)
    return Prediction(found.us, matmuls + ORIGINAL_US + moved.original_us, matmuls + moved.fused_us)


def _predict_panels_gpu(problem: FusionProblem, uses: Sequence[GatherUse]) -> Prediction:
    moved = _predict_exchanges_gpu(problem)
    matmuls = ORIGINAL_US + sum(_cublas_us(gemm) for gemm in problem.gemms)
    before = PERMUTE.us(problem.copied_bytes / _MIB) if problem.copied_bytes else 0.0
    if problem.exchanges > 1:  # the own panels are put beside one another
        copies = copies_of(problem.panels_of)
        before += copies * OWN_PANEL.latency_us + OWN_PANEL.us_per_mib * problem.comm_bytes / problem.group_size / _MIB
    first, *rest = problem.gemms
    _, us = chunk_count(first.m, first.n, first.k, problem.panels_of, problem.group_size, uses[0])
    fused = before + us + sum(_blocks_gemm(problem, use, gemm).us for use, gemm in zip(uses[1:], rest, strict=True))
    return Prediction(fused, moved.original_us + matmuls, moved.fused_us + matmuls)


def _predict_chunks_gpu(problem: FusionProblem) -> Prediction:
    """The attention of the own chunk, or of the last one that is sent, hides nothing; the others hide the transport, or it them."""
    ranks = problem.group_size
    sent = problem.comm_bytes / _MIB * (ranks - 1) / ranks
    attention = sum(2.0 * g.m * g.n * g.k for g in problem.gemms) / (ATTENTION_TFLOPS * 1e6)
    collectives = sum(
        _collective_us(_AS_GEMM[problem.kind], sent / problem.exchanges, ranks) for _ in range(problem.exchanges)
    )
    steps = ranks * (CHUNK_LAUNCHES_US + problem.merged_bytes / _MIB * MERGE_GPU_US_PER_MIB)
    fused = (
        attention / ranks + max(attention * (ranks - 1) / ranks, min(link.us(sent) for link in PUSH_EXCHANGE)) + steps
    )
    return Prediction(fused, attention + ORIGINAL_US + collectives + PERMUTE.us(problem.comm_bytes / _MIB))


def _predict_gpu(problem: FusionProblem, uses: Sequence[GatherUse]) -> Prediction:
    if problem.kind in _AS_GEMM:
        return _predict_chunks_gpu(problem)
    ranks = problem.group_size
    total = problem.comm_bytes / _MIB
    received = total * (ranks - 1) / ranks
    collective = _collective_us(problem.kind, received, ranks)
    original = sum(_cublas_us(g) for g in problem.gemms) + ORIGINAL_US + collective
    if problem.kind == "all_gather_matmul":
        return Prediction(_gather_us(problem, uses, received), original)
    return Prediction(sums.problem_plan(problem).us, original)


def _predict_mesh_gpu(problem: FusionProblem, uses: Sequence[GatherUse]) -> Prediction:
    """NCCL gathers one operand after the other, and ranks of a gather along an inner dim are put side by side by a copy."""
    (gemm,), sides = problem.gemms, sides_of(problem)
    left, right = (Operand.of(use, side.group_size, side.shard, gemm.k) for use, side in zip(uses, sides, strict=True))
    received = [side.comm_bytes / _MIB * (side.group_size - 1) / side.group_size for side in sides]
    kept = [
        ORIGINAL_US
        + _collective_us("all_gather_matmul", mib, side.group_size)
        + (2 * widths.read_us(1, side.comm_bytes // ITEM_BYTES) if side.shard[0] > 1 else 0.0)
        for side, mib in zip(sides, received, strict=True)
    ]
    one_fused = [
        _gather_us(
            replace(problem, group_size=side.group_size, comm_bytes=side.comm_bytes, pieces=side.shard[0]), (use,), mib
        )
        for side, use, mib in zip(sides, uses, received, strict=True)
    ]
    partial = min(one_fused[0] + kept[1], one_fused[1] + kept[0])
    return Prediction(mesh_us(left, right), _cublas_us(gemm) + sum(kept), partial)


def _collective_us(kind: str, received: float, ranks: int) -> float:
    """One collective of NCCL, of which a rank receives so many MiB."""
    large, small = NCCL[kind]
    latency = _NCCL_RANK_US[kind] * (ranks - 2)
    return min(large.us(received * 4 / 3), latency + small.us(received * 4 / 3))


def _cublas_us(gemm: Gemm) -> float:
    return widths.cublas_us(gemm.m, gemm.n, gemm.k)
