"""What `sp_ag_attention.py --bench` does: a race against a gather by NCCL that is followed by torch's attention.

All sides are checked first, and then timed by benchmarks/gpu_harness.py: eager calls, in rounds with an order shuffled anew in each, on
heated GPUs, the slowest rank. `keys there` is torch's attention alone, on keys that have been gathered: a bound for any overlap by a
kernel of that speed.
"""

import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from common import World, assert_as_good
from sp_ag_attention import GatheredAttention, Problem, Reference, whole
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from tscompile.templates.kv_schedule import Cut

sys.path.append(str(Path(__file__).parents[2]))  # of a checkout
from benchmarks import gpu_harness, harness

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, bool], torch.Tensor]
"""(q [1, heads, n, dim], k and v [1, kv heads, length, dim], causal) -> out, where the last query sees the last key."""


def flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    mask = causal_lower_right(q.shape[2], k.shape[2]) if causal else None
    with sdpa_kernel(
        [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH] if q.device.type == "cpu" else SDPBackend.FLASH_ATTENTION
    ):
        return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)


def cudnn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    """torch's cuDNN masks squares only. So causal attention is that of the past and that of the own keys, merged by their weights."""
    past = k.shape[2] - q.shape[2] if causal else k.shape[2]
    parts = [(k[:, :, :past], v[:, :, :past], False), (k[:, :, past:], v[:, :, past:], True)]
    done = []
    for keys, values, masked in parts:
        if keys.shape[2]:
            out, mass = torch.ops.aten._scaled_dot_product_cudnn_attention(
                q, keys, values, None, True, 0.0, masked, False
            )[:2]
            done.append((out, mass.reshape(*q.shape[:3], 1)))
    if len(done) == 1:
        return done[0][0]
    (first, first_mass), (second, second_mass) = done
    share = torch.sigmoid(second_mass - first_mass).to(q.dtype)
    return torch.lerp(first, second, share)


class Rival:
    """all_gather of k and v, in order of the sequence, then attention. One sequence, of which all ranks have the same share."""

    def __init__(self, world: World, problem: Problem, attention: Attention, q: torch.Tensor) -> None:
        self.world, self.problem, self.attention, self.q = world, problem, attention, q
        shape = (2, world.size * problem.keys.rows(0), problem.kv_heads, problem.dim)
        self.gathered = torch.empty(shape, dtype=problem.dtype, device=world.device)
        positions = [
            p for rank in range(world.size) for run in problem.keys.runs(rank) for p in range(run.start, run.stop)
        ]
        self.order = torch.tensor(positions, device=world.device).argsort() if problem.keys.zigzag else None

    def __call__(self, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return self.attend(self.gather(k, v))

    def gather(self, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        for into, mine in zip(self.gathered, (k, v), strict=True):
            self.world.gather_into(into, mine)
        return self.gathered if self.order is None else self.gathered.index_select(1, self.order)

    def attend(self, gathered: torch.Tensor) -> torch.Tensor:
        keys, values = gathered.transpose(1, 2)
        outs = []
        for run in self.problem.queries.runs(self.world.rank):
            stop = run.stop if self.problem.causal else keys.shape[1]
            q = self.q[run.row : run.row + run.stop - run.start].transpose(0, 1)[None]
            out = self.attention(q, keys[None, :, :stop], values[None, :, :stop], self.problem.causal)
            outs.append(out[0].transpose(0, 1))
        return torch.cat(outs) if len(outs) > 1 else outs[0]


def bench(world: World) -> str:
    args, size = world.args, world.size
    if args.seq % (2 * size):
        raise ValueError(f"--seq {args.seq} must be a multiple of {2 * size}")
    rivals = {"flash": flash, "cuDNN": cudnn} if world.device.type == "cuda" else {"flash": flash}
    timer = gpu_harness.Timer(world.device)
    lines = [
        f"{size} ranks, {args.seq} tokens, {args.heads} heads, {args.groups} of keys, {args.dim} wide; ms, medians"
    ]
    for name, cut, causal in (("full", Cut((args.seq,), size), False), ("zig-zag", Cut((args.seq,), size, True), True)):
        problem = Problem(cut, cut, causal, args.heads, args.groups, args.dim, world.dtype)
        q, k, v = problem.inputs(world)
        op = GatheredAttention(world, problem)
        sides: dict[str, Callable[[], torch.Tensor]] = {"tscompile": partial(op, q, k, v)}
        gathering = {rival: Rival(world, problem, attention, q) for rival, attention in rivals.items()}
        for rival, gathers in gathering.items():
            sides[f"{world.rival} + {rival}"] = partial(gathers, k, v)
        failures: dict[str, str] = {}
        outs = {side: gpu_harness.attempt(side, call, failures) for side, call in sides.items()}
        reference = Reference(problem, world.rank, q, *(whole(world, cut, x) for x in (k, v)))
        baseline = reference.compute(q.dtype)
        for side, out in outs.items():
            if out is not None:
                assert_as_good(f"{name}: {side}", out, baseline, reference.truth)
        world.group.check()
        for rival in rivals:
            if outs[f"{world.rival} + {rival}"] is not None:
                sides[f"{rival}, keys there"] = partial(gathering[rival].attend, gathering[rival].gather(k, v))
        race = gpu_harness.race(
            {side: gpu_harness.Side(call) for side, call in sides.items() if side not in failures},
            timer,
            args.rounds,
            args.seed,
            graphs=False,
        )
        world.group.check()
        medians = {side: statistics.median(times[side] for times in race.eager) for side in race.eager[0]}
        best = min((side for side in medians if side.startswith(world.rival)), key=medians.__getitem__)
        ratio = harness.paired_ratio(race.eager, best, "tscompile")
        lines.append(
            f"{name}: "
            + "; ".join(f"{side} {1e3 * seconds:.3f}" for side, seconds in medians.items())
            + f"; {ratio:.2f} x {best}"
        )
        lines += [f"{name}: {side} left out: {why}" for side, why in {**failures, **race.failures}.items()]
    return "\n".join(lines)
