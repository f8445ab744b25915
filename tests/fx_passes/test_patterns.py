"""What each pattern takes and refuses, on small hand-written programs in a fake world of 4 ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as fc
import torch.nn.functional as F
from torch import Tensor

from tests.compat import TORCH, all_gather
from tests.graphs import compile_graphs
from tscompile.errors import KeptError
from tscompile.lowering import cost_model
from tscompile.testing import fake_world

R = 4


@pytest.fixture(autouse=True)
def world() -> Iterator[None]:
    with fake_world(R):
        yield


def gather(x: Tensor, dim: int = 0) -> Tensor:
    return all_gather(x, dim, dist.group.WORLD)


def scatter(x: Tensor, dim: int = 0, op: str = "sum") -> Tensor:
    return fc.reduce_scatter_tensor(x, op, dim, dist.group.WORLD)


def reduce(x: Tensor, op: str = "sum") -> Tensor:
    return fc.all_reduce(x, op, dist.group.WORLD)


def rand(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
    return torch.randn(*shape, dtype=dtype, requires_grad=grad)


Program = tuple[Callable[..., Any], tuple[Tensor, ...]]

FUSED: dict[str, tuple[str, Callable[[], Program]]] = {
    "rows": ("all_gather_matmul", lambda: (lambda x, w: gather(x) @ w, (rand(8, 16), rand(16, 6)))),
    "rows, dim 1": ("all_gather_matmul", lambda: (lambda x, w: gather(x, 1) @ w, (rand(3, 8, 16), rand(16, 6)))),
    "rows, transposed weight and bias": (
        "all_gather_matmul",
        lambda: (lambda x, w, b: F.linear(gather(x, 1), w, b), (rand(2, 8, 16), rand(6, 16), rand(6))),
    ),
    "contraction": ("all_gather_matmul", lambda: (lambda x, y: gather(x).t() @ y, (rand(8, 16), rand(32, 6)))),
    "contraction on the right": ("all_gather_matmul", lambda: (lambda x, y: y @ gather(x), (rand(8, 16), rand(6, 32)))),
    "last dim is the contraction": (
        "all_gather_matmul",
        lambda: (lambda x, w: gather(x, 1) @ w, (rand(8, 4), rand(16, 6))),
    ),
    "weight, right operand": ("all_gather_matmul", lambda: (lambda w, x: x @ gather(w).t(), (rand(4, 16), rand(8, 16)))),
    "cast after": (
        "all_gather_matmul",
        lambda: (lambda x, w: gather(x, 1).bfloat16() @ w, (rand(2, 8, 16), rand(16, 6, dtype=torch.bfloat16))),
    ),
    "cast before": (
        "all_gather_matmul",
        lambda: (lambda x, w: gather(x.float()) @ w, (rand(8, 16, dtype=torch.bfloat16), rand(16, 6))),
    ),
    "batch-1 einsum": (
        "all_gather_matmul",
        lambda: (lambda x, w: torch.einsum("bsd,dhk->bshk", gather(x, 1), w), (rand(2, 8, 16), rand(16, 3, 5))),
    ),
    "scatter rows": ("matmul_reduce_scatter", lambda: (lambda x, w: scatter(x @ w), (rand(32, 6), rand(6, 16)))),
    "scatter dim 1": ("matmul_reduce_scatter", lambda: (lambda x, w: scatter(x @ w, 1), (rand(3, 32, 6), rand(6, 16)))),
    "scatter last dim": ("matmul_reduce_scatter", lambda: (lambda x, w: scatter(x @ w, 1), (rand(8, 6), rand(6, 16)))),
    "average": ("matmul_reduce_scatter", lambda: (lambda x, w: scatter(x @ w, 0, "avg"), (rand(32, 6), rand(6, 16)))),
    "sum of matmuls": (
        "matmul_reduce_scatter",
        lambda: (
            lambda x, w, y, v: scatter((x @ w + 2 * (y @ v) - x).float(), 1),
            (rand(2, 32, 16), rand(16, 16), rand(2, 32, 6), rand(6, 16)),
        ),
    ),
    "broadcast addends": (
        "matmul_reduce_scatter",
        lambda: (lambda x, w, b, c: scatter(x @ w + b + c), (rand(32, 6), rand(6, 16), rand(16), rand(32, 1))),
    ),
    "scaled addmm is two terms": (
        "matmul_reduce_scatter",
        lambda: (lambda b, x, w: scatter(torch.addmm(b, x, w, alpha=2, beta=3)), (rand(16), rand(32, 6), rand(6, 16))),
    ),
    "residual in addmm": (
        "all_gather_matmul",
        lambda: (lambda x, w, y: gather(x) @ w + y, (rand(8, 16), rand(16, 6), rand(32, 6))),
    ),
    "transposed result": ("matmul_reduce_scatter", lambda: (lambda x, w: scatter((x @ w).t()), (rand(32, 6), rand(6, 16)))),
    "all_reduce": ("matmul_all_reduce", lambda: (lambda x, w, b: reduce(F.linear(x, w, b)), (rand(2, 5, 6), rand(7, 6), rand(7)))),
    "gather output": ("matmul_all_gather", lambda: (lambda x, w: gather(x @ w, 1), (rand(8, 6), rand(6, 16)))),
    "gather output rows": ("matmul_all_gather", lambda: (lambda x, w: gather(x @ w), (rand(8, 6), rand(6, 16)))),
}  # fmt: skip


@pytest.mark.parametrize("name", FUSED)
def test_fuses_and_leaves_no_collective_behind(name: str) -> None:
    kind, make = FUSED[name]
    fn, args = make()
    found = compile_graphs(fn, *args)
    assert found.kinds() == [kind]
    assert found.codes() == ["fused"], found.rows[0].reason
    targets = found.targets()
    assert targets.count(f"tscompile.{kind}") == 1
    # A fused op beside a surviving collective would communicate twice.
    assert not [t for t in targets if "_c10d_functional" in t]
    assert not [t for t in targets if t in ("aten.mm", "aten.addmm", "aten.bmm")]
    assert targets.count("tscompile.begin") == 1


def test_one_gather_serves_several_matmuls_and_other_readers() -> None:
    def fn(x: Tensor, w1: Tensor, w2: Tensor) -> tuple[Tensor, ...]:
        g = gather(x, 1)
        return g @ w1, torch.relu(g @ w2), g.mean(-1)

    found = compile_graphs(fn, rand(2, 8, 16), rand(16, 6), rand(16, 4))
    assert found.codes() == ["fused"]
    assert not [t for t in found.targets() if t in ("aten.mm", "aten.cat", "_c10d_functional.all_gather_into_tensor")]


def test_training_gathers_once_per_direction() -> None:
    def fn(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        return scatter(F.silu(gather(x, 1) @ w) @ v, 1)

    found = compile_graphs(fn, rand(2, 8, 16, grad=True), rand(16, 6, grad=True), rand(6, 16, grad=True), backward=True)
    assert found.codes() == ["fused"] * 4
    assert [row.phase for row in found.rows] == ["forward", "forward", "backward", "backward"]
    assert not [t for t in found.targets() if "_c10d_functional" in t]


def test_all_reduces_that_are_only_added_become_one() -> None:
    def fn(x: Tensor, w: Tensor, v: Tensor, u: Tensor) -> Tensor:
        return reduce(x @ w) + reduce(x @ v) + reduce(x @ u)

    found = compile_graphs(fn, rand(8, 6), rand(6, 5), rand(6, 5), rand(6, 5))
    assert [len(row.collectives) for row in found.rows] == [3]
    assert found.targets().count("tscompile.matmul_all_reduce") == 1


def test_all_reduces_that_are_read_apart_stay_apart() -> None:
    def fn(x: Tensor, w: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        a, b = reduce(x @ w), reduce(x @ v)
        return a + b, a

    found = compile_graphs(fn, rand(8, 6), rand(6, 5), rand(6, 5))
    assert [len(row.collectives) for row in found.rows] == [1, 1]


def test_ops_of_a_group_are_chained_by_their_token() -> None:
    found = compile_graphs(lambda x, y, w: (gather(x) @ w, gather(y) @ w), rand(8, 16), rand(4, 16), rand(16, 6))
    first, second = (n for n in found.graphs[0].nodes if str(n.target).startswith("tscompile.all_gather"))
    assert second.args[-3].args[0] is first


def both(x: Tensor) -> Tensor:
    g = gather(x)
    return g @ g


def depends(x: Tensor, w: Tensor) -> Tensor:
    g = gather(x)
    return g @ torch.tanh(g.sum() * w)


def twice(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    y = x @ w
    return scatter(y), y


def recast(x: Tensor, w: Tensor) -> Tensor:
    return gather(x).bfloat16().float() @ w


def chain(x: Tensor, w: Tensor) -> Tensor:
    return scatter(gather(x) @ w)


KEPT: dict[str, tuple[str, str, Callable[[], Program]]] = {
    "both operands": ("all_gather_matmul", "both-operands", lambda: (both, (rand(8, 32),))),
    "other operand": ("all_gather_matmul", "other-operand-depends", lambda: (depends, (rand(8, 16), rand(16, 4)))),
    "a slice": ("all_gather_matmul", "not-a-strided-view", lambda: (lambda x, w: gather(x)[:20] @ w, (rand(8, 16), rand(16, 4)))),
    "lossy casts": ("all_gather_matmul", "lossy-casts", lambda: (recast, (rand(8, 16), rand(16, 4)))),
    "batched": ("all_gather_matmul", "batched-matmul", lambda: (lambda x, w: gather(x) @ w, (rand(2, 8, 16), rand(8, 16, 4)))),
    "maximum": ("matmul_reduce_scatter", "reduce-op", lambda: (lambda x, w: scatter(x @ w, 0, "max"), (rand(32, 6), rand(6, 16)))),
    "read elsewhere": ("matmul_reduce_scatter", "result-read-elsewhere", lambda: (twice, (rand(32, 6), rand(6, 16)))),
    "transposed terms": (
        "matmul_all_reduce",
        "terms-differ",
        lambda: (lambda x, w, v: reduce(x @ w + (x @ v).t()), (rand(8, 6), rand(6, 8), rand(6, 8))),
    ),
    "scaled addmm": (
        "all_gather_matmul",
        "scaled-addmm",
        lambda: (lambda b, x, w: torch.addmm(b, gather(x), w, alpha=2), (rand(5), rand(8, 6), rand(6, 5))),
    ),
    "sum gathered": (
        "matmul_all_gather",
        "sum-before-gather",
        lambda: (lambda x, w, y: gather(x @ w + y), (rand(8, 6), rand(6, 16), rand(8, 16))),
    ),
    "reduced, then multiplied": ("all_reduce_matmul", "no-kernel", lambda: (lambda x, w: reduce(x) @ w, (rand(8, 16), rand(16, 4)))),
    "scattered, then multiplied": (
        "reduce_scatter_matmul",
        "no-kernel",
        lambda: (lambda x, w: scatter(x) @ w, (rand(8, 16), rand(16, 4))),
    ),
    "integers": (
        "all_gather_matmul",
        "unsupported",
        lambda: (lambda x, w: gather(x) @ w, (torch.ones(8, 16, dtype=torch.int64), torch.ones(16, 4, dtype=torch.int64))),
    ),
    "complex": (
        "matmul_reduce_scatter",
        "unsupported",
        lambda: (lambda x, w: scatter(x @ w), (rand(32, 6, dtype=torch.complex64), rand(6, 16, dtype=torch.complex64))),
    ),
}  # fmt: skip


# Inductor before torch 2.13 merges the casts itself, so that nothing is lossy by the time we see it.
MERGED_CASTS = pytest.mark.skipif(TORCH < (2, 13), reason="this torch merges chains of casts before the pass")


@pytest.mark.parametrize("name", [pytest.param(n, marks=MERGED_CASTS if n == "lossy casts" else ()) for n in KEPT])
def test_refuses_with_a_reason_and_keeps_the_program(name: str) -> None:
    kind, code, make = KEPT[name]
    fn, args = make()
    found = compile_graphs(fn, *args)
    assert (found.kinds(), found.codes()) == ([kind], [code]), found.rows
    assert found.rows[0].reason
    assert sum("_c10d_functional.wait_tensor" in t for t in found.targets()) == 1
    assert not [t for t in found.targets() if t.startswith("tscompile.") and t != "tscompile.begin"]


def test_an_addmm_that_is_read_elsewhere_is_not_counted_twice() -> None:
    def fn(x: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = torch.addmm(y, x, w)  # both parts reach the reduction, and the whole is read as well
        return reduce(z), torch.relu(z)

    found = compile_graphs(fn, rand(8, 6), rand(6, 5), rand(8, 5))
    assert found.codes() == ["result-read-elsewhere"]


def test_a_gathered_bias_is_no_operand() -> None:
    found = compile_graphs(lambda b, x, w: torch.addmm(gather(b), x, w), rand(2), rand(4, 6), rand(6, 8))
    assert (found.kinds(), found.codes()) == ([None], ["no-matmul"])


def test_two_gathers_into_one_matmul_are_both_recognised() -> None:
    found = compile_graphs(lambda x, w: gather(x) @ gather(w, 1), rand(8, 16), rand(16, 3))
    assert found.kinds() == ["all_gather_matmul", "all_gather_matmul"]
    assert sorted(found.codes()) == ["fused", "matmul-taken"]


def test_ranks_on_several_hosts_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    fn, args = FUSED["rows"][1]()
    found = compile_graphs(fn, *args)
    assert found.codes() == ["unsupported"]
    assert "several hosts" in found.rows[0].reason


def test_a_matmul_is_fused_once() -> None:
    found = compile_graphs(chain, rand(8, 16), rand(16, 4))
    assert found.kinds() == ["all_gather_matmul", "matmul_reduce_scatter"]
    assert found.codes() == ["fused", "matmul-taken"]


def test_nothing_to_fuse_is_unmatched() -> None:
    found = compile_graphs(lambda x: gather(x) + 1, rand(8, 16))
    assert (found.kinds(), found.codes()) == ([None], ["no-matmul"])


def test_disabled_kinds_and_dry_run_and_the_cost_model_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    fn, args = FUSED["rows"][1]()
    assert compile_graphs(fn, *args, disable=("all_gather_matmul",)).codes() == ["disabled"]
    assert compile_graphs(fn, *args, dry_run=True).codes() == ["dry-run"]
    monkeypatch.setitem(cost_model.SHM, "all_gather_matmul", cost_model.Link(1e6, 0.0))
    assert compile_graphs(fn, *args, fuse="auto").codes() == ["no-gain"]


def test_on_kept_error_names_the_site() -> None:
    fn, args = KEPT["maximum"][2]()
    with pytest.raises(Exception, match="reduce-op") as caught:
        compile_graphs(fn, *args, on_kept="error")
    assert isinstance(caught.value, KeptError) or "KeptError" in str(caught.value)


def test_zero_size_shards_are_kept() -> None:
    found = compile_graphs(lambda x, w: gather(x) @ w, rand(0, 16), rand(16, 4))
    assert found.rows[0].decision != "fused"
