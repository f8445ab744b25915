"""Exchanges in captured graphs: what becomes one op, what copies are left beside it, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from torch import Tensor, fx

from tests.graphs import Compiled, compile_graphs
from tests.programs import PROGRAMS, Setting
from tests.programs.attention import SPELLINGS
from tscompile.problem import Plan
from tscompile.testing import fake_world

KIND = "all_to_all_permute"
R = 4
COPIES = ("aten.clone", "aten.cat", "aten.contiguous")
heads, sequence = SPELLINGS["deepspeed"].heads, SPELLINGS["deepspeed"].sequence


@pytest.fixture(autouse=True)
def world() -> Iterator[None]:
    with fake_world(R):
        yield


def rand(*shape: int, grad: bool = False, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=dtype).requires_grad_(grad)


def swap(x: Tensor) -> Tensor:
    return funcol.all_to_all_single(x, None, None, dist.group.WORLD)


def ops_of(found: Compiled) -> list[fx.Node]:
    return [n for g in found.graphs for n in g.nodes if KIND in str(n.target)]


def plan_of(node: fx.Node) -> Plan:
    return Plan.loads(str(node.args[-2]))


def compile_program(name: str, rank: int = 0, disable: tuple[str, ...] = (), **options: Any) -> Compiled:
    program = PROGRAMS[name]
    setting = Setting(R, rank, program.dtype)
    built = program.build(setting)
    built.mark_dynamic()
    with program.enter(setting):
        disable = (*disable, "all_to_all_attention", "all_to_all_matmul", "matmul_all_to_all")
        return compile_graphs(built.call, *built.args, backward=program.backward, disable=disable, **options)


NO_COPIES = [
    "d1_ulysses_deepspeed",
    "d2_ulysses_yunchang",
    "d3_ulysses_functional",
    "d5_ulysses_fusedqkv",
    "d6_ulysses_dtensor",
    "d7_ulysses_yunchang_nograd",
    "d8_ulysses_opaque",
    "d10_ulysses_dynamic",
]


@pytest.mark.parametrize("name", NO_COPIES)
def test_every_spelling_becomes_the_same_ops_and_no_copy_is_left(name: str) -> None:
    found = compile_program(name)
    assert set(found.kinds()) == {KIND} and set(found.codes()) == {"fused"}
    together = 1 if "fusedqkv" in name else 3
    counts = [len(row.collectives) for row in found.rows]
    assert counts == [together, 1, 1, together][: 2 if "nograd" in name else 4]
    targets = found.targets()
    assert not [t for t in targets if "c10d" in t or "all_to_all_single" in t or "alltoall" in t or "dim_zero" in t]
    # Of one exchange for q, k and v the gradients are put together before they leave.
    assert [t for t in targets if t in COPIES] == (["aten.cat"] if "fusedqkv" in name else [])


def test_the_attention_reads_outputs_of_the_op_in_the_layout_that_it_had() -> None:
    """[b, S, h, d] in memory, as views: a copy would have to be made by a reshape."""
    found = compile_program("d1_ulysses_deepspeed")
    attention = next(n for n in found.graphs[0].nodes if "flash_attention" in str(n.target))
    op = ops_of(found)[0]
    for number, operand in enumerate(attention.args[:3]):
        assert str(operand.target) == "aten.permute.default"
        (view,) = operand.all_input_nodes
        assert str(view.target) == "aten.reshape.default"
        (out,) = view.all_input_nodes
        assert out.args == (op, number)
        assert operand.meta["val"].stride() == (8 * R * 2 * 16, 16, 2 * 16, 1)
    assert plan_of(op).joins == (1, 1, 1)


def test_three_gradients_leave_as_the_one_tensor_that_the_projection_reads() -> None:
    found = compile_program("d1_ulysses_deepspeed")
    op = ops_of(found)[-1]
    plan = plan_of(op)
    assert plan.joins == (3,)
    assert sorted(d.exchange for d in plan.deliveries) == [0, 1, 2]
    assert [tuple(v.shape) for v in op.meta["val"][:-1]] == [(2 * 8, 3 * 128)]


def test_one_exchange_of_all_heads_is_delivered_in_three_parts() -> None:
    found = compile_program("d5_ulysses_fusedqkv")
    plan = plan_of(ops_of(found)[0])
    assert plan.joins == (1, 1, 1)
    assert {d.exchange for d in plan.deliveries} == {0}
    assert sorted(index for d in plan.deliveries for _, index in d.fixed) == [0, 1, 2]


@pytest.mark.parametrize("name", ["d1_ulysses_deepspeed", "d6_ulysses_dtensor", "d5_ulysses_fusedqkv"])
def test_every_rank_plans_the_same(name: str) -> None:
    plans = [op.args[-2] for op in ops_of(compile_program(name))]
    dist.destroy_process_group()
    with fake_world(R, 1):
        assert [op.args[-2] for op in ops_of(compile_program(name, 1))] == plans
    dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=R)  # what the fixture leaves


def rotated(x: Tensor, angle: Tensor) -> Tensor:
    return x * angle.cos()


def test_exchanges_with_something_else_before_the_attention_are_ops_of_their_own() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor, angle: Tensor) -> Tensor:
        q, k, v = (heads(t) for t in (q, k, v))
        q, k = rotated(q, angle), rotated(k, angle)
        return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))

    found = compile_graphs(fn, *(rand(2, 8, 8, 16) for _ in range(3)), rand(2, 32, 2, 16))
    assert set(found.codes()) == {"fused"}
    assert sum(len(row.collectives) for row in found.rows) == 3


def test_exchanges_that_wait_for_one_another_stay_apart() -> None:
    def fn(x: Tensor, w: Tensor) -> Tensor:
        first = swap(x)
        second = swap(torch.relu(first))
        return torch.cat([first, second]) @ w

    found = compile_graphs(fn, rand(8, 6), rand(6, 5))
    assert found.codes() == ["fused", "fused"]
    assert found.targets().count(f"tscompile.{KIND}") == 2


def test_what_is_no_strided_view_is_read_from_the_exchange() -> None:
    def fn(x: Tensor) -> Tensor:
        got = swap(x)
        return torch.cat([got[3:5], got[:2]]) * 2 + got[::4].sum()

    found = compile_graphs(fn, rand(8, 6))
    assert found.codes() == ["fused"]
    assert [d.order for d in plan_of(ops_of(found)[0]).deliveries] != []


def test_repeated_heads_travel_once() -> None:
    def fn(k: Tensor, q: Tensor) -> Tensor:
        whole = heads(k).repeat_interleave(2, 2)
        return F.scaled_dot_product_attention(q, whole.transpose(1, 2), whole.transpose(1, 2))

    found = compile_graphs(fn, rand(2, 8, 4, 16), rand(2, 2, 32, 16))
    assert found.codes() == ["fused"]
    (op,) = ops_of(found)
    assert op.meta["val"][0].numel() == 2 * 8 * 4 * 16


@pytest.mark.parametrize("dims", [(0,), (1,), (0, 1)])
def test_symbolic_sizes_are_fused_or_kept_with_a_reason(dims: tuple[int, ...]) -> None:
    """Of a dim 0 that is symbolic nothing says that the ranks' blocks are equal, unless its size is written as a multiple."""
    x = rand(8, 6)
    for dim in dims:
        torch._dynamo.mark_dynamic(x, dim)
    found = compile_graphs(lambda x: swap(x).t().contiguous() * 2, x)
    assert found.codes() == (["symbolic-size"] if 0 in dims else ["fused"]), found.rows
    multiple = compile_graphs(lambda x: swap(torch.cat([x] * R)).sin() * x.sum(), x)
    assert multiple.codes() == ["fused"], multiple.rows


def uneven(x: Tensor) -> Tensor:
    return funcol.all_to_all_single(x, [1, 2, 2, 3], [3, 2, 2, 1], dist.group.WORLD) * 2


def known_at_run_time(x: Tensor, sizes: Tensor) -> Tensor:
    splits = sizes.tolist()
    for split in splits:
        torch._check(split >= 0)
    return funcol.all_to_all_single(x, splits, splits, dist.group.WORLD) * 2


KEPT: dict[str, tuple[str, Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "uneven parts": ("uneven-splits", uneven, (rand(8, 6),)),
    "parts of unknown size": ("uneven-splits", known_at_run_time, (rand(8, 6), torch.full((R,), 2))),
    "no elements": ("empty", lambda x: swap(x) * 2, (rand(8, 0),)),
    "integers": ("unsupported", lambda x: swap(x) * 2, (torch.ones(8, 6, dtype=torch.int64),)),
}


@pytest.mark.parametrize("name", KEPT)
def test_is_kept_for_a_reason(name: str) -> None:
    code, fn, args = KEPT[name]
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        found = compile_graphs(fn, *args)
    assert found.codes() == [code]
    assert found.rows[0].reason


def test_can_be_disabled() -> None:
    found = compile_program("d7_ulysses_yunchang_nograd", disable=(KIND,))
    assert set(found.codes()) == {"disabled"}
    assert "_c10d_functional.all_to_all_single" in found.targets()
