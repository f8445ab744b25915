"""mesh_matmul on the GPUs of one host: a matmul of [size, size] matrices on a mesh of 2 x (ranks / 2), both operands gathered.

    torchrun --nproc-per-node 4 -m benchmarks.bench_mesh [--sizes N,N] [--rounds N] [--out DIR or FILE.json]

Run it from the root of the repository. `summa`: what is gathered is contracted, as DTensor does it on a 2-D mesh; `blocks`: rows and
columns of the result are gathered. Candidates: `gemm` (cuBLAS alone), `original` (both gathers with NCCL, each followed by the cat
that puts an inner dim together, then cuBLAS), `one_gather` (the faster of fusing one of the gathers, the other with NCCL), and
`tscompile`. All are checked against float32 first; what is wrong or raises is reported and not timed. Method and traps:
benchmarks/gpu_harness.py.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import direct, gpu_results
from benchmarks import gpu_harness as gpu
from tscompile.problem import GatherUse

SIZES = (2048, 4096, 8192, 16384)
SUMMA, BLOCKS = "summa", "blocks"
GOALS = {8192: 1.25, 16384: 1.18}  # times as fast as `original`
Groups = tuple[dist.ProcessGroup, dist.ProcessGroup]


def mesh_groups(rows: int) -> Groups:
    """Row and column of this rank on a mesh of `rows` rows."""
    columns = dist.get_world_size() // rows
    i, j = divmod(dist.get_rank(), columns)
    in_rows = [dist.new_group([r * columns + c for c in range(columns)]) for r in range(rows)]
    in_columns = [dist.new_group([r * columns + c for r in range(rows)]) for c in range(columns)]
    return in_rows[i], in_columns[j]


class Work:
    """Tensors of a case on this rank: of [size, size] operands the parts that it holds."""

    def __init__(self, size: int, layout: str, groups: Groups, device: torch.device, dtype: torch.dtype) -> None:
        self.size, self.groups = size, groups
        row, column = groups
        m, n = size // column.size(), size // row.size()  # of this rank's part of the result
        self.dims = (1, 0) if layout == SUMMA else (0, 1)  # along which the operands are gathered
        left = (m, size // row.size()) if layout == SUMMA else (m // row.size(), size)
        right = (size // column.size(), n) if layout == SUMMA else (size, n // column.size())
        self.lhs, self.rhs = (torch.empty(shape, device=device, dtype=dtype) for shape in (left, right))
        name = str(dtype).removeprefix("torch.")
        axes = ("rows", "cols")
        self.uses = (
            GatherUse("lhs", False, axes[self.dims[0]], name),  # type: ignore[arg-type]
            GatherUse("rhs", False, axes[self.dims[1]], name),  # type: ignore[arg-type]
        )
        self.refill()

    def refill(self) -> None:
        self.lhs.normal_()
        self.rhs.normal_().mul_(self.size**-0.5)

    @property
    def shards(self) -> tuple[Tensor, Tensor]:
        """As [P, Q]."""
        left, right = (x if dim else x.view(1, -1) for x, dim in zip((self.lhs, self.rhs), self.dims, strict=True))
        return left, right

    def gathered(self, which: int, dtype: torch.dtype | None = None) -> Tensor:
        shard, group, dim = (self.lhs, self.rhs)[which], self.groups[which], self.dims[which]
        shard = shard if dtype is None else shard.to(dtype)
        whole = shard.new_empty((group.size() * shard.shape[0], shard.shape[1]))
        dist.all_gather_into_tensor(whole, shard, group=group)
        return torch.cat(whole.chunk(group.size()), 1) if dim else whole

    def original(self) -> list[Tensor]:
        return [self.gathered(0) @ self.gathered(1)]

    def truth(self) -> list[Tensor]:
        wide = torch.float64 if self.lhs.dtype == torch.float32 else torch.float32
        return [self.gathered(0, wide) @ self.gathered(1, wide)]

    def fused(self) -> direct.BoundOp:
        return direct.mesh_matmul(*self.shards, self.uses, self.size, groups=self.groups)

    def one_gather(self, which: int) -> Callable[[], list[Tensor]]:
        """Operand `which` is gathered by the fused op, the other one before."""
        op = direct.all_gather_matmul(
            self.shards[which], (self.uses[which],), [self.gathered(1 - which)], group=self.groups[which]
        )

        def run() -> list[Tensor]:
            shard, _, biases = op.args
            return op.op.call(shard, [self.gathered(1 - which)], biases)

        return run


def sides_of(work: Work, failures: dict[str, str]) -> dict[str, gpu.Side]:
    left, right = work.gathered(0), work.gathered(1)
    out = torch.empty(left.shape[0], right.shape[1], device=left.device, dtype=left.dtype)
    sides = {
        "gemm": gpu.Side(lambda: torch.mm(left, right, out=out), checked=False),
        "original": gpu.Side(work.original),
    }
    makers: dict[str, Callable[[], Any]] = {
        "one_gather, left": partial(work.one_gather, 0),
        "one_gather, right": partial(work.one_gather, 1),
        "tscompile": work.fused,
    }
    for name, make in makers.items():
        made = gpu.attempt(name, make, failures)
        if made is not None:
            sides[name] = gpu.Side(made)
    return sides


def _errors(side: gpu.Side, truth: list[Tensor]) -> tuple[float, float]:
    return gpu.errors_of(side.run()[:1], truth)


def check(work: Work, sides: dict[str, gpu.Side], failures: dict[str, str]) -> None:
    """Take out what is wrong, or raises."""
    for _ in range(2):
        work.refill()
        truth = work.truth()
        limits = gpu.allowed(gpu.errors_of(sides["original"].run(), truth), work.lhs.dtype)
        for name in [name for name, side in sides.items() if side.checked and name != "original"]:
            found = gpu.attempt(name, partial(_errors, sides[name], truth), failures)
            wrong = found is not None and not all(a <= b for a, b in zip(found, limits, strict=True))
            if gpu.on_any_rank(wrong):
                failures[name] = f"wrong: errors {found}, limits {limits}"
            if name in failures:
                del sides[name]


def run_case(
    size: int, layout: str, groups: Groups, timer: gpu.Timer, device: torch.device, rounds: int
) -> dict[str, Any]:
    work = Work(size, layout, groups, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    failures: dict[str, str] = {}
    sides = sides_of(work, failures)
    check(work, sides, failures)
    raced = gpu.race(sides, timer, rounds, 0, graphs=False)
    failures |= raced.failures
    times = {name: 1e6 * statistics.median(each[name] for each in raced.eager) for name in raced.eager[0]}
    ratios = {
        name: statistics.median(each["original"] / each[name] for each in raced.eager)
        for name in times
        if name != "original"
    }
    return {
        "name": f"{layout} {size}",
        "status": "done",
        "us": times,
        "faster_than_original": ratios,
        "goal": GOALS.get(size),
        "rounds": raced.eager,
        "host_us": {name: timer.host_us(side.run) for name, side in sides.items() if name in ("original", "tscompile")},
        "failures": failures,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)))
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--rows", type=int, default=2, help="rows of the mesh")
    parser.add_argument("--case-limit", type=float, default=150.0, metavar="SECONDS")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), metavar="DIR or FILE.json")
    args = parser.parse_args(argv)
    device = gpu.start(args.device)
    if dist.get_world_size() % args.rows or dist.get_world_size() < 2 * args.rows:
        raise SystemExit(
            f"a mesh of {args.rows} rows and as many ranks in each needs a multiple of them, 4 ranks at least"
        )
    path = gpu_results.result_path(args.out, "mesh", device)
    results = gpu_results.Results(path, "gpu-mesh", gpu_results.environment(device, "bfloat16"), False)
    groups = mesh_groups(args.rows)
    timer = gpu.Timer(device, min_ms=8.0 if device.type == "cuda" else 1.0)
    with torch.no_grad():
        for size in map(int, args.sizes.split(",")):
            for layout in (SUMMA, BLOCKS):
                with gpu.limit(args.case_limit):
                    record = run_case(size, layout, groups, timer, device, args.rounds)
                results.put(record)
                times = ", ".join(f"{name} {us:.0f}" for name, us in record["us"].items())
                ratio = record["faster_than_original"].get("tscompile", float("nan"))
                goal = f" (goal {record['goal']})" if record["goal"] else ""
                gpu.say(f"{record['name']}: us: {times}; {ratio:.2f} times as fast{goal} {record['failures'] or ''}")
                if device.type == "cuda":
                    torch.cuda.empty_cache()
    if dist.get_rank() == 0:
        print(f"\nwrote {results.path}", flush=True)
    gpu.finish()
    return 0


if __name__ == "__main__":
    sys.exit(gpu.guarded(main))
