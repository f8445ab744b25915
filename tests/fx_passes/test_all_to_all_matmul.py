"""Exchanges in front of matmuls in captured graphs: what becomes one op, what is copied for it, and what is left to other ops."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from torch import Tensor, fx

from tests.fx_passes.test_exchanges import Ranks
from tests.graphs import Compiled, compile_graphs
from tests.programs import PROGRAMS, Setting
from tests.programs.attention import SPELLINGS
from tscompile.fx_passes.fusion_pass import collect_rows
from tscompile.fx_passes.sizes import hint
from tscompile.lowering import planner
from tscompile.problem import FusionProblem, Plan, Row
from tscompile.templates.all_to_all_gemm import as_panels
from tscompile.testing import collective_counts, fake_world

KIND, PERMUTE = "all_to_all_matmul", "all_to_all_permute"
BESIDE = ("all_to_all_attention", "matmul_all_to_all")  # other fusions of the same programs
R = 4
COPIES = ("aten.clone", "aten.cat", "aten.contiguous")
aten = torch.ops.aten
heads, sequence = SPELLINGS["deepspeed"].heads, SPELLINGS["deepspeed"].sequence


@pytest.fixture(autouse=True)
def world() -> Iterator[None]:
    with fake_world(R):
        yield


@pytest.fixture
def problems(monkeypatch: pytest.MonkeyPatch) -> list[FusionProblem]:
    """What the planner is asked about this kind."""
    asked: list[FusionProblem] = []
    decide = planner.plan

    def plan(problem: FusionProblem, *args: Any) -> Any:
        if problem.kind == KIND:
            asked.append(problem)
        return decide(problem, *args)

    monkeypatch.setattr(planner, "plan", plan)
    return asked


def rand(*shape: int, grad: bool = False, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=dtype).requires_grad_(grad)


def ops_of(found: Compiled) -> list[fx.Node]:
    return [n for g in found.graphs for n in g.nodes if KIND in str(n.target)]


def plan_of(node: fx.Node) -> Plan:
    return Plan.loads(str(node.args[-2]))


def sent(op: fx.Node) -> list[tuple[int, ...]]:
    """As the templates see it, `[R, M, O, Q]`."""
    plan = Plan.loads(str(op.args[-2]))
    shapes = [[hint(size) for size in x.meta["val"].shape] for x in op.args[0]]  # type: ignore[union-attr]
    return [tuple(x.shape) for x in as_panels(plan, [torch.empty(shape, device="meta") for shape in shapes])]


def compile_program(name: str, rank: int = 0, **options: Any) -> Compiled:
    program = PROGRAMS[name]
    setting = Setting(R, rank, program.dtype)
    built = program.build(setting)
    built.mark_dynamic()
    with program.enter(setting):
        return compile_graphs(built.call, *built.args, backward=program.backward, disable=BESIDE, **options)


SPELLED = [
    "d1_ulysses_deepspeed",
    "d2_ulysses_yunchang",
    "d3_ulysses_functional",
    "d5_ulysses_fusedqkv",
    "d6_ulysses_dtensor",
    "d7_ulysses_yunchang_nograd",
    "d8_ulysses_opaque",
    "d10_ulysses_dynamic",
    "d2_ulysses_yunchang_gqa",
]


@pytest.mark.parametrize("name", SPELLED)
def test_the_output_projection_and_the_gradients_of_every_spelling(name: str) -> None:
    """After the attention one exchange; in the backward those of the gradients, as the projection reads them."""
    found = compile_program(name)
    assert set(found.codes()) == {"fused"}
    inference = "nograd" in name
    assert found.kinds() == [PERMUTE, KIND] * (1 if inference else 2)
    targets = found.targets()
    assert not [t for t in targets if "c10d" in t or "all_to_all_single" in t or "alltoall" in t or "dim_zero" in t]
    assert [t for t in targets if t in COPIES] == (["aten.cat"] if "fusedqkv" in name else [])
    ops = ops_of(found)
    plans = [plan_of(op) for op in ops]
    # The backward needs what was received for the weight's gradient.
    assert [plan.return_gathered for plan in plans] == ([False] if inference else [True, True])
    assert all(plan.uses and Plan.loads(plan.dumps()) == plan for plan in plans)
    if "dynamic" in name:
        return
    assert sent(ops[0]) == [(R, 16, 1, 32)]
    assert inference or sent(ops[1]) == (
        [(R, 16, 3, 32)]
        if "fusedqkv" in name
        else [(R, 16, 1, width) for width in ((32, 16, 16) if "gqa" in name else (32, 32, 32))]
    )


def root_of(value: fx.Node) -> fx.Node:
    """What a chain of views begins with; a reshape counts as one where it shares its source's memory."""
    while value.target in (aten.reshape.default, aten.permute.default, aten.view.default, aten.select.int):
        source = value.all_input_nodes[0]
        one, other = (n.meta["val"].untyped_storage()._cdata for n in (value, source))
        if one != other:
            break
        value = source
    return value


def test_one_sequence_is_sent_from_where_the_attention_left_it(problems: list[FusionProblem]) -> None:
    found = compile_program("d1_ulysses_deepspeed_full_B1")
    assert all("attention" in str(root_of(x).args[0]) for op in ops_of(found) for x in op.args[0])  # type: ignore[union-attr]
    assert [problem.copied_bytes for problem in problems] == [0, 0]
    assert [problem.panels_of for problem in problems] == [((1, 32),), ((1, 32),) * 3]
    assert problems[0].comm_bytes == 8 * 128 * 4 and problems[0].pieces == 8


def test_several_sequences_are_copied_once_and_the_planner_knows(problems: list[FusionProblem]) -> None:
    """Rows of a rank's part lie in one piece per sequence."""
    found = compile_program("d1_ulysses_deepspeed")
    assert all("attention" in str(root_of(x).args[0]) for op in ops_of(found) for x in op.args[0])  # type: ignore[union-attr]
    assert [problem.copied_bytes for problem in problems] == [16 * 128 * 4, 3 * 16 * 128 * 4]


@pytest.mark.parametrize("name", ["d1_ulysses_deepspeed", "d5_ulysses_fusedqkv"])
def test_every_rank_plans_the_same(name: str) -> None:
    plans = [op.args[-2] for op in ops_of(compile_program(name))]
    dist.destroy_process_group()
    with fake_world(R, 1):
        assert [op.args[-2] for op in ops_of(compile_program(name, 1))] == plans
    dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=R)  # what the fixture leaves


def test_projections_of_their_own_are_an_op_each() -> None:
    def fn(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor) -> Tensor:
        q, k, v = (heads(F.linear(x, w).view(2, 8, 8, 16)).transpose(1, 2) for w in (wq, wk, wv))
        return F.scaled_dot_product_attention(q, k, v)

    x, weights = rand(2, 8, 64, grad=True), [rand(128, 64, grad=True) for _ in range(3)]
    found = compile_graphs(fn, x, *weights, backward=True, disable=BESIDE)
    assert found.kinds() == [PERMUTE, KIND, KIND, KIND] and set(found.codes()) == {"fused"}
    assert [sent(op) for op in ops_of(found)] == [[(R, 16, 1, 32)]] * 3


def after(project: Callable[..., Any]) -> Callable[..., Any]:
    """[2, 32, 2, 16] -> what reads the left operand [16, 128] of a projection."""
    return lambda x, *others: project(sequence(x).flatten(2).flatten(0, 1), *others)


FORMS: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]], int]] = {
    "bias": (lambda x, w, b: F.linear(x, w, b), [(64, 128), (64,)], 1),
    "plain layout": (lambda x, w: x @ w, [(128, 64)], 1),
    "three dims": (lambda x, w: x.unsqueeze(0) @ w, [(1, 128, 64)], 1),
    "two projections": (lambda x, v, w: (x @ v, x @ w), [(128, 64), (128, 8)], 2),
    "residual": (lambda x, w, r: r + x @ w, [(128, 64), (16, 64)], 1),
    "read by something else": (lambda x, w: (x @ w, x.sin()), [(128, 64)], 1),
    "a part is read": (lambda x, w: (x @ w, x.view(16, 4, 32)[:, 1].cos()), [(128, 64)], 1),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms_of_the_matmul(name: str) -> None:
    project, shapes, count = FORMS[name]
    found = compile_graphs(after(project), rand(2, 32, 2, 16), *(rand(*shape) for shape in shapes))
    assert found.kinds() == [KIND] and set(found.codes()) == {"fused"}
    (op,) = ops_of(found)
    plan = plan_of(op)
    assert len(plan.uses) == len(op.args[1]) == count  # type: ignore[arg-type]
    assert plan.return_gathered == ("read" in name)
    assert [b is not None for b in op.args[2]] == [name == "bias"] * count  # type: ignore[union-attr]
    assert not [t for t in found.targets() if t in ("aten.mm", "aten.addmm", "aten.bmm")]


def swap(x: Tensor) -> Tensor:
    return funcol.all_to_all_single(x, None, None, dist.group.WORLD)


LEFT: dict[str, tuple[str, Callable[..., Any], list[tuple[int, ...]]]] = {
    "ranks in the rows": ("", lambda x, w: swap(x) @ w, [(16, 32), (32, 8)]),
    "right operand": ("", after(lambda x, w: w @ x.t()), [(2, 32, 2, 16), (8, 128)]),
    "cast before the matmul": ("", after(lambda x, w: x.double() @ w.double()), [(2, 32, 2, 16), (128, 8)]),
    "a part of the columns": ("", after(lambda x, w: x[:, 32:] @ w), [(2, 32, 2, 16), (96, 8)]),
    "scaled": (
        "alpha or beta other than 1",
        after(lambda x, w, r: torch.addmm(r, x, w, alpha=2.0)),
        [(2, 32, 2, 16), (128, 8), (16, 8)],
    ),
    "other operand": (
        "computed from what was exchanged",
        after(lambda x: x @ x.sum(0)[:, None].expand(128, 8).contiguous()),
        [(2, 32, 2, 16)],
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_is_left_to_the_permuting_exchange(name: str) -> None:
    said, fn, shapes = LEFT[name]
    found = compile_graphs(fn, *(rand(*shape) for shape in shapes))
    assert set(found.kinds()) == {PERMUTE} and set(found.codes()) == {"fused"}
    assert not said or (said in found.rows[0].reason and KIND in found.rows[0].reason)


def test_it_gives_way_where_the_exchange_with_its_permutes_is_no_slower() -> None:
    """As on CPU ranks."""
    found = compile_program("d7_ulysses_yunchang_nograd", fuse="auto")
    assert found.kinds() == [PERMUTE] * 2 and set(found.codes()) == {"fused"}
    assert f"{KIND}: predicted" in found.rows[1].reason
    assert found.rows[1].reason.endswith("us with the exchange and its permutes fused")


def test_can_be_disabled() -> None:
    found = compile_graphs(after(lambda x, w: x @ w), rand(2, 32, 2, 16), rand(128, 8), disable=(KIND,))
    assert found.kinds() == [PERMUTE]


def random_exchange(program: Ranks, dice: random.Random, shape: list[int]) -> fx.Node:
    """`[R, *shape]`, exchanged, from a producer that has its dims in any order."""
    sizes = [program.ranks, *shape]
    order = dice.sample(range(len(sizes)), len(sizes))
    node = program.call(aten.neg.default, program.input(tuple(sizes[d] for d in order)))
    node = program.call(aten.permute.default, node, [order.index(d) for d in range(len(sizes))])
    flat = program.call(aten.reshape.default, node, [program.ranks, -1])
    return program.call(aten.reshape.default, program.exchange(flat), sizes)


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("seed", range(30))
def test_random_operands_compute_the_same_on_every_rank(ranks: int, seed: int) -> None:
    """Joined by a cat or alone; ranks anywhere in rows or columns; read by matmuls and by others."""
    dist.destroy_process_group()
    rows: list[Row] = []
    with fake_world(ranks), collect_rows(rows.extend):
        dice, program = random.Random(seed), Ranks(ranks)
        height = [dice.choice([1, 2, 3]) for _ in range(dice.randint(1, 2))]
        operands, in_columns = [], True
        for _ in range(dice.choice([1, 1, 2, 3])):
            inner = [dice.choice([1, 2, 5]) for _ in range(dice.randint(1, 2))]
            got = random_exchange(program, dice, [*height, *inner])
            high, wide = [1 + d for d in range(len(height))], [1 + len(height) + d for d in range(len(inner))]
            wide.insert(dice.randint(0, len(wide)), 0)
            if not operands and dice.random() < 0.15:  # then it is alone: no other is as tall
                high, wide, in_columns = [0, *high], [d for d in wide if d], False
            got = program.call(aten.permute.default, got, [*high, *wide])
            value = got.meta["val"]
            tall = torch.Size(value.shape[: len(high)]).numel()
            operands.append(program.call(aten.reshape.default, got, [tall, value.numel() // tall]))
            if not in_columns:
                break
        operand = operands[0] if len(operands) == 1 else program.call(aten.cat.default, operands, 1)
        k = operand.meta["val"].shape[1]
        outputs = []
        for _ in range(dice.randint(1, 2)):
            weight = program.input((k, 3))
            for tensor in program.real[weight]:
                tensor.remainder_(5).sub_(2)  # all sums are exact
            outputs.append(program.call(aten.mm.default, operand, weight))
        if dice.random() < 0.5:
            outputs.append(program.call(aten.neg.default, program.call(aten.permute.default, operand, [1, 0])))
        expected = [program.real[out] for out in outputs]
        program.fuse(outputs)
        assert not collective_counts(program.graph)
        assert {row.pattern for row in rows} == {KIND if in_columns else PERMUTE}, rows
        for got, want in zip(program.again(), expected, strict=True):
            assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=R)  # what the fixture leaves
