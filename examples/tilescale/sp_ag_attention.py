"""Sequence-parallel attention: each rank has a part of every sequence, keys and values travel while attention is computed.

A rank puts its keys and values into its own symmetric buffer, the copy engine sends them to the ranks that need them, each transfer
followed by a flag, and the attention kernel takes keys as they arrive: its own first, then those of the next rank, and so on. The
warp of each block that loads waits where it first needs a peer's keys, so what has arrived is multiplied while the rest is on its way.
On CPU ranks the same protocol runs in order: transfers, then the kernel.

Variants: full and causal attention, each sequence cut into one piece per rank or in zig-zag (rank r has pieces r and 2 R - 1 - r, which
gives all ranks the same work under a causal mask), several packed sequences of any length, more keys than queries, heads that share
keys. Which keys a tile of queries needs, and in which order, is worked out by tscompile/templates/kv_schedule.py.

    python examples/tilescale/sp_ag_attention.py --gpu --bench --seq 32768    # against NCCL's all_gather, then torch's attention
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import kv_attention
import torch
import torch.nn.functional as F
from common import Example, World, assert_as_good
from torch.nn.attention import SDPBackend, sdpa_kernel

import tscompile.language as tl
from tscompile.templates.kv_schedule import Cut, KvSchedule, tables

REFERENCE_ROWS = 512  # at once: all scores in float32 would not fit into memory


@dataclass(frozen=True)
class Problem:
    """One attention: how queries and keys are cut, and its heads; `kv_heads` divides `heads`."""

    queries: Cut
    keys: Cut
    causal: bool
    heads: int
    kv_heads: int
    dim: int
    dtype: torch.dtype

    def schedule(self, target: tl.Target) -> KvSchedule:
        return KvSchedule(self.queries, self.keys, self.causal, kv_attention.TILE[target], kv_attention.TILE[target])

    def inputs(self, world: World) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Random q [rows, heads, dim], k and v [rows, kv_heads, dim]: what this rank has of all sequences, one after the other."""
        shapes = [(self.queries, self.heads), (self.keys, self.kv_heads), (self.keys, self.kv_heads)]
        q, k, v = (world.random(cut.rows(world.rank), n, self.dim, dtype=self.dtype) for cut, n in shapes)
        return q, k, v


class GatheredAttention:
    """softmax(q k^T / sqrt(dim)) v with the keys and values of all ranks, call after call.

    Two buffers alternate, each with the keys before the values of a position, so that one transfer brings both. Under a causal mask not
    every rank sends to every other, so having received something does not tell that the others are done with the last buffer but one:
    `done` does, set by each rank at those that sent to it.

    Args:
        problem: the same on all ranks.

    Raises:
        ValueError: a rank has no query.
    """

    def __init__(self, world: World, problem: Problem) -> None:
        d, rank, size = world.dialect, world.rank, world.size
        if not all(problem.queries.rows(r) for r in range(size)):
            raise ValueError(
                f"{sum(problem.queries.lengths)} queries: too few for every one of {size} ranks to have some"
            )
        self.group, self.problem, self.rank = world.group, problem, rank
        self.schedule = problem.schedule(d.name)
        gathered = self.schedule.gathered
        shape = (2, gathered.rows, 2 * problem.kv_heads, problem.dim)
        self.halves = self.group.tensor(shape, problem.dtype)  # zeros, which the filling between sequences stays
        self.arrived = self.group.tensor((gathered.slabs,), torch.int32)
        self.done = self.group.tensor((size,), torch.int32)
        # Copies take no SM, so a kernel whose blocks all wait for what peers send cannot keep this rank from sending.
        self.side = torch.cuda.Stream(priority=-1) if d.name == "cuda" else None
        self.sending = self.group.on_stream(self.side)

        def on_device(numbers: list) -> torch.Tensor:
            return torch.tensor(numbers, dtype=torch.int32, device=world.device)

        self.tiles, self.steps = map(on_device, tables(self.schedule.tiles(rank)))
        self.sends = self.schedule.sends(rank)
        receivers = {peer for peer, _ in self.sends}
        senders = {peer for peer in range(size) if rank in {to for to, _ in self.schedule.sends(peer)}}
        self.receivers, self.senders = (
            on_device([peer in who for peer in range(size)]) for who in (receivers, senders)
        )
        dtype = str(problem.dtype).removeprefix("torch.")
        self.attention = world.compile(
            kv_attention.attention(d, problem.heads, problem.kv_heads, problem.dim, dtype), kv_attention.PASS_CONFIGS
        )
        self.may_send = world.compile(kv_attention.may_send(d, size))
        self.have_read = world.compile(kv_attention.have_read(d, size))
        self.epoch = 0

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Of this rank's queries [rows, heads, dim]."""
        self.epoch += 1
        context, keys, parts = self.group.context, self.problem.keys, self.problem.keys.parts
        kv = self.halves[self.epoch % 2]
        for run in keys.runs(self.rank):
            at, rows = self.schedule.gathered.row(self.rank, run.part, run.sequence), run.stop - run.start
            kv[at : at + rows, : self.problem.kv_heads].copy_(k[run.row : run.row + rows])
            kv[at : at + rows, self.problem.kv_heads :].copy_(v[run.row : run.row + rows])
        self.arrived[self.rank * parts : (self.rank + 1) * parts].fill_(self.epoch)
        # On the stream of the kernels, before the attention: a wait of its own could find no SM free of blocks that wait themselves.
        self.may_send(context, self.receivers, self.done, self.epoch - 2)
        if self.side is not None:
            self.side.wait_stream(torch.cuda.current_stream())
        for peer, slab in self.sends:
            begin, end = self.schedule.gathered.slab(slab)
            rows = kv[begin:end]
            self.sending.putmem_signal(rows, rows, self.arrived[slab : slab + 1], self.epoch, peer)
        out = torch.empty_like(q)
        self.attention(context, q, kv, out, self.tiles, self.steps, self.arrived, parts, self.epoch)
        self.have_read(context, self.senders, self.done, self.epoch)
        if self.side is not None:
            torch.cuda.current_stream().wait_stream(self.side)
        return out


@dataclass(frozen=True)
class Reference:
    """What torch's attention makes of this rank's queries and the keys of all ranks.

    Args:
        q: as `GatheredAttention` takes it.
        k, v: whole, one tensor [length, kv_heads, dim] for each sequence.
    """

    problem: Problem
    rank: int
    q: torch.Tensor
    k: list[torch.Tensor]
    v: list[torch.Tensor]

    @cached_property
    def truth(self) -> torch.Tensor:
        """In float32, or in float64 where the inputs are float32."""
        with sdpa_kernel(SDPBackend.MATH):
            return self.compute(torch.float64 if self.q.dtype == torch.float32 else torch.float32)

    def compute(self, dtype: torch.dtype) -> torch.Tensor:
        out = torch.empty_like(self.q, dtype=dtype)
        for run in self.problem.queries.runs(self.rank):
            k, v = (x[run.sequence].to(dtype).transpose(0, 1)[None] for x in (self.k, self.v))
            keys = torch.arange(k.shape[2], device=out.device)
            shift = len(keys) - self.problem.queries.lengths[run.sequence]
            for start in range(run.start, run.stop, REFERENCE_ROWS):
                stop = min(start + REFERENCE_ROWS, run.stop)
                rows = slice(run.row + start - run.start, run.row + stop - run.start)
                mask = keys <= keys.new_tensor(range(start, stop))[:, None] + shift if self.problem.causal else None
                q = self.q[rows].to(dtype).transpose(0, 1)[None]
                out[rows] = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)[0].transpose(0, 1)
        return out


def whole(world: World, cut: Cut, mine: torch.Tensor) -> list[torch.Tensor]:
    """The sequences, put together from what the ranks hold."""
    most = max(cut.rows(rank) for rank in range(cut.ranks))
    padded = F.pad(mine, (0, 0, 0, 0, 0, most - mine.shape[0]))
    sequences = [mine.new_empty(length, *mine.shape[1:]) for length in cut.lengths]
    for rank, theirs in enumerate(world.gather(padded)):
        for run in cut.runs(rank):
            sequences[run.sequence][run.start : run.stop] = theirs[run.row : run.row + run.stop - run.start]
    return sequences


def problems(world: World) -> Mapping[str, Problem]:
    """The variants, by name."""
    args, size, dtype = world.args, world.size, world.dtype
    other = torch.float16 if world.device.type == "cuda" else dtype
    one = (args.seq,)
    several = (args.seq // 2 + 3, 5, args.seq // 4 - 1, args.seq // 8 + 1)
    longer = tuple(length + args.seq // 8 + 7 for length in several)
    shared = args.heads, args.groups, args.dim
    return {
        "full": Problem(Cut(one, size), Cut(one, size), False, *shared, dtype),
        "causal": Problem(Cut(one, size), Cut(one, size), True, *shared, dtype),
        "zig-zag": Problem(Cut(one, size, True), Cut(one, size, True), True, *shared, dtype),
        "packed": Problem(Cut(several, size, True), Cut(several, size, True), True, *shared, other),
        "packed, more keys": Problem(Cut(several, size), Cut(longer, size), True, *shared, other),
        "one head of keys": Problem(Cut(one, size, True), Cut(one, size), True, args.heads, 1, args.dim // 2, dtype),
    }


def run(world: World) -> str:
    args, group = world.args, world.group
    if args.heads % args.groups or args.seq < 16:
        raise ValueError(
            f"--groups {args.groups} must divide --heads {args.heads}, and --seq {args.seq} be at least 16"
        )
    if args.gpu and args.dim != 128:
        raise ValueError(f"--dim {args.dim}: 128 on GPUs")
    if args.bench:
        from sp_ag_bench import bench  # the only use of the folder benchmarks

        return bench(world)
    for name, problem in problems(world).items():
        op = GatheredAttention(world, problem)
        calls = []
        for _ in world.rounds():
            q, k, v = problem.inputs(world)
            calls.append((q, k, v, world.keep(op(q, k, v))))
        group.check()
        for q, k, v, out in calls:
            keys, values = (whole(world, problem.keys, x) for x in (k, v))
            reference = Reference(problem, world.rank, q, keys, values)
            assert_as_good(name, out, reference.compute(out.dtype), reference.truth)
    return f"{', '.join(problems(world))}: as torch's attention over what {world.rival} gathers"


EXAMPLE = Example(
    run,
    kv_attention.kernels,
    {"heads": (4, 16), "groups": (2, 4), "dim": (16, 128), "seq": (100, 4096)},
    switches={"bench": "time it, instead of checking all variants"},
)

if __name__ == "__main__":
    EXAMPLE.main()
