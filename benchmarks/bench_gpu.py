"""Fused ops on the GPUs of one host: against NCCL + cuBLAS, PyTorch's async TP, and what the hardware allows.

    torchrun --nproc-per-node 4 -m benchmarks.bench_gpu [--quick] [--only TEXT] [--rounds N] [--resume]

Run it from the root of the repository. Every case is checked against float32 first; what is wrong or raises is reported
and not timed. The JSON in --out is written after every case; a case that hangs ends the program with the stacks of all
threads, and the same command with --resume goes on with the next case.

Candidates of a race: `gemm` (cuBLAS alone), `collective` (NCCL alone), `original` (both in sequence, into memory that is
there already), `async_tp` (torch.ops.symm_mem), `tscompile` (the fused op, started by the runtime as in a compiled graph;
for gathers also with the gathered tensor returned), and at a few sizes the program compiled by both backends.
Efficiency is max(gemm, transport) / time within a round, where transport is the faster of NCCL and the bytes at 300 GB/s.
"""

from __future__ import annotations

import argparse
import logging
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import gpu_harness as gpu
from benchmarks import gpu_plan, gpu_report, gpu_results, harness
from benchmarks.bench_cpu import find_backend
from benchmarks.gpu_cases import (
    Case,
    Workspace,
    async_tp,
    base_sides,
    cases,
    compiled_sides,
    fused_sides,
    quick_cases,
    tiny_cases,
)

SEED = 0
CHECKS = 3
REPEATS = 5  # unsynchronised calls before a result is looked at once more: what races would spoil


def check(
    work: Workspace, sides: dict[str, gpu.Side], timer: gpu.Timer, failures: dict[str, str]
) -> dict[str, list[float]]:
    """Errors of each side as [norm, largest, limit of norm, limit of largest]; wrong sides are taken out of `sides`."""
    errors: dict[str, list[float]] = {}
    judged = [name for name, side in sides.items() if side.checked and name != "original"]
    for _ in range(CHECKS):
        work.refill()
        truth = work.truth()
        _poison(sides["original"])
        base = gpu.errors_of(sides["original"].run(), truth)
        limits = gpu.allowed(base, work.dtype)
        for name in [name for name in judged if name in sides]:
            harness.poison(sides["original"].written)
            found = gpu.attempt(name, partial(_errors, work, sides[name], timer, truth), failures)
            if found is None:
                del sides[name]
                continue
            worst = errors.setdefault(name, [0.0, 0.0, 0.0, 0.0])
            errors[name] = [max(a, b) for a, b in zip(worst, harness.slowest([*found, *limits]), strict=True)]
    for name, (norm, largest, norm_limit, largest_limit) in errors.items():
        if name in sides and not (norm <= norm_limit and largest <= largest_limit):
            failures[name] = f"wrong: error {norm:.1e} (limit {norm_limit:.1e}), largest {largest:.1e}"
            del sides[name]
    return errors


def _poison(side: gpu.Side) -> None:
    for tensor in side.written:
        tensor.fill_(float("nan"))


def _errors(work: Workspace, side: gpu.Side, timer: gpu.Timer, truth: list[torch.Tensor]) -> tuple[float, float]:
    worst = (0.0, 0.0)
    for repeats in (1, REPEATS):
        if repeats > 1:
            timer.heat()  # the calls stand in a deep queue, where one starts the moment that the one before ends
        for _ in range(repeats):
            got = list(side.run())
        found = gpu.errors_of(got[: len(truth)], truth)
        for moved in got[len(truth) :]:  # the gathered tensor: bytes that were moved, so they must be the same
            if not torch.equal(moved.view(work.whole.shape), work.whole):
                found = (float("inf"), float("inf"))
        worst = (max(worst[0], found[0]), max(worst[1], found[1]))
    return worst


def issue_times(sides: dict[str, gpu.Side], timer: gpu.Timer, failures: dict[str, str]) -> dict[str, float]:
    """Microseconds of the host per call: enqueueing only."""
    working = {name: side.run for name, side in sides.items() if name not in failures}
    if "tscompile" in working:
        bound: Any = working["tscompile"]
        working["tscompile, without dispatcher"] = lambda: bound.op.launch(*bound.args)
        working["start of a graph"] = bound.op.begin_again
    spent = {name: gpu.attempt(f"host {name}", partial(timer.host_us, run), failures) for name, run in working.items()}
    return {name: us for name, us in spent.items() if us is not None}


def run_case(case: Case, args: argparse.Namespace, timer: gpu.Timer, device: torch.device) -> dict[str, Any]:
    dtype = getattr(torch, args.dtype)
    work = Workspace(case, device, dtype)
    failures: dict[str, str] = {}
    sides = base_sides(work)
    other = async_tp(work) if args.async_tp else None
    if other is not None:
        sides["async_tp"] = other
    makers = dict(fused_sides(work))
    if args.compiled == "all" or (args.compiled == "some" and case.compiled):
        torch._dynamo.reset()
        makers |= compiled_sides(work, find_backend("tilescale"))
    for name, make in makers.items():
        made = gpu.attempt(name, make, failures)
        if made is not None:
            sides[name] = made
    errors = check(work, sides, timer, failures)
    ranks = dist.get_world_size()
    record: dict[str, Any] = {
        "name": case.name,
        "status": "done",
        "op": case.op,
        "label": case.label,
        "m": case.m,
        "n": case.local(ranks)[0],
        "k": case.local(ranks)[1],
        "transport_s": case.crossing(ranks, dtype.itemsize) / gpu_report.LINK_BYTES_PER_S,
        "errors": errors,
    }
    if args.dtype in ("bfloat16", "float16") and device.type == "cuda":
        record |= gpu_plan.planned(record, ranks, args.dtype)
    if not args.check_only:
        raced = gpu.race(sides, timer, args.rounds, SEED, graphs=args.graphs)
        failures |= raced.failures
        record |= {
            "rounds": {"eager": raced.eager, "graph": raced.graph},
            "host_us": issue_times(sides, timer, failures),
        }
    return record | {"failures": failures}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="11 cases and 3 rounds")
    parser.add_argument(
        "--tiny", action="store_true", help="4 cases that CPU ranks can do, to try the benchmark itself"
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains one of TEXT,TEXT,...")
    parser.add_argument("--rounds", type=int, help="rounds per case (6)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--compiled", default="some", choices=("no", "some", "all"), help="also through torch.compile")
    parser.add_argument("--async-tp", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--graphs", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--check-only", action="store_true", help="check every case and time none; fills kernel caches")
    parser.add_argument("--case-limit", type=float, default=150.0, metavar="SECONDS")
    parser.add_argument("--resume", action="store_true", help="leave out cases that the JSON has, hung ones too")
    parser.add_argument("--list", action="store_true", help="print the names of the cases and end")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), metavar="DIR or FILE.json")
    args = parser.parse_args(argv)
    args.rounds = args.rounds or (3 if args.quick or args.tiny else 6)
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    todo = tiny_cases() if args.tiny else quick_cases() if args.quick else cases()
    todo = [case for case in todo if any(text in case.name for text in args.only.split(","))]
    if args.list:
        print(*(case.name for case in todo), sep="\n")
        return 0
    logging.getLogger("torch").setLevel(logging.WARNING)
    device = gpu.start(args.device)
    with gpu.limit(args.case_limit):
        if args.async_tp and device.type == "cuda":
            from torch.distributed._symmetric_memory import enable_symm_mem_for_group

            enable_symm_mem_for_group(dist.group.WORLD.group_name)  # type: ignore[union-attr]
        path = gpu_results.result_path(args.out, "ops", device)
        results = gpu_results.Results(path, "gpu-ops", gpu_results.environment(device, args.dtype), args.resume)
        timer = gpu.Timer(device, min_ms=8.0 if device.type == "cuda" else 1.0)
    with torch.no_grad():
        for number, case in enumerate(todo, 1):
            if results.has(case.name):
                continue
            results.put({"name": case.name, "status": "started"})
            gpu.say(f"[{number}/{len(todo)}] {case.name} ...")
            with gpu.limit(args.case_limit):
                record = run_case(case, args, timer, device)
            results.put(record)
            gpu.say(*gpu_report.case_lines(record), sep="\n    ")
            if device.type == "cuda":
                torch.cuda.empty_cache()
    if dist.get_rank() == 0:
        gpu_report.print_ops(results.data)
        print(f"\nwrote {results.path}", flush=True)
    gpu.finish()
    return 0


if __name__ == "__main__":
    sys.exit(gpu.guarded(main))
