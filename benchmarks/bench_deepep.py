"""Expert-parallel dispatch and combine (examples/tilescale/expert_parallel) against all_to_all_single, and against what SMs can push.

    torchrun --nproc-per-node 4 -m benchmarks.bench_deepep [--tokens 4096] [--sms 24 64 132] [--rounds 9] [--out DIR or FILE.json]

Run it from the root of the repository. Any token may have any expert, and every rank has as many tokens. Theirs are code around NCCL's
all_to_all_single: "once" sends a token once to each rank as ours does, "copies" a copy to each of its experts, as is usual. Bytes are
those of rows that leave the busiest rank for others, or arrive there, once per token and rank, and not what goes with them. The peak
is the best of several launches of a plain kernel that pushes 64 MiB to the next rank, all ranks at once, in the same rounds.

Everything is compared with "once", bit for bit, before it is timed. `--device cpu` tries the program itself on CPU ranks.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import tscompile.language as tl
from benchmarks import bench_language, gpu_results, harness
from benchmarks import gpu_harness as gpu

EXAMPLES = Path(__file__).parents[1] / "examples" / "tilescale"
sys.path.insert(0, str(EXAMPLES))  # the scripts import each other by these names
from common import World, assert_equal  # noqa: E402
from deepep import compare  # noqa: E402
from expert_parallel import ExpertExchange, reference  # noqa: E402
from expert_parallel.routing import Router  # noqa: E402

SEED, PEAK_BYTES = 0, 64 << 20
OPS = ("dispatch", "cached dispatch", "combine")
TINY = {"tokens": 48, "hidden": 128, "experts": 8, "topk": 3, "sms": [2]}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tokens", type=int, default=4096, help="of each rank")
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--topk", type=int, default=8)
    parser.add_argument("--sms", type=int, nargs="+", default=[24, 64, 132])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), metavar="DIR or FILE.json")
    args = parser.parse_args(argv)
    if args.device == "cpu":
        vars(args).update(TINY)
    return args


def connected(args: argparse.Namespace) -> World:
    """A world with room for the exchanges."""
    rows = dist.get_world_size() * args.tokens
    nbytes = len(args.sms) * (2 * rows * (2 * args.hidden + 12 * args.topk + 4) + (1 << 20))
    nbytes += 2 * PEAK_BYTES if args.device == "cuda" else 0
    group = tl.SymmetricGroup(nbytes=nbytes, timeout_s=60.0)
    generator = torch.Generator(device=group.device).manual_seed(SEED + group.rank)
    return World(args, group, tl.dialect(args.device), random.Random(SEED + group.rank), generator)


class Race:
    """Data of a rank, what theirs makes of it, and ours with each number of SMs."""

    def __init__(self, world: World) -> None:
        args = world.args
        self.world, self.experts = world, args.experts
        router = Router(args.tokens, args.topk, args.experts, world.size, world.rank, world.dice)
        self.topk_idx = router.choose("any expert").to(world.device)
        self.x = world.random(args.tokens, args.hidden, dtype=torch.bfloat16)
        self.topk_weights = world.random(args.tokens, args.topk)
        self.once = reference.dispatch(self.x, self.topk_idx, self.topk_weights, args.experts)
        self.copies, self.copies_sent = reference.dispatch_copies(self.x, self.topk_idx, args.experts)
        self.exchanges = {
            sms: ExpertExchange(
                world,
                experts=args.experts,
                topk=args.topk,
                hidden=args.hidden,
                dtype=torch.bfloat16,
                max_recv_tokens=world.size * args.tokens,
                num_sms=sms,
            )
            for sms in args.sms
        }

    def bytes(self) -> int:
        """Of rows, to or from other ranks, whichever are more, on the busiest rank."""
        sent, rank = self.once.sent, self.world.rank
        rows = max(sum(counts) - counts[rank] for counts in (sent.to, sent.come))
        return int(harness.slowest([float(rows)])[0]) * self.x.shape[1] * self.x.element_size()

    def theirs(self) -> dict[str, Callable[[], Any]]:
        x, idx, weights, tokens = self.x, self.topk_idx, self.topk_weights, len(self.x)
        return {
            "dispatch once": lambda: reference.dispatch(x, idx, weights, self.experts),
            "dispatch copies": lambda: reference.dispatch_copies(x, idx, self.experts),
            "combine once": lambda: reference.combine(self.once.x, self.once.sent, tokens),
            "combine copies": lambda: reference.combine_copies(self.copies, self.copies_sent, tokens),
        }

    def ours(self, sms: int) -> dict[str, Callable[[], Any]]:
        """After a check of each against theirs.

        Raises:
            RuntimeError: results differ on some rank.
        """
        exchange = self.exchanges[sms]
        got = exchange.dispatch(self.x, self.topk_idx, self.topk_weights)
        handle, y = got.handle, exchange.combine_input(got.handle)
        y.copy_(got.x)
        sides = {
            "dispatch": lambda: exchange.dispatch(self.x, self.topk_idx, self.topk_weights),
            "cached dispatch": lambda: exchange.dispatch_cached(self.x, handle),
            "combine": lambda: exchange.combine(y, handle),
        }
        failure = ""
        try:
            compare("dispatch", sides["dispatch"](), self.once)
            assert_equal("cached dispatch", sides["cached dispatch"](), self.once.x)
            want = reference.combine(self.once.x, self.once.sent, len(self.x))
            assert_equal("combine", sides["combine"]()[0], want)
        except AssertionError as error:
            failure = str(error)
        self.world.group.check()
        if gpu.on_any_rank(bool(failure)):
            raise RuntimeError(f"{sms} SMs: {failure or 'wrong on another rank'}")
        return {f"{op}, {sms} SMs": side for op, side in sides.items()}


def peaks(world: World) -> dict[str, Callable[[], Any]]:
    """Plain copies to and from the memory of the next rank."""
    if world.device.type == "cpu":
        return {}
    tensor = world.group.tensor((2 * PEAK_BYTES,), torch.uint8)
    peer = world.group.peers(tensor)[(world.rank + 1) % world.size]
    sides = bench_language.launchers(PEAK_BYTES, tensor.data_ptr(), peer.data_ptr(), shapes=())
    return {
        name.replace("put_block plain", "push").replace("get_block plain", "pull"): side for name, side in sides.items()
    }


def fastest(rounds: Sequence[Mapping[str, float]], prefix: str) -> str:
    """The side with the least median time among those whose names begin so; "" if there is none."""
    names = [name for name in rounds[0] if name.startswith(prefix)]
    return min(names, key=lambda name: statistics.median(times[name] for times in rounds), default="")


def summary(op: str, rounds: Sequence[Mapping[str, float]], nbytes: int) -> dict[str, Any]:
    """Ours with the best number of SMs against theirs and against the peak, within rounds."""
    ours, kind, push = fastest(rounds, f"{op}, "), op.split()[-1], fastest(rounds, "push ")

    def ratio(numerator: str, denominator: str, scale: float = 1.0) -> dict[str, float]:
        return harness.bootstrap(rounds, lambda r: scale * harness.paired_ratio(r, numerator, denominator)).to_dict()

    shown = {
        name: statistics.median(times[name] for times in rounds)
        for name in rounds[0]
        if name.startswith((f"{op}, ", f"{kind} "))
    }
    return {
        "name": op,
        "bytes": nbytes,
        "best": ours,
        "milliseconds": {name: 1e3 * seconds for name, seconds in shown.items()},
        "gbytes_per_s": {name: nbytes / seconds / 1e9 for name, seconds in shown.items() if name.startswith(f"{op}, ")},
        "speedup_once": ratio(f"{kind} once", ours),
        "speedup_copies": ratio(f"{kind} copies", ours),
        "of_peak": ratio(push, ours, nbytes / PEAK_BYTES) if push else None,
        "peak": push,
        "peak_gbytes_per_s": PEAK_BYTES / statistics.median(times[push] for times in rounds) / 1e9 if push else None,
        "rounds": [{name: times[name] for name in (*shown, *([push] if push else []))} for times in rounds],
    }


def lines(case: dict[str, Any]) -> list[str]:
    def text(name: str) -> str:
        return "{value:.2f} [{low:.2f}, {high:.2f}]".format(**case[name])

    of_peak = f", {text('of_peak')} of the peak of {case['peak_gbytes_per_s']:.0f} GB/s" if case["of_peak"] else ""
    return [
        f"{case['name']}, {case['bytes'] / 2**20:.1f} MiB: {text('speedup_once')} x once, {text('speedup_copies')} x copies{of_peak}",
        *(
            f"  {ms:8.3f} ms  {name}"
            + (f"  {case['gbytes_per_s'][name]:.0f} GB/s" if name in case["gbytes_per_s"] else "")
            for name, ms in sorted(case["milliseconds"].items(), key=lambda item: item[1])
        ),
    ]


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    device = gpu.start(args.device)
    with gpu.limit(300.0):
        path = gpu_results.result_path(args.out, "deepep", device)
        results = gpu_results.Results(path, "gpu-deepep", gpu_results.environment(device, "bfloat16"), False)
        world = connected(args)
        race = Race(world)
        nbytes = race.bytes()
        sides = {name: gpu.Side(run) for name, run in race.theirs().items()}
        for sms in args.sms:
            sides |= {name: gpu.Side(run) for name, run in race.ours(sms).items()}
        gpu.say("results are right; timing")
        sides |= {name: gpu.Side(run) for name, run in peaks(world).items()}
        times = gpu.race(sides, gpu.Timer(device), args.rounds, SEED, graphs=False)
        world.group.check()
        if times.failures:
            raise RuntimeError(f"failed: {times.failures}")
        for op in OPS:
            case = summary(op, times.eager, nbytes)
            results.put(case | {name: getattr(args, name) for name in ("tokens", "hidden", "experts", "topk")})
            gpu.say(*lines(case), sep="\n    ")
        gpu.say(f"pull peak: {fastest(times.eager, 'pull ') or 'none on CPU ranks'}")
        world.group.barrier()
    gpu.finish()
    return 0


if __name__ == "__main__":
    sys.exit(gpu.guarded(main))
