"""The all-gather and all-to-all of examples/tilescale against NCCL's, from 64 KiB to 256 MiB.

    torchrun --nproc-per-node 4 -m benchmarks.bench_tilescale [--rounds N] [--sizes KIB ...] [--out DIR or FILE.json]

Run it from the root of the repository; `--device cpu` tries it on gloo ranks. A size is that of the result on each rank. Results are
compared with NCCL's, bit for bit, before anything is timed. Method and traps: benchmarks/gpu_harness.py.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import tscompile.language as tl
from benchmarks import gpu_harness as gpu
from benchmarks import gpu_results, harness

EXAMPLES = Path(__file__).parents[1] / "examples/tilescale"
GATHER, EXCHANGE = "all_gather", "all_to_all"
SIZES_KIB = [64, 256, 1024, 4096, 16384, 65536, 262144]
COLS = 128  # 512 bytes a row, so that a result of 64 KiB has a row for each block
RIVAL = {"cuda": "nccl", "cpu": "gloo"}
OURS, SEED = "ours", 0
_epochs = itertools.count(1)


def compiled(device: str, ranks: int) -> Mapping[str, tuple[Any, int]]:
    """The kernels of the examples, and in how many pieces each sends what it sends. Rank 0 fills TileLang's cache first."""
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))
    import all_to_all
    import allgather

    dialect = tl.dialect("cuda" if device == "cuda" else "cpu")
    functions = {
        GATHER: (allgather.all_gather(dialect, ranks, COLS), allgather.PIECES),
        EXCHANGE: (all_to_all.all_to_all(dialect, ranks, COLS), all_to_all.PIECES),
    }
    for turn in range(2):
        if (dist.get_rank() == 0) == (turn == 0):
            kernels = {op: (dialect.compile(function), pieces) for op, (function, pieces) in functions.items()}
        dist.barrier()
    return kernels


def sides(op: str, kernel: Any, pieces: int, group: tl.SymmetricGroup, nbytes: int) -> dict[str, gpu.Side]:
    """Both sides for a result of `nbytes` on each rank."""
    size, rows = group.size, max(nbytes // (4 * COLS) // group.size, 1)
    result = group.tensor((2, size, rows, COLS), torch.float32)
    arrived = group.tensor((size, pieces), torch.int32)
    theirs = torch.empty(size * rows, COLS, device=group.device)

    def alternating(launch: Callable[[int], None]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            epoch = next(_epochs)
            launch(epoch)
            return result[epoch % 2].flatten(0, 1)

        return run

    if op == GATHER:
        shard = torch.randn(rows, COLS, device=group.device)

        def rival() -> Tensor:
            dist.all_gather_into_tensor(theirs, shard)
            return theirs

        run = alternating(lambda epoch: kernel(group.context, shard, result, arrived, epoch))
    else:
        tokens = torch.randn(size * rows, COLS, device=group.device)
        starts = torch.arange(0, size * rows + 1, rows, dtype=torch.int32, device=group.device)
        counts = group.tensor((2, size), torch.int32)

        def rival() -> Tensor:
            dist.all_to_all_single(theirs, tokens)
            return theirs

        run = alternating(lambda epoch: kernel(group.context, tokens, starts, result, counts, arrived, epoch))
    return {OURS: gpu.Side(run), RIVAL[group.device.type]: gpu.Side(rival)}


def right(both: Mapping[str, gpu.Side], group: tl.SymmetricGroup) -> bool:
    """Both results of ours are what the rival's is, on all ranks."""
    ours, theirs = (side.run for side in both.values())
    want = theirs().clone()
    same = all(torch.equal(ours(), want) for _ in range(2))
    group.check()
    return not gpu.on_any_rank(not same)


def summary(op: str, nbytes: int, ranks: int, race: gpu.Race, rival: str) -> dict[str, Any]:
    """Times, what passes the link of a rank in a second, and the speed-up, paired within rounds."""
    seconds = {name: statistics.median(times[name] for times in race.eager) for name in race.eager[0]}
    ratio = harness.bootstrap(race.eager, lambda sample: harness.paired_ratio(sample, rival, OURS))
    return {
        "name": f"{op} {nbytes >> 10} KiB",
        "op": op,
        "bytes": nbytes,
        "us": {name: 1e6 * s for name, s in seconds.items()},
        "gbytes_per_s": {name: nbytes * (ranks - 1) / ranks / s / 1e9 for name, s in seconds.items()},
        "speedup": ratio.to_dict(),
        "rounds": race.eager,
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES_KIB, metavar="KIB")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), metavar="DIR or FILE.json")
    args = parser.parse_args(argv)
    device = gpu.start(args.device)
    ranks, rival = dist.get_world_size(), RIVAL[device.type]
    kernels = compiled(device.type, ranks)
    path = gpu_results.result_path(args.out, "tilescale", device)
    results = gpu_results.Results(path, "gpu-tilescale", gpu_results.environment(device, "float32"), False)
    timer = gpu.Timer(device)
    for (op, (kernel, pieces)), kib in itertools.product(kernels.items(), args.sizes):
        nbytes = kib << 10
        with gpu.limit(120.0), tl.SymmetricGroup(nbytes=2 * nbytes + (1 << 20)) as group:
            both = sides(op, kernel, pieces, group, nbytes)
            if not right(both, group):
                raise RuntimeError(f"{op}, {kib} KiB: not what {rival} makes of it")
            race = gpu.race(both, timer, args.rounds, SEED, graphs=False)
            group.check()
            if race.failures:
                raise RuntimeError(f"{op}, {kib} KiB: {race.failures}")
            case = summary(op, nbytes, ranks, race, rival)
            results.put(case)
            times = ", ".join(
                f"{name} {us:.1f} us ({case['gbytes_per_s'][name]:.0f} GB/s)" for name, us in case["us"].items()
            )
            gpu.say(f"{case['name']:22} {times}, {case['speedup']['value']:.2f}x")
    gpu.say(f"wrote {results.path}")
    gpu.finish()
    return 0


if __name__ == "__main__":
    sys.exit(gpu.guarded(main))
