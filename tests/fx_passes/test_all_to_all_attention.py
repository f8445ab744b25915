"""Attention between exchanges in captured graphs: one op each way, and what is left to all_to_all_permute for which reason."""

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
from tscompile.lowering import cost_model, planner
from tscompile.options import Options
from tscompile.problem import FusionProblem, Keep, Plan
from tscompile.templates.attention import head_groups
from tscompile.testing import fake_world

KIND = "all_to_all_attention"
R = 4
aten = torch.ops.aten
heads, sequence = SPELLINGS["yunchang"].heads, SPELLINGS["yunchang"].sequence


@pytest.fixture(autouse=True)
def world() -> Iterator[None]:
    with fake_world(R):
        yield


def rand(*shape: int) -> Tensor:
    return torch.randn(shape)


def ops_of(found: Compiled) -> list[fx.Node]:
    return [n for g in found.graphs for n in g.nodes if KIND in str(n.target)]


def compile_program(name: str, disable: tuple[str, ...] = (), **options: Any) -> Compiled:
    """Without the projections, which are another kind's."""
    program = PROGRAMS[name]
    setting = Setting(R, 0, program.dtype)
    built = program.build(setting)
    built.mark_dynamic()
    with program.enter(setting):
        disable = (*disable, "matmul_all_to_all")
        return compile_graphs(built.call, *built.args, backward=program.backward, disable=disable, **options)


@pytest.mark.parametrize(
    "name",
    [
        "d1_ulysses_deepspeed",
        "d2_ulysses_yunchang",
        "d3_ulysses_functional",
        "d6_ulysses_dtensor",
        "d7_ulysses_yunchang_nograd",
        "d8_ulysses_opaque",
        "d10_ulysses_dynamic",
    ],
)
def test_the_attention_and_its_exchanges_are_one_op_each_way(name: str) -> None:
    found = compile_program(name)
    assert set(found.kinds()) == {KIND} and set(found.codes()) == {"fused"}
    assert [len(row.collectives) for row in found.rows] == [4] * len(found.rows)
    assert len(found.rows) == (1 if "nograd" in name else 2)
    assert all(row.reason.endswith("runs as 2 head groups") for row in found.rows)
    assert all(any("flash attention" in shape for shape in row.shapes) for row in found.rows)
    targets = found.targets()
    assert not [t for t in targets if "scaled_dot_product" in t or t in ("aten.clone", "aten.cat")]


def test_what_the_backward_needs_is_an_output() -> None:
    found = compile_program("d1_ulysses_deepspeed")
    forward, backward = ops_of(found)
    assert len(forward.meta["val"]) == 3 + 2 + 1 + 1  # q, k, v; output, logsumexp; what the projection reads; token
    assert [len(args) for args in backward.args[:2]] == [1, 5]  # the gradient travels, what was saved is here
    plan = Plan.loads(str(backward.args[-2]))
    assert plan.attention is not None and plan.attention.joins == (3,)
    assert Plan.loads(plan.dumps()) == plan


def test_one_exchange_for_all_feeds_three_operands() -> None:
    found = compile_program("d5_ulysses_fusedqkv")
    assert found.kinds() == [KIND, "all_to_all_permute", "all_to_all_matmul"]
    assert [len(row.collectives) for row in found.rows] == [2, 1, 1]


def around(attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (heads(t).transpose(1, 2) for t in (q, k, v))
        return sequence(attend(q, k, v).transpose(1, 2)).flatten(2)

    return fn


def decomposed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """With capped logits, so that Inductor does not make a fused attention of it."""
    return torch.softmax(torch.tanh(q @ k.transpose(-1, -2)) * 30, -1) @ v


def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention(q, k, v)  # type: ignore[return-value]


LEFT: dict[str, tuple[str, Callable[[Tensor, Tensor, Tensor], Tensor], int]] = {
    "one head": ("one head", F.scaled_dot_product_attention, R),
    "a mask": ("with a mask", masked, 2 * R),
    "decomposed": ("decomposed into matmuls", decomposed, 2 * R),
    "FlexAttention": ("FlexAttention is one generated kernel", flex, 2 * R),
}


@pytest.mark.parametrize("name", LEFT)
def test_is_left_to_the_permuting_exchange_for_a_reason(name: str) -> None:
    said, attend, count = LEFT[name]
    found = compile_graphs(around(attend), *(rand(2, 8, count, 16) for _ in range(3)))
    assert set(found.kinds()) == {"all_to_all_permute"}
    assert set(found.codes()) == {"fused"}
    assert said in found.rows[0].reason and KIND in found.rows[0].reason


def test_checkpoints_that_save_random_state_are_left() -> None:
    found = compile_program("d9_ulysses_checkpoint")
    assert set(found.kinds()) == {"all_to_all_permute", "all_to_all_matmul"}
    assert "random numbers" in found.rows[0].reason


def test_rotated_operands_are_local() -> None:
    """Only v's exchange is next to the attention: it goes with it, q and k are there when it starts."""

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = heads(q).cos(), heads(k).cos()
        out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, heads(v))))
        return sequence(out.transpose(1, 2)).flatten(2)

    found = compile_graphs(fn, *(rand(2, 8, 8, 16) for _ in range(3)))
    (op,) = ops_of(found)
    assert [len(args) for args in op.args[:2]] == [1, 2]
    assert set(found.codes()) == {"fused"}


def test_no_exchange_after_it() -> None:
    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*(heads(t).transpose(1, 2) for t in (q, k, v)))

    found = compile_graphs(fn, *(rand(2, 8, 8, 16) for _ in range(3)))
    assert found.kinds() == ["all_to_all_permute"]


def test_exchanges_of_two_groups_are_no_op_of_one() -> None:
    other = dist.new_group(list(range(R)))

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(*(heads(t).transpose(1, 2) for t in (q, k, v)))
        blocks = out.reshape(2, 2, R, 8, 16).permute(2, 0, 1, 3, 4).contiguous()
        return funcol.all_to_all_single(blocks, None, None, other) * 2

    found = compile_graphs(fn, *(rand(2, 8, 8, 16) for _ in range(3)))
    assert found.kinds() == ["all_to_all_permute"] * 2 and set(found.codes()) == {"fused"}
    assert len({row.group for row in found.rows}) == 2


def test_disabled_it_gives_way() -> None:
    found = compile_program("d7_ulysses_yunchang_nograd", disable=(KIND,))
    assert found.kinds() == ["all_to_all_permute", "all_to_all_matmul"]


def test_the_planner_takes_the_exchanges_alone_where_groups_of_heads_gain_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = compile_program("d7_ulysses_yunchang_nograd", fuse="auto")
    assert found.kinds() == ["all_to_all_permute"] * 2 and set(found.codes()) == {"fused"}
    monkeypatch.setattr(cost_model, "HEAD_GROUP_US", 0.0)
    assert compile_program("d7_ulysses_yunchang_nograd", fuse="auto").kinds() == [KIND]


def test_groups_have_flags() -> None:
    assert [head_groups(count) for count in (1, 2, 3, 4, 5, 6, 8, 12)] == [1, 2, 3, 4, 1, 3, 4, 4]


def test_there_is_no_kernel_on_gpus() -> None:
    problem = FusionProblem(KIND, 4, True, "cuda", "bfloat16", 1 << 20, (), exchanges=4, heads=8)
    decision = planner.plan(problem, Plan(KIND, "", "", "bfloat16"), Options(fuse="always"))
    assert isinstance(decision, Keep) and decision.code == "no-executor"
