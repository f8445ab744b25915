"""Runs a program of tests/fused_programs.py compiled with everything fused, and judges what it returns.

The truth is the same function on float64 inputs, eagerly; what the compiled program may be off is measured against the eager
one in the same dtype, which is NCCL + cuBLAS on GPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import tscompile
from benchmarks.gpu_harness import allowed, errors_of
from benchmarks.harness import poison
from tests.fused_programs import Draw, Program, Sizes
from tscompile.backend import tilescale
from tscompile.fx_passes.fusion_pass import collect_rows
from tscompile.problem import Row

REPEATS = 4


def results(function: Callable[..., Any], args: Sequence[Tensor], backward: bool) -> list[Tensor]:
    """Outputs, then gradients of the arguments for the sum of squares."""
    leaves = [arg.detach().clone().requires_grad_(backward) for arg in args]
    with torch.set_grad_enabled(backward):
        output = function(*leaves)
        outputs = list(output) if isinstance(output, tuple) else [output]
        outputs = [o.wait() if hasattr(o, "wait") else o for o in outputs]
        if backward:
            torch.autograd.backward(sum(o.double().square().sum() / 2 for o in outputs))
            outputs += [leaf.grad for leaf in leaves]  # type: ignore[misc]
    return [o.detach() for o in outputs]


def run(
    each: Program,
    group: dist.ProcessGroup,
    dtype: torch.dtype,
    device: torch.device,
    sizes: Sizes,
    *,
    inner: str = "eager",
    must_fuse: bool = True,
) -> list[Row]:
    """Compile a program with everything fused, compare it, run it again and again; returns the rows of the report.

    Raises:
        AssertionError: a wrong result, other bits in a second run, or, if `must_fuse`, a site of the program's kind that
            ran its original ops.
    """
    torch._dynamo.reset()
    function, _ = each.build(Draw(sizes, group, dtype, device))
    options = {"tilescale.fuse": "always", "tilescale.inner": inner}
    compiled = torch.compile(function, backend=tilescale, fullgraph=True, dynamic=False, options=options)
    planned: list[Row] = []
    with collect_rows(planned.extend):
        for seed in (1, 2):
            args = each.build(Draw(sizes, group, dtype, device, seed))[1]
            truth = results(function, [arg.double() for arg in args], each.backward)
            plain = results(function, args, each.backward)
            poison([*plain, *args])
            first = results(compiled, args, each.backward)
            _judge(each.name, first, plain, truth, dtype)
            for _ in range(REPEATS):
                poison(plain)
                again = results(compiled, args, each.backward)
                assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), f"{each.name}: other bits"
    sites = {row.site for row in planned}
    rows = [row for row in tscompile.reports().rows if row.site in sites]
    ran = {row.pattern for row in rows if row.decision == "fused" and row.measured_us is not None}
    story = [f"{row.phase} {row.pattern} {row.decision} [{row.code}] {row.reason}" for row in rows]
    assert each.kind in ran or not must_fuse, f"{each.name}: not fused: {story}"
    return rows


def _judge(name: str, got: list[Tensor], plain: list[Tensor], truth: list[Tensor], dtype: torch.dtype) -> None:
    for index, (a, p, t) in enumerate(zip(got, plain, truth, strict=True)):
        assert a.shape == t.shape and a.dtype == p.dtype, (name, index, a.shape, a.dtype)
        found, limits = errors_of([a], [t]), allowed(errors_of([p], [t]), dtype)
        assert found[0] <= limits[0] and found[1] <= limits[1], (
            f"{name}, tensor {index}: errors {found}, limits {limits}"
        )


def subgroups(size: int) -> list[list[int]]:
    """Ranks of groups that every rank creates in this order: halves, permuted, overlapping; those that fit into the world."""
    wanted = [[0, 1], [2, 3], [1, 0], [3, 1, 2, 0], [1, 2], [0, 2, 3]]
    return [ranks for ranks in wanted if max(ranks) < size]
