"""Calls of fused ops with their true results: every rank can build the inputs of all ranks, from a seed."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tscompile.problem import Delivery, Departure, GatherUse, Plan


@dataclass
class Case:
    """One call: `args[r]` are the op's arguments on rank r, `truth[r]` its outputs in float64, `plain[r]` in the plan's dtype."""

    plan: Plan
    args: list[tuple[Any, ...]]
    truth: list[list[Tensor]]
    plain: list[list[Tensor]]

    def check(self, rank: int, outputs: list[Tensor]) -> None:
        """At most twice the error of the plain computation in the same dtype (and a rounding of the largest value)."""
        assert len(outputs) == len(self.truth[rank])
        for output, truth, plain in zip(outputs, self.truth[rank], self.plain[rank], strict=True):
            assert output.shape == truth.shape, (self.plan, output.shape, truth.shape)
            assert output.dtype == plain.dtype, (self.plan, output.dtype, plain.dtype)
            if not output.numel():
                continue
            if not self.plan.computes:
                assert torch.equal(output, plain), (self.plan, "other bits")
                continue
            error = (output.double() - truth).abs().max().item()
            usual = (plain.double() - truth).abs().max().item()
            rounding = torch.finfo(plain.dtype).eps * truth.abs().max().item()
            if plain.dtype in (torch.float32, torch.float64):
                rounding *= 16  # the order of a long sum, which is any matmul's own business
            assert error <= 2 * usual + rounding, (self.plan, error, usual, rounding)


def _random(generator: torch.Generator, *shape: int, dtype: torch.dtype, strided: bool = False) -> Tensor:
    if strided:
        return torch.randn(*reversed(shape), generator=generator).to(dtype).permute(*reversed(range(len(shape))))
    return torch.randn(*shape, generator=generator).to(dtype)


def _matmul(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    return torch.mm(a, b) if bias is None else torch.addmm(bias, a, b)


def _wide(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double()
    return [_wide(item) for item in value] if isinstance(value, list | tuple) else value


def all_gather(
    size: int,
    seed: int,
    dtype: str,
    uses: list[tuple[str, bool, str]],
    *,
    pieces: int = 1,
    inner: int = 6,
    width: int = 10,
    returned: bool = False,
    bias: bool = False,
    use_dtype: str | None = None,
    strided: bool = False,
) -> Case:
    """Shard [P, Q]: G2 has `width` columns where R lies in its rows (Q = inner * width), [pieces, R, Q] columns otherwise."""
    generator = torch.Generator().manual_seed(seed)
    kind = getattr(torch, dtype)
    compute = use_dtype or dtype
    p, q = (pieces, inner * width) if uses[0][2] == "rows" else (pieces, inner)
    shards = [_random(generator, p, q, dtype=kind, strided=strided) for _ in range(size)]
    gathered = torch.stack(shards, 1)
    plan_uses, others, biases, views = [], [[] for _ in range(size)], [[] for _ in range(size)], []
    for side, transposed, axis in uses:
        use = GatherUse(side, transposed, axis, compute)  # type: ignore[arg-type]
        if axis == "rows":
            matrix = gathered.reshape(-1, width)
        elif p % 2 == 0 and width % 2 == 0:  # half of P lies in the columns
            matrix = gathered.reshape(p // 2, -1)
        else:
            matrix = gathered.reshape(p, -1)
        operand = matrix.t() if transposed else matrix
        views.append(operand)
        plan_uses.append(use)
        for rank in range(size):
            shape = (operand.shape[1], 5) if side == "lhs" else (7, operand.shape[0])
            other = _random(generator, *shape, dtype=getattr(torch, compute), strided=strided)
            columns = 5 if side == "lhs" else operand.shape[1]
            others[rank].append(other)
            biases[rank].append(_random(generator, columns, dtype=getattr(torch, compute)) if bias else None)
    plan = Plan("all_gather_matmul", f"ag{seed}", "shm", dtype, uses=tuple(plan_uses), return_gathered=returned)
    args = [(shards[r], others[r], biases[r]) for r in range(size)]

    def results(r: int, convert: Any) -> list[Tensor]:
        out = []
        for use, operand, other, term in zip(plan_uses, views, others[r], biases[r], strict=True):
            a, b = (operand, other) if use.side == "lhs" else (other, operand)
            out.append(_matmul(convert(a), convert(b), None if term is None else convert(term)))
        if returned:
            out.append(gathered.reshape(p, -1))
        return out

    narrow = getattr(torch, compute)
    truth = [_wide(results(r, _wide)) for r in range(size)]
    return Case(plan, args, truth, [results(r, lambda t: t.to(narrow)) for r in range(size)])


def reduction(
    kind: str,
    size: int,
    seed: int,
    dtype: str,
    *,
    axis: str = "rows",
    outer: int = 1,
    inner: int = 6,
    free: int = 10,
    terms: int = 1,
    addends: int = 0,
    bias: bool = False,
    reduce_op: str = "sum",
    term_dtype: str | None = None,
    coefficients: tuple[float, ...] | None = None,
    strided: bool = False,
) -> Case:
    """matmul_reduce_scatter (rank axis of size outer * R * inner) or matmul_all_reduce (inner rows, free columns)."""
    generator = torch.Generator().manual_seed(seed)
    own = getattr(torch, term_dtype or dtype)
    scatter = kind == "matmul_reduce_scatter"
    m, n = (outer * size * inner, free) if scatter else (inner, free)
    if scatter and axis == "cols":
        m, n = n, m
    factors = coefficients or (1.0,) * (terms + addends)
    args: list[tuple[Any, ...]] = []
    for _ in range(size):
        lhs = [_random(generator, m, 8 + i, dtype=own, strided=strided) for i in range(terms)]
        rhs = [_random(generator, 8 + i, n, dtype=own, strided=strided) for i in range(terms)]
        biases = [_random(generator, n, dtype=own) if bias else None for _ in range(terms)]
        extra = [_random(generator, m, n, dtype=own, strided=strided) for _ in range(addends)]
        args.append((lhs, rhs, biases, extra, outer) if scatter else (lhs, rhs, biases, extra))
    plan = Plan(
        kind,
        f"{kind}{seed}",
        "shm",
        dtype,
        rank_axis=axis,  # type: ignore[arg-type]
        coefficients=factors,
        term_group=(0,) * (terms + addends),
        reduce_op=reduce_op,  # type: ignore[arg-type]
    )

    def total(convert: Any, narrow: torch.dtype) -> Tensor:
        partials = []
        for lhs, rhs, biases, extra, *_ in args:
            values = [
                _matmul(convert(a), convert(b), None if c is None else convert(c))
                for a, b, c in zip(lhs, rhs, biases, strict=True)
            ]
            values += [convert(addend) for addend in extra]
            partials.append(sum(value.to(narrow) * factor for value, factor in zip(values, factors, strict=True)))
        result = sum(partials[1:], partials[0])
        return result / size if reduce_op == "avg" else result

    def outputs(whole: Tensor) -> list[list[Tensor]]:
        if not scatter:
            return [[whole] for _ in range(size)]
        dim = 0 if axis == "rows" else 1
        blocks = whole.unflatten(dim, (outer, size, inner))
        return [[blocks.select(dim + 1, r).flatten(dim, dim + 1)] for r in range(size)]

    return Case(plan, args, outputs(total(_wide, torch.float64)), outputs(total(lambda t: t, getattr(torch, dtype))))


def exchange(size: int, seed: int, dtype: str, *, sizes: tuple[int, ...] = (2, 3, 4), count: int = 3) -> Case:
    """`count` exchanges of [R, *sizes]: the first whole, the last as two parts of it, and if there are several a joined output."""
    generator = torch.Generator().manual_seed(seed)
    draw = random.Random(seed)
    kind = getattr(torch, dtype)
    shape = (size, *sizes)
    dims = range(len(shape))
    sent: list[list[Tensor]] = [[] for _ in range(size)]
    for _ in range(count):
        order = draw.sample(dims, len(shape))  # as its producer has it in memory
        for rank in range(size):
            values = _random(generator, *(shape[d] for d in order), dtype=kind)
            sent[rank].append(values.permute([order.index(d) for d in dims]))
    received = [[torch.stack([sent[s][e][r] for s in range(size)]) for e in range(count)] for r in range(size)]
    whole = Delivery(0, tuple(draw.sample(dims, len(shape))))
    cut = draw.randrange(1, len(shape))
    rest = tuple(draw.sample([d for d in dims if d != cut], len(shape) - 1))
    parts = [Delivery(count - 1, rest, ((cut, index),)) for index in range(min(2, shape[cut]))]
    joined = [Delivery(e, tuple(dims), outer=1) for e in reversed(range(count))] if count > 1 else []
    plan = Plan(
        "all_to_all_permute",
        f"exchange{seed}",
        "shm",
        dtype,
        deliveries=(whole, *parts, *joined),
        joins=(1,) * (1 + len(parts)) + ((count,) if joined else ()),
    )

    def results(rank: int) -> list[Tensor]:
        got = received[rank]
        out = [got[0].permute(whole.order)]
        left = [d for d in dims if d != cut]
        out += [got[-1].select(cut, part.fixed[0][1]).permute([left.index(d) for d in rest]) for part in parts]
        if joined:
            out.append(torch.cat([x.flatten(1) for x in reversed(got)], 1))
        return [x.contiguous() for x in out]

    outputs = [results(rank) for rank in range(size)]
    return Case(plan, [(sent[r],) for r in range(size)], [_wide(out) for out in outputs], outputs)


def projected(
    size: int,
    seed: int,
    dtype: str,
    *,
    parts: tuple[int, ...] = (3,),
    batch: int = 2,
    tokens: int = 3,
    dim: int = 4,
    k: int = 9,
    bias: bool = False,
    spelling: int = 0,
    strided: bool = False,
) -> Case:
    """matmul_all_to_all: matmuls whose results have so many `parts`, `[batch, tokens, parts, size heads, dim]`.

    spelling: 0: an exchange for each part. 1: one for each matmul, delivered part by part. 2: like 0, and delivered once more, joined.
    Exchanges of one matmul do not follow one another.
    """
    generator = torch.Generator().manual_seed(seed)
    own = getattr(torch, dtype)
    m, widths = batch * tokens, [count * size * dim for count in parts]
    args: list[tuple[Any, ...]] = []
    sizes, departures, deliveries = [], [], []
    if spelling == 1:
        for number, count in enumerate(parts):
            sizes += [batch, tokens, count, size, dim]
            departures.append(Departure(number, 5, (), (3, 2, 1, 0, 4)))  # [R, part, tokens, batch, dim]
            deliveries += [Delivery(number, (3, 0, 2, 4), ((1, part),)) for part in range(count)]
    else:
        taken = sorted((part, number) for number, count in enumerate(parts) for part in range(count))
        for exchange, (part, number) in enumerate(taken):
            sizes += [batch, tokens, parts[number], size, dim]
            departures.append(Departure(number, 5, ((2, part),), (2, 0, 1, 3)))  # [R, batch, tokens, dim]
            deliveries.append(Delivery(exchange, (1, 0, 2, 3)))
    joins = (1,) * len(deliveries)
    joined = spelling == 2 and len(departures) > 1
    if joined:
        deliveries += [Delivery(exchange, (1, 2, 0, 3), outer=2) for exchange in range(len(departures))]
        joins = (*joins, len(departures))
    for _ in range(size):
        lhs = [_random(generator, m, k + i, dtype=own, strided=strided) for i in range(len(parts))]
        rhs = [_random(generator, k + i, n, dtype=own, strided=strided) for i, n in enumerate(widths)]
        biases = [_random(generator, n, dtype=own) if bias and i != 1 else None for i, n in enumerate(widths)]
        args.append((lhs, rhs, biases, sizes))
    plan = Plan(
        "matmul_all_to_all",
        f"projected{seed}",
        "shm",
        dtype,
        deliveries=tuple(deliveries),
        joins=joins,
        departures=tuple(departures),
    )

    def results(rank: int, convert: Any) -> list[Tensor]:
        heads = []  # of each matmul, [ranks that sent, batch, tokens, parts, dim]
        for number, count in enumerate(parts):
            sent = []
            for a, b, c, _ in args:
                made = _matmul(
                    convert(a[number]), convert(b[number]), None if c[number] is None else convert(c[number])
                )
                sent.append(made.view(batch, tokens, count, size, dim)[:, :, :, rank])
            heads.append(torch.stack(sent))
        if spelling == 1:
            return [x[:, :, :, part].transpose(0, 1).contiguous() for x in heads for part in range(x.shape[3])]
        pieces = [heads[number][:, :, :, part] for part, number in taken]
        out = [x.transpose(0, 1).contiguous() for x in pieces]
        if joined:
            out.append(torch.cat([x.permute(1, 2, 0, 3).flatten(2) for x in pieces], 2).flatten(0, 1))
        return out

    truth = [_wide(results(rank, _wide)) for rank in range(size)]
    return Case(plan, args, truth, [results(rank, lambda t: t) for rank in range(size)])


def panels(
    size: int,
    seed: int,
    dtype: str,
    shapes: tuple[tuple[int, int], ...] = ((1, 6),),
    *,
    rows: int = 7,
    free: tuple[int, ...] = (5,),
    returned: bool = False,
    bias: bool = False,
    strided: bool = False,
) -> Case:
    """all_to_all_matmul: (O, Q) of each exchange, `rows` of the left operand, columns of each right operand."""
    generator = torch.Generator().manual_seed(seed)
    kind = getattr(torch, dtype)
    sent = [
        [_random(generator, size, rows, outer, inner, dtype=kind, strided=strided) for outer, inner in shapes]
        for _ in range(size)
    ]
    left = [  # columns: (exchange, O, source, Q)
        torch.cat([torch.stack([x[e][r] for x in sent], 2).flatten(1) for e in range(len(shapes))], 1)
        for r in range(size)
    ]
    others = [[_random(generator, left[0].shape[1], n, dtype=kind, strided=strided) for n in free] for _ in range(size)]
    biases = [[_random(generator, n, dtype=kind) if bias else None for n in free] for _ in range(size)]
    use = GatherUse("lhs", False, "cols", dtype)
    plan = Plan("all_to_all_matmul", f"panels{seed}", "shm", dtype, uses=(use,) * len(free), return_gathered=returned)

    def results(r: int, convert: Any) -> list[Tensor]:
        terms = zip(others[r], biases[r], strict=True)
        out = [_matmul(convert(left[r]), convert(b), None if c is None else convert(c)) for b, c in terms]
        return [*out, left[r]] if returned else out

    args = [(sent[r], others[r], biases[r]) for r in range(size)]
    truth = [_wide(results(r, _wide)) for r in range(size)]
    return Case(plan, args, truth, [results(r, lambda t: t) for r in range(size)])


def all_gather_result(
    size: int,
    seed: int,
    dtype: str,
    *,
    axis: str = "rows",
    outer: int = 1,
    inner: int = 6,
    free: int = 10,
    k: int = 9,
    bias: bool = False,
    own_dtype: str | None = None,
) -> Case:
    """matmul_all_gather of [M, N] with the rank axis of local size outer * inner."""
    generator = torch.Generator().manual_seed(seed)
    own = getattr(torch, own_dtype or dtype)
    m, n = (outer * inner, free) if axis == "rows" else (free, outer * inner)
    args = [
        (
            _random(generator, m, k, dtype=own),
            _random(generator, k, n, dtype=own),
            _random(generator, n, dtype=own) if bias else None,
            outer,
        )
        for _ in range(size)
    ]
    plan = Plan("matmul_all_gather", f"out{seed}", "shm", dtype, rank_axis=axis)  # type: ignore[arg-type]

    def whole(convert: Any) -> Tensor:
        dim = 0 if axis == "rows" else 1
        products = [_matmul(convert(a), convert(b), None if c is None else convert(c)) for a, b, c, _ in args]
        return torch.stack([product.unflatten(dim, (outer, inner)) for product in products], dim + 1).flatten(
            dim, dim + 2
        )

    return Case(plan, args, [[whole(_wide)]] * size, [[whole(lambda t: t).to(getattr(torch, dtype))]] * size)


GATHER_USES = [
    (side, transposed, axis) for side in ("lhs", "rhs") for transposed in (False, True) for axis in ("rows", "cols")
]


def all_cases(size: int, seed: int = 0) -> list[Case]:
    """Every kind with every layout, dtype and feature, on small shapes."""
    cases: list[Case] = []
    for dtype in ("float32", "bfloat16", "float64"):
        for use in GATHER_USES:
            for pieces, inner in ((1, 6), (2, 6), (4, 70)):
                seed += 1
                odd = seed % 3 == 0
                cases.append(
                    all_gather(
                        size,
                        seed,
                        dtype,
                        [use],
                        pieces=pieces,
                        inner=inner,
                        bias=seed % 2 == 0,
                        returned=odd,
                        strided=odd,
                    )
                )
        seed += 1
        cases.append(all_gather(size, seed, dtype, GATHER_USES[:1] + GATHER_USES[2:3], inner=66, returned=True))
        for axis in ("rows", "cols"):
            for outer, inner in ((1, 6), (2, 5), (2, 70)):
                seed += 1
                cases.append(
                    reduction(
                        "matmul_reduce_scatter", size, seed, dtype, axis=axis, outer=outer, inner=inner, bias=True
                    )
                )
                seed += 1
                cases.append(
                    reduction(
                        "matmul_reduce_scatter",
                        size,
                        seed,
                        dtype,
                        axis=axis,
                        outer=outer,
                        inner=inner,
                        terms=2,
                        addends=1,
                        reduce_op="avg",
                        coefficients=(1.0, -0.5, 2.0),
                        strided=True,
                    )
                )
                seed += 1
                cases.append(
                    all_gather_result(size, seed, dtype, axis=axis, outer=outer, inner=inner, bias=seed % 2 == 0)
                )
        for rows, columns, bias in ((1, 33, False), (size + 2, 7, True), (257, 1100, True)):
            seed += 1
            cases.append(reduction("matmul_all_reduce", size, seed, dtype, inner=rows, free=columns, bias=bias))
            seed += 1
            cases.append(
                reduction(
                    "matmul_all_reduce",
                    size,
                    seed,
                    dtype,
                    inner=rows,
                    free=columns,
                    terms=2,
                    addends=1,
                    reduce_op="avg",
                    coefficients=(0.5, 1.0, 1.0),
                )
            )
    for number, sizes in enumerate(((2, 3, 4), (5,), (3, 2, 2, 7), (64, 33))):
        cases.append(exchange(size, seed + 20 + number, "float32", sizes=sizes, count=1 + number))
        cases.append(exchange(size, seed + 20 + number, "bfloat16", sizes=sizes, count=1 + number))
    cases.append(exchange(size, seed + 30, "float16", count=11))  # more exchanges than flags
    for number, parts in enumerate(((3,), (1, 1, 1), (2, 3), (1,), (5, 4))):
        for spelling in range(3):
            features: dict[str, Any] = {"bias": number % 2 == 0, "strided": spelling == 1, "spelling": spelling}
            cases.append(
                projected(size, seed + 31 + number, ("float32", "bfloat16")[spelling % 2], parts=parts, **features)
            )
    cases.append(projected(size, seed + 36, "bfloat16", batch=1, tokens=65, dim=40, k=130))
    joined = ((1, 6), (3, 5), (1, 6))
    for number, dtype in enumerate(("float32", "bfloat16", "float64")):
        cases.append(panels(size, seed + 40 + number, dtype, returned=number == 1))
        cases.append(panels(size, seed + 50 + number, dtype, ((2, 70),), free=(5, 9), bias=True, returned=number == 0))
        cases.append(panels(size, seed + 60 + number, dtype, joined, bias=number == 0, strided=True, returned=True))
    cases.append(panels(size, seed + 70, "float32", ((1, 3),) * 11))  # more exchanges than flags
    cases.append(all_gather(size, seed + 1, "bfloat16", GATHER_USES[:1], use_dtype="float32"))
    cases.append(all_gather(size, seed + 2, "float32", [("lhs", True, "rows")], use_dtype="bfloat16", inner=80))
    cases.append(
        reduction("matmul_reduce_scatter", size, seed + 3, "float32", term_dtype="bfloat16", terms=2, addends=1)
    )
    cases.append(reduction("matmul_all_reduce", size, seed + 4, "bfloat16", term_dtype="float32", inner=9, bias=True))
    cases.append(reduction("matmul_all_reduce", size, seed + 5, "float32", terms=0, addends=2, inner=9))
    cases.append(all_gather_result(size, seed + 6, "bfloat16", own_dtype="float32", inner=40))
    cases.append(all_gather_result(size, seed + 7, "float32", inner=601, free=1024, outer=2))
    cases.append(reduction("matmul_all_reduce", size, seed + 8, "float16", inner=size, free=3))
    cases.append(all_gather(size, seed + 9, "float32", GATHER_USES[:1], inner=0))
    cases.append(reduction("matmul_all_reduce", size, seed + 10, "float32", inner=0))
    return cases


def manifest(
    groups: dict[str, int],
    *,
    digest: str = "d",
    scratch_bytes: int = 4096,
    rows: list[dict[str, Any]] | None = None,
    **runtime: Any,
) -> str:
    """Manifest of a graph with that many fused sites per group."""
    entries = {
        name: {"executor": "shm", "digest": digest, "sites": sites, "scratch_bytes": scratch_bytes}
        for name, sites in groups.items()
    }
    return json.dumps({"version": 1, "graph": digest, "groups": entries, "rows": rows or [], "runtime": runtime})


def row(group: str, site: str, decision: str = "fused") -> dict[str, Any]:
    """A report row of a manifest."""
    return {
        "site": site,
        "graph": "g",
        "phase": "forward",
        "pattern": "all_gather_matmul",
        "group": group,
        "ranks": 2,
        "collectives": ["all_gather"],
        "decision": decision,
        "code": decision,
        "reason": "",
    }


def shuffled(cases: list[Case], count: int, seed: int) -> list[Case]:
    return random.Random(seed).choices(cases, k=count)
