"""Programs and ranks that are not as expected, through torch.compile: the result is right, or the error names the rank and the site."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as fc
from torch import Tensor

import tscompile
from tests.compat import TORCH, all_gather, permuted_group
from tests.worlds import segments_left
from tscompile.backend import tilescale
from tscompile.errors import PeerError
from tscompile.fx_passes.fusion_pass import collect_rows
from tscompile.problem import Row
from tscompile.testing import RankFailure, run_ranks

ALWAYS = {"tilescale.inner": "eager", "tilescale.fuse": "always"}
FUSED = "fused"


def mlp(x: Tensor, w: Tensor, v: Tensor, group: Any = None) -> Tensor:
    group = dist.group.WORLD if group is None else group
    h = torch.relu(fc.all_gather_tensor(x, 0, group) @ w)
    return fc.reduce_scatter_tensor(h @ v, "sum", 0, group)


def operands(dtype: torch.dtype = torch.float32, rows: int = 8) -> list[Tensor]:
    torch.manual_seed(dist.get_rank())
    return [torch.randn(s, dtype=torch.float64).to(dtype) for s in ((rows, 16), (16, 12), (12, 16))]


def close(found: Tensor, expected: Tensor) -> bool:
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-4, atol=1e-4)


def decisions() -> list[tuple[str, str]]:
    return [(row.decision, row.code) for row in tscompile.reports().rows]


def check(fn: Any, *args: Any, **options: Any) -> list[tuple[str, str]]:
    """Run eagerly and compiled, twice; the results agree. Returns what the report says."""
    torch._dynamo.reset()
    with torch.no_grad():
        expected = fn(*args)
        compiled = torch.compile(fn, backend=tilescale, options={**ALWAYS, **options}, fullgraph=True)
        for _ in range(2):
            assert close(compiled(*args), expected)
    return decisions()


# --- ranks whose plans differ -------------------------------------------------------------------------------------------


def differ_by_option() -> tuple[list[tuple[str, str]], str]:
    options = {"tilescale.disable": "all_gather_matmul"} if dist.get_rank() == 1 else {}
    check(mlp, *operands(), **options)
    return decisions(), " ".join(row.reason for row in tscompile.reports().rows)


def kept_on_one() -> list[tuple[str, str]]:
    kinds = "all_gather_matmul,matmul_reduce_scatter"
    return check(mlp, *operands(), **({"tilescale.disable": kinds} if dist.get_rank() == 1 else {}))


def recompile_alone() -> tuple[float, list[tuple[str, str]]]:
    """Rank 1 recompiles with another plan in the middle of training, its peer does not; then all go on."""
    args = operands()
    with torch.no_grad():
        expected = mlp(*args)
        first = torch.compile(mlp, backend=tilescale, options=ALWAYS, fullgraph=True)
        assert close(first(*args), expected)
        assert {d for d, _ in decisions()} == {FUSED}
        second = first
        if dist.get_rank() == 1:
            torch._dynamo.reset()
            options = {**ALWAYS, "tilescale.disable": "matmul_reduce_scatter"}
            second = torch.compile(mlp, backend=tilescale, options=options, fullgraph=True)
        start = time.monotonic()
        for _ in range(3):
            assert close(second(*args), expected)
        return time.monotonic() - start, decisions()


def same_plan_again() -> list[tuple[str, str]]:
    """Rank 1 alone compiles the same program again: the plans are known, nobody is waited for."""
    args = operands()
    first = check(mlp, *args)
    if dist.get_rank() == 1:
        torch._dynamo.reset()
    with torch.no_grad():
        again = torch.compile(mlp, backend=tilescale, options=ALWAYS, fullgraph=True)
        assert close(again(*args), mlp(*args))
    assert decisions() == first
    return first


def test_different_plans_put_the_original_ops_on_all_ranks_with_the_reason() -> None:
    for rows, reasons in run_ranks(2, differ_by_option, timeout_s=120):
        assert not [d for d, _ in rows if d == FUSED]
        assert "other-sites" in {code for _, code in rows}
        assert "rank 1" in reasons


def test_a_rank_that_fuses_nothing_does_not_make_the_others_wait() -> None:
    start = time.monotonic()
    for rows in run_ranks(2, kept_on_one, timeout_s=120):
        assert not [d for d, _ in rows if d == FUSED]
    assert time.monotonic() - start < 100


def test_a_rank_that_recompiles_alone_waits_for_nobody() -> None:
    for seconds, rows in run_ranks(2, recompile_alone, timeout_s=120):
        assert seconds < 60
        assert not [d for d, _ in rows if d == FUSED]
    for rows in run_ranks(2, same_plan_again, timeout_s=120):
        assert {d for d, _ in rows} == {FUSED}


# --- unusual programs ---------------------------------------------------------------------------------------------------


def unusual_programs() -> dict[str, list[tuple[str, str]]]:
    """Each program agrees with eager; what was decided about it, by name."""
    told: dict[str, list[tuple[str, str]]] = {}
    rank, size = dist.get_rank(), dist.get_world_size()

    def story(name: str, fn: Any, *args: Any, **options: Any) -> None:
        rows: list[Row] = []
        with collect_rows(rows.extend):
            check(fn, *args, **options)
        # What was planned, and that no vote took it back: graphs alike share their rows in the ledger.
        kept = {row.site for row in tscompile.reports().rows if row.decision == "kept"}
        told[name] = [("kept", row.code) if row.site in kept else (row.decision, row.code) for row in rows]

    x, w, v = operands()
    story("plain", mlp, x, w, v)
    story("float64", mlp, *operands(torch.float64))
    if TORCH >= (2, 13):  # before, all_gather_tensor itself wanted contiguous inputs
        story("not contiguous", mlp, x.t().contiguous().t(), w.t().contiguous().t(), torch.randn(12, 32)[:, ::2])
    story("integers", lambda x, w: fc.all_gather_tensor(x, 0, dist.group.WORLD) @ w, (x * 3).long(), (w * 3).long())

    def maximum(x: Tensor, w: Tensor) -> Tensor:
        return fc.reduce_scatter_tensor(x @ w, "max", 0, dist.group.WORLD)

    story("maximum", maximum, torch.cat([x] * size), w)
    complex_x = torch.complex(x, x.flip(0))
    story("complex", lambda x, w: fc.all_gather_tensor(x, 0, dist.group.WORLD) @ w, complex_x, torch.complex(w, w))

    def strided_batch(x: Tensor, w: Tensor) -> Tensor:
        return all_gather(x, 1, dist.group.WORLD) @ w

    if TORCH >= (2, 13):
        story("expanded input", strided_batch, torch.randn(1, 8, 16).expand(3, 8, 16), w)
    swapped = permuted_group(list(reversed(range(size))))
    story("permuted group", lambda x, w, v: mlp(x, w, v, swapped), x, w, v)
    if size >= 3:
        pair = [dist.new_group(ranks) for ranks in ([0, 2], [1])][0 if rank in (0, 2) else 1]
        if rank in (0, 2):
            story("subgroup", lambda x, w, v: mlp(x, w, v, pair), x, w, v)

            def two_groups(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
                return mlp(mlp(x, w, v, pair), w, v, pair) + mlp(x, w, v, pair)

            story("a subgroup several times", two_groups, x, w, v)

    def both(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        return mlp(x, w, v, swapped) + mlp(x, w, v)

    story("two groups in one graph", both, x, w, v)
    return told


@pytest.mark.parametrize("ranks", [2, 3])
def test_unusual_programs_are_right_fused_or_kept_with_a_reason(ranks: int) -> None:
    for told in run_ranks(ranks, unusual_programs, timeout_s=240):
        kept = {"integers": "unsupported", "complex": "unsupported", "maximum": "reduce-op"}
        assert told.keys() >= {"plain", "float64", "permuted group", "two groups in one graph", *kept}
        for name, decisions_of in told.items():
            expected = [("kept", kept[name])] if name in kept else [(FUSED, FUSED)]
            assert set(decisions_of) == set(expected), (name, decisions_of)


def uneven_shards() -> list[tuple[str, str]]:
    """DTensor pads uneven shards: the program is kept and right."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    full, w = torch.randn(7, 16), torch.randn(16, 12)
    x = distribute_tensor(full, mesh, [Shard(0)])

    def fn(x: DTensor) -> Tensor:
        return x.redistribute(placements=[Replicate()]).to_local() @ w

    with torch.no_grad():
        compiled = torch.compile(fn, backend=tilescale, options=ALWAYS)
        assert close(compiled(x), full @ w)
    return decisions()


def test_uneven_shards_are_right_and_told() -> None:
    for rows in run_ranks(2, uneven_shards, timeout_s=120):
        assert rows and not [d for d, _ in rows if d == FUSED]


# --- a rank that dies ---------------------------------------------------------------------------------------------------


def dies_in_training(how: str) -> str:
    """Rank 1 ends in the middle of training; what the others are told, and how soon."""
    args = operands()
    with torch.no_grad():
        compiled = torch.compile(mlp, backend=tilescale, options=ALWAYS, fullgraph=True)
        compiled(*args)
        assert {d for d, _ in decisions()} == {FUSED}
        if dist.get_rank() == 1:
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            os._exit(3)
        start = time.monotonic()
        try:
            for _ in range(3):
                compiled(*args)
        except PeerError as error:
            return f"rank {error.rank} site {error.site} after {time.monotonic() - start:.1f} s"
    return "nothing was raised"


@pytest.mark.parametrize("how", ["kill", "exit"])
def test_a_dead_rank_is_named_soon_and_leaves_no_memory_behind(how: str) -> None:
    with pytest.raises(RankFailure) as caught:  # rank 1 is dead, so the world as a whole has failed
        run_ranks(3, report_death, how, timeout_s=90)
    text = str(caught.value)
    told = [line for line in text.splitlines() if line.startswith("TOLD rank 1 site")]
    assert len(told) == 2, text
    assert all("all_gather_matmul" in line for line in told)
    pids = {int(line.removeprefix("PID ")) for line in text.splitlines() if line.startswith("PID ")}
    assert len(pids) == 3 and not segments_left(pids)


def report_death(how: str) -> None:
    print("PID", os.getpid(), flush=True)
    print("TOLD", dies_in_training(how), flush=True)
