"""Every form that a fused op of few rows has: by copy engine or pushed, pulled or pushed in each way and width. What sums.py, widths.py
and the cost model are fitted to.

    torchrun --nproc-per-node 4 -m benchmarks.bench_forms [--only TEXT] [--rounds N] [--out DIR or FILE.json]

Run it from the root of the repository, on GPUs. Beside the forms: cuBLAS, NCCL, and both in sequence. Forms are checked against
float32 first; what is wrong or raises is reported and not timed. Method and traps: benchmarks/gpu_harness.py.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import direct, gpu_results
from benchmarks import gpu_harness as gpu
from benchmarks.gpu_cases import GATHER, REDUCE, SCATTER, Case, Workspace, base_sides
from tscompile.templates.nvlink import gemm_reduce, sums, widths

SUMS = ((16, 4096, 1024), (128, 4096, 1024), (256, 4096, 1024), (512, 4096, 1024), (128, 8192, 7168), (256, 8192, 7168))
SUMS = (*SUMS, (512, 8192, 7168), (1024, 4096, 3584))
GATHERS = ((128, 7168, 8192), (256, 7168, 8192), (512, 7168, 8192), (1024, 7168, 8192), (128, 1536, 4096))
GATHERS = (*GATHERS, (512, 1536, 4096), (2048, 1536, 4096), (8192, 1536, 4096))
_unique = itertools.count()


def cases(ranks: int) -> list[Case]:
    """Rows of all ranks; columns and k as one rank has them, so that a rank's matmul is the same whatever their number."""
    found = [Case(GATHER, "few rows", m, (n * ranks,), k) for m, n, k in GATHERS]
    return found + [Case(op, "few rows", m, (n,), k * ranks) for m, n, k in SUMS for op in (SCATTER, REDUCE)]


@contextmanager
def replaced(module: Any, name: str, value: object) -> Any:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def forms(work: Workspace) -> dict[str, Callable[[], gpu.Side]]:
    """Makers of all forms by name. An op keeps the form in which it was first called; time-outs tell their sites apart."""

    def make(module: Any, name: str, value: object, build: Callable[..., Any]) -> gpu.Side:
        with replaced(module, name, value):
            op = build(timeout_s=50 + next(_unique) / 100)
            op()
        return gpu.Side(op)

    if work.case.op == GATHER:
        gather = partial(direct.all_gather_linear, work.x, work.weights)
        return {
            name: partial(make, widths, "pushes", lambda *_, pushed=pushed: pushed, gather)
            for name, pushed in (("copied", False), ("pushed", True))
        }
    ranks, every = dist.get_world_size(), work.case.op == REDUCE
    (n,), k = work.case.local(ranks)
    reduce = partial(direct.reduce_linear, work.case.op, work.x, work.weights[0])
    plans = [sums.pull_plan(work.case.m, n, k, ranks, 1 if every else ranks, every)]
    plans += sums.push_plans(work.case.m, n, k, ranks, 1, every)
    return {
        f"{plan.form} {plan.width}": partial(make, gemm_reduce, "terms_plan", lambda *_, plan=plan: plan, reduce)
        for plan in plans
        if plan.has_flags
    }


def right(work: Workspace, sides: dict[str, gpu.Side], failures: dict[str, str]) -> None:
    """Take out of `sides` what computes something else."""
    work.refill()
    truth = work.truth()
    limits = gpu.allowed(gpu.errors_of(sides["original"].run(), truth), work.dtype)
    for name in [name for name, side in sides.items() if side.checked and name != "original"]:
        errors = [gpu.errors_of(list(sides[name].run())[: len(truth)], truth) for _ in range(3)]
        if gpu.on_any_rank(any(error[0] > limits[0] or error[1] > limits[1] for error in errors)):
            failures[name] = f"wrong: {errors}, limits {limits}"
            del sides[name]


def run_case(case: Case, rounds: int, timer: gpu.Timer, device: torch.device) -> dict[str, Any]:
    work, failures = Workspace(case, device, torch.bfloat16), {}
    sides = base_sides(work)
    for name, maker in forms(work).items():
        made = gpu.attempt(name, maker, failures)
        if made is not None:
            sides[name] = made
    right(work, sides, failures)
    raced = gpu.race(sides, timer, rounds, seed=0)
    n, k = case.local(dist.get_world_size())
    host = {name: timer.host_us(side.run) for name, side in sides.items() if name not in raced.failures}
    return {
        "name": case.name,
        "op": case.op,
        "m": case.m,
        "n": n,
        "k": k,
        "rounds": {"eager": raced.eager, "graph": raced.graph},
        "host_us": host,
        "failures": failures | raced.failures,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains one of TEXT,TEXT,...")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), metavar="DIR or FILE.json")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise SystemExit("CPU ranks have one form of each op: run this on GPUs")
    device = gpu.start("cuda")
    path = gpu_results.result_path(args.out, "forms", device)
    results = gpu_results.Results(path, "gpu-forms", gpu_results.environment(device, "bfloat16"), resume=False)
    timer = gpu.Timer(device, min_ms=3.0)
    with torch.no_grad():
        for case in cases(dist.get_world_size()):
            if not any(text in case.name for text in args.only.split(",")):
                continue
            with gpu.limit(100.0):
                record = run_case(case, args.rounds, timer, device)
            results.put(record)
            rounds = record["rounds"]["graph"]
            medians = {name: round(1e6 * statistics.median(times[name] for times in rounds), 1) for name in rounds[0]}
            gpu.say(case.name, medians, record["failures"] or "")
    gpu.finish()
    return 0


if __name__ == "__main__":
    sys.exit(gpu.guarded(main))
