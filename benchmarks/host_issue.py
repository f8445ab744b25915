"""What a fused op over NVLink costs its host, without a GPU: everything from `runtime.launch` down, with a driver that does nothing.

    python -m benchmarks.host_issue [--profile CASE]

The path is the product's, from the runtime to stream.c; only the calls of the CUDA driver are stubs, and torch allocates on the CPU.
Times are microseconds of a call, the least of many short rounds, and inclusive: a row has those below it in it.

Traps: what the driver's calls, torch's matmuls and its allocator for GPUs take is not in these times, and comes on top (a launch 2 to 4
us, other calls 1 to 3, a matmul in a virtual machine 19 to 30: benchmarks/driver_calls.py). So the calls are counted as well. Other
programs on the same cores spoil some rounds; the least ones differ by 10 % from run to run.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.templates.nvlink.fake_gpu import large_forms
from tests.templates.nvlink.stub_gpu import GROUP, StubRank, fused_only
from tscompile.fx_passes import patterns  # noqa: F401  (importing it registers the ops)
from tscompile.problem import Delivery, Departure, GatherUse, Plan
from tscompile.templates import find_template

Case = tuple[Plan, tuple[Any, ...]]
Section = Callable[[], object]
BF16 = "bfloat16"
ROWS = GatherUse("lhs", False, "rows", BF16)
ROUNDS, CALLS = 300, 50
TOKENS, HEADS, DIM = 8192, 32, 128  # of a Ulysses block, in all
RANKS, SLOT_BYTES = 4, 48 << 20


def cases() -> dict[str, Case]:
    x, weight, shard = (torch.randn(*shape).to(torch.bfloat16) for shape in ((512, 512), (512, 512), (1, 128 * 512)))
    right = weight.t()
    term: dict[str, Any] = {"coefficients": (1.0,), "term_group": (0,)}
    scatter = Plan("matmul_reduce_scatter", "g/0", "nvlink", BF16, **term)
    reduce = Plan("matmul_all_reduce", "g/1", "nvlink", BF16, **term)
    gather = Plan("all_gather_matmul", "g/2", "nvlink", BF16, uses=(ROWS,))
    three = Plan("all_gather_matmul", "g/3", "nvlink", BF16, uses=(ROWS,) * 3, return_gathered=True)
    exchange: dict[str, Any] = {"deliveries": tuple(Delivery(i, (2, 0, 1, 3)) for i in range(3)), "joins": (1, 1, 1)}
    exchanged = Plan("all_to_all_permute", "g/4", "nvlink", BF16, **exchange)
    heads = [torch.randn(128, 4, 2, 64).to(torch.bfloat16).transpose(0, 1) for _ in range(3)]
    matmul_all_to_all, projected = ulysses()
    return {
        "reduce_scatter": (scatter, ([x], [right], [None], [], 1)),
        "all_reduce": (reduce, ([x], [right], [None], [])),
        "gather": (gather, (shard, [right], [None])),
        "gather3": (three, (shard, [right] * 3, [None] * 3)),
        "exchange3": (exchanged, (heads,)),
        "projected3": (matmul_all_to_all, projected),
        "back": back(),
    }


def ulysses() -> Case:
    """q, k and v of one projection, as the block of benchmarks/model_ulysses.py sends them."""
    tokens, width = TOKENS // RANKS, HEADS * DIM
    shape = [1, tokens, 3, RANKS, HEADS // RANKS, DIM]
    departures = tuple(Departure(0, len(shape), ((2, part),), (2, 0, 1, 3, 4)) for part in range(3))
    deliveries = tuple(Delivery(part, (1, 0, 2, 3, 4)) for part in range(3))
    plan = Plan(
        "matmul_all_to_all", "g/5", "nvlink", BF16, deliveries=deliveries, joins=(1,) * 3, departures=departures
    )
    x, weight = (torch.empty(*size, dtype=torch.bfloat16) for size in ((tokens, width), (3 * width, width)))
    return plan, ([x], [weight.t()], [None], shape * 3)


def back() -> Case:
    """The exchange behind its attention: `[batch, heads of a rank, tokens, dim]`, as [R, batch, tokens of a rank, heads, dim]."""
    plan = Plan("all_to_all_permute", "g/6", "nvlink", BF16, deliveries=(Delivery(0, (1, 2, 0, 3, 4)),), joins=(1,))
    attended = torch.empty(1, HEADS // RANKS, RANKS, TOKENS // RANKS, DIM, dtype=torch.bfloat16)
    return plan, ([attended.permute(2, 0, 3, 1, 4)],)


class Matmuls:
    """Stands for `torch.mm`, which computes nothing and allocates nothing: the CPU's allocator takes long for results of this size."""

    def __init__(self) -> None:
        self.count = 0
        self._results: dict[tuple[int, int], torch.Tensor] = {}

    def __call__(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        self.count += 1
        shape = a.shape[0], b.shape[1]
        found = self._results.get(shape)
        if found is None:
            found = self._results[shape] = a.new_empty(shape)
        return found


def sections(rank: StubRank, plan: Plan, args: tuple[Any, ...]) -> dict[str, Section]:
    """What is timed, from the outside in."""
    rank.launch(plan, args)
    group, executor, template = rank.group, rank.executor, find_template(plan.kind, plan.executor)
    assert template is not None
    memo = group.memo(template, plan, args)
    site = memo.kept
    (call, *_) = site.recipe._calls.values()
    text, token = plan.dumps(), torch.zeros(1, dtype=torch.int64)
    op = getattr(torch.ops.tscompile, plan.kind).default
    return {
        "op, with dispatcher": lambda: op(*args, token, text, GROUP),
        "runtime.launch": lambda: rank.launch(plan, args),
        "group.launch": lambda: group.launch(plan, args, fused_only),
        "executor.run": lambda: executor.run(template, None, plan, args, memo),  # type: ignore[arg-type]
        "template.run": lambda: template.run(rank.link.open(site), plan, *args),
        "link.issue": lambda: [rank.link.issue(steps) for steps in (*call.early, call.steps)],
        "(an empty call)": lambda: None,
    }


def race(functions: dict[Any, Section]) -> dict[Any, float]:
    """Microseconds of each: in turn, so that a busy moment of the machine meets all of them."""
    least = dict.fromkeys(functions, float("inf"))
    for _ in range(ROUNDS):
        for name, function in functions.items():
            begin = time.perf_counter()
            for _ in range(CALLS):
                function()
            least[name] = min(least[name], 1e6 * (time.perf_counter() - begin) / CALLS)
    return least


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", metavar="CASE", choices=list(cases()), help="print what cProfile finds in a case")
    profiled = parser.parse_args().profile
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        large_forms(patch)  # they cost the host most
        rank, table = StubRank(patch, size=RANKS, slot_bytes=SLOT_BYTES), {}
        matmuls = Matmuls()
        patch.setattr(torch, "mm", matmuls)
        for name, (plan, args) in cases().items():
            functions = sections(rank, plan, args)
            table |= {(section, name): function for section, function in functions.items()}
            for _ in range(10):
                rank.driver.calls()
                matmuls.count = 0
                rank.launch(plan, args)
            found = rank.driver.calls()
            print(f"{name}: {len(found)} calls, {matmuls.count} matmuls: {' '.join(found)}")
            if name == profiled:
                with cProfile.Profile() as profile:
                    for _ in range(20000):
                        rank.launch(plan, args)
                pstats.Stats(profile).sort_stats("tottime").print_stats(25)
        least = race(table)
        print(f"{'us':20}", *(f"{name:>15}" for name in cases()))
        for section in functions:
            print(f"{section:20}", *(f"{least[section, name]:15.2f}" for name in cases()))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
