"""Projections whose results are exchanged, in captured graphs: what becomes one op, and what is left to all_to_all_permute."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, fx

from tests.graphs import Compiled, compile_graphs
from tests.programs import PROGRAMS, Setting
from tests.programs.attention import SPELLINGS
from tscompile.problem import Gemm, Plan
from tscompile.templates.nvlink.projected import project
from tscompile.testing import fake_world

KIND = "matmul_all_to_all"
R = 4
DIM = 64
COPIES = ("aten.clone", "aten.cat", "aten.contiguous")
OTHERS = ("all_to_all_attention", "all_to_all_matmul")


@pytest.fixture(autouse=True)
def world() -> Iterator[None]:
    with fake_world(R):
        yield


def ops_of(found: Compiled) -> list[fx.Node]:
    return [n for g in found.graphs for n in g.nodes if KIND in str(n.target)]


def plan_of(node: fx.Node) -> Plan:
    return Plan.loads(str(node.args[-2]))


def compile_program(name: str, rank: int = 0, **options: Any) -> Compiled:
    program = PROGRAMS[name]
    setting = Setting(R, rank, program.dtype)
    built = program.build(setting)
    built.mark_dynamic()
    with program.enter(setting):
        options = {"disable": OTHERS, **options}
        return compile_graphs(built.call, *built.args, backward=program.backward, **options)


@pytest.mark.parametrize(
    "name",
    [
        "d1_ulysses_deepspeed",
        "d2_ulysses_yunchang",
        "d2_ulysses_yunchang_gqa",
        "d3_ulysses_functional",
        "d5_ulysses_fusedqkv",
        "d6_ulysses_dtensor",
        "d7_ulysses_yunchang_nograd",
        "d8_ulysses_opaque",
        "d10_ulysses_dynamic",
        "d11_ulysses_separate",
    ],
)
def test_projections_and_exchanges_become_one_op(name: str) -> None:
    """Forward: of q, k and v. Backward: of the gradient of the attention's result, which the output's projection makes."""
    found = compile_program(name)
    nograd = "nograd" in name
    assert found.kinds() == [KIND, "all_to_all_permute"] * (1 if nograd else 2)
    assert set(found.codes()) == {"fused"}
    forward, *backward = ops_of(found)
    separate = 3 if "separate" in name else 1
    assert [len(args) for args in forward.args[:3]] == [separate] * 3
    assert [len(args) for op in backward for args in op.args[:3]] == [1] * (0 if nograd else 3)
    assert [len(row.collectives) for row in found.rows[:1]] == [1 if "fusedqkv" in name else 3]
    targets = found.targets()
    assert not [t for t in targets if "c10d" in t or "all_to_all_single" in t or "alltoall" in t or "dim_zero" in t]
    assert [t for t in targets if t in COPIES] == (["aten.cat"] if "fusedqkv" in name else [])
    plan = plan_of(forward)
    assert Plan.loads(plan.dumps()) == plan and plan.computes


@pytest.mark.parametrize("name", ["d1_ulysses_deepspeed", "d2_ulysses_yunchang_gqa", "d11_ulysses_separate"])
def test_every_rank_plans_the_same(name: str) -> None:
    plans = [op.args[-2] for op in ops_of(compile_program(name))]
    dist.destroy_process_group()
    with fake_world(R, 1):
        assert [op.args[-2] for op in ops_of(compile_program(name, 1))] == plans
    dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=R)  # what the fixture leaves


def projected(counts: tuple[int, int, int], spelling: str, batch: int, tokens: int = 8, dim: int = 8) -> Compiled:
    """One projection with so many heads of q, k and v, and an attention."""
    heads = SPELLINGS[spelling].heads

    def fn(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        made = F.linear(x, w, b).view(batch, tokens, sum(counts), dim)
        q, k, v = (heads(t).transpose(1, 2) for t in made.split(counts, 2))
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=counts[0] > counts[1])

    n = sum(counts) * dim
    args = torch.randn(batch, tokens, DIM), torch.randn(n, DIM), torch.randn(n)
    return compile_graphs(fn, *args, disable=OTHERS)


@pytest.mark.parametrize("batch", [1, 2, 6])
@pytest.mark.parametrize("spelling", ["deepspeed", "yunchang", "functional"])
def test_fewer_keys_and_values_in_one_projection(spelling: str, batch: int) -> None:
    """32 heads of q and 8 of k and v have no grid in common; each has columns of its own. NVLink takes them, three chunks or fewer."""
    found = projected((32, 8, 8), spelling, batch)
    assert found.kinds() == [KIND] and found.codes() == ["fused"]
    (op,) = ops_of(found)
    plan = plan_of(op)
    assert [d.columns for d in plan.departures] == [(0, 256), (256, 64), (320, 64)]
    assert op.args[2][0] is not None, "with its bias"
    found_there = project(
        Plan.loads(plan.dumps().replace("float32", "bfloat16")), R, [Gemm(batch * 8, 384, DIM)], list(op.args[3])
    )
    assert found_there is not None
    assert sorted(leg for chunk in found_there.chunks for leg in chunk.legs) == [0, 1, 2]


def qkv(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return (x @ w).view(2, 8, 3, 8, 8).unbind(2)


def attended(*heads: Tensor) -> Tensor:
    exchanged = (SPELLINGS["deepspeed"].heads(t).transpose(1, 2) for t in heads)
    return F.scaled_dot_product_attention(*exchanged)


def rotated(x: Tensor, w: Tensor) -> Tensor:
    q, k, v = qkv(x, w)
    return attended(q.cos() * q, k.sin() * k, v)


def normalised(x: Tensor, w: Tensor) -> Tensor:
    return attended(*(F.rms_norm(t, (8,)) for t in qkv(x, w)))


def read_elsewhere(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v = qkv(x, w)
    return attended(q, k, v), v.sin()


def returned(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    made = x @ w
    q, k, v = made.view(2, 8, 3, 8, 8).unbind(2)
    return attended(q, k, v), made


def residual(x: Tensor, w: Tensor) -> Tensor:
    q, k, v = (x @ w + x.repeat(1, 3)).view(2, 8, 3, 8, 8).unbind(2)
    return attended(q, k, v)


def stacked(x: Tensor, w: Tensor) -> Tensor:
    """Tensors of several roots in one exchange."""
    q, k, v = qkv(x, w)
    together = SPELLINGS["yunchang"].heads(torch.cat([q, (v @ v.transpose(-1, -2)) @ k], 2))
    return together.sin()


LEFT: dict[str, tuple[str, Callable[..., Any]]] = {
    "a rotary embedding": ("stands between the matmul and the exchange", rotated),
    "a norm": ("stands between the matmul and the exchange", normalised),
    "another reader": ("also read by another op", read_elsewhere),
    "an output": ("also read by another op", returned),
    "a residual": ("before it is exchanged", residual),
    "several roots": ("stands between the matmul and the exchange", stacked),
}


@pytest.mark.parametrize("name", LEFT)
def test_is_left_to_the_permuting_exchange_for_a_reason(name: str) -> None:
    said, fn = LEFT[name]
    found = compile_graphs(fn, torch.randn(16, DIM), torch.randn(DIM, 3 * DIM), disable=OTHERS)
    assert set(found.kinds()) == {"all_to_all_permute"} and set(found.codes()) == {"fused"}
    assert said in found.rows[0].reason and KIND in found.rows[0].reason


def test_exchanges_of_an_input_are_no_projections() -> None:
    found = compile_graphs(attended, *(torch.randn(2, 8, 8, 8) for _ in range(3)), disable=OTHERS)
    assert found.kinds() == ["all_to_all_permute"] and KIND not in found.rows[0].reason


def test_nothing_is_hidden_on_cpu_ranks() -> None:
    """Whoever multiplies copies, too: the planner takes the exchange alone, and says so."""
    found = compile_program("d7_ulysses_yunchang_nograd", fuse="auto")
    assert found.kinds() == ["all_to_all_permute"] * 2 and set(found.codes()) == {"fused"}
    assert f"{KIND}: predicted" in found.rows[0].reason and "permutes fused" in found.rows[0].reason
