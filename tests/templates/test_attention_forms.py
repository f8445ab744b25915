"""Every form of attention by groups of heads: equal to the whole, and to the program of its ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import tscompile
from tests import attention_ops
from tests.attention_ops import FORMS, GROUPED
from tests.programs import scalar_loss
from tests.programs.attention import SPELLINGS
from tests.worlds import run_world
from tscompile.backend import tilescale
from tscompile.fx_passes.attention import attention_form, result_of
from tscompile.problem import Attention, Operand, Result
from tscompile.templates.attention import Results, attend, heads_of

aten = torch.ops.aten
KIND = "all_to_all_attention"
BATCH, LENGTH, WIDTH = 3, 40, 8


def operands(heads: tuple[int, int], by_rows: bool, batch: int = BATCH) -> tuple[Tensor, Tensor, Tensor]:
    """query, key, value, in the memory order of `[B, S, heads, D]` or as they are."""
    draw = torch.Generator().manual_seed(0)

    def one(count: int) -> Tensor:
        shape = (batch, LENGTH, count, WIDTH) if by_rows else (batch, count, LENGTH, WIDTH)
        x = torch.randn(shape, generator=draw, dtype=torch.float64).float()
        return x.transpose(1, 2) if by_rows else x

    return one(heads[0]), one(heads[1]), one(heads[1])


def calls(form: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[fx.Node, fx.Node]:
    """The forward and the backward call of a form, as nodes whose operands are inputs with their values."""
    forward: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "cpu": (aten._scaled_dot_product_flash_attention_for_cpu, (0.0, True)),
        "flash": (aten._scaled_dot_product_flash_attention, (0.0, True)),
        "cudnn": (aten._scaled_dot_product_cudnn_attention, (None, True, 0.0, True)),
        "efficient": (aten._scaled_dot_product_efficient_attention, (None, True, 0.0, True)),
    }
    op, rest = forward[form]
    results = op(q, k, v, *rest, scale=0.4)
    out, lse = results[:2]
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    given: dict[str, tuple[Any, ...]] = {
        "cpu": (out, lse, 0.0, True),
        "flash": (out, lse, None, None, LENGTH, LENGTH, 0.0, True, *results[6:8]),
        "cudnn": (out, lse, *results[6:8], None, None, None, LENGTH, LENGTH, 0.0, True),
        "efficient": (None, out, lse, *results[2:4], 0.0, [True, True, True, False], True),
    }
    backward = getattr(aten, f"{op._qualified_op_name.split('::')[1]}_backward")
    return node_of(op.default, q, k, v, *rest), node_of(backward.default, grad, q, k, v, *given[form])


def node_of(target: Any, *args: Any) -> fx.Node:
    graph = fx.Graph()
    placed = []
    for arg in args:
        if isinstance(arg, Tensor):
            node = graph.placeholder(f"arg{len(graph.nodes)}")
            node.meta["val"] = arg
            placed.append(node)
        else:
            placed.append(arg)
    node = graph.call_function(target, tuple(placed), {"scale": 0.4})
    node.meta["val"] = target(*args, scale=0.4)
    return node


def described(node: fx.Node) -> tuple[Attention, list[Tensor]]:
    """What a plan says of a call none of whose operands is exchanged, all of its results returned; and the operands."""
    form = attention_form(node)
    assert form is not None and form.refusal is None, form
    places = tuple(Operand(number, False, share=share) for number, share in enumerate(form.shares))
    results = []
    for number, value in enumerate(node.meta["val"]):
        if result_of(node, number) == "heads":
            memory = sorted(range(value.dim()), key=value.stride, reverse=True)
            results.append(Result(number, tuple(memory)))
    attention = Attention(form.op, form.arguments, places, tuple(results), (), (), (), ())
    return attention, [operand.meta["val"] for operand in form.operands]


def by_groups(attention: Attention, values: list[Tensor], groups: int) -> list[Tensor]:
    kept = Results(attention)
    for group in range(groups):
        kept.keep(attend(attention, heads_of(attention, values, group, groups)), group, groups)
    return [
        tensor.permute([result.layout.index(dim) for dim in range(tensor.dim())])
        for tensor, result in zip(kept.tensors, attention.results, strict=True)
    ]


@pytest.mark.parametrize("by_rows", [False, True])
@pytest.mark.parametrize("heads", [(4, 4), (8, 4)])
@pytest.mark.parametrize("form", ["cpu", *FORMS])
def test_groups_of_heads_are_the_whole(form: str, heads: tuple[int, int], by_rows: bool) -> None:
    if form == "efficient" and heads[0] != heads[1]:
        heads = (8, 8)
    attention_ops.install()
    for node in calls(form, *operands(heads, by_rows)):
        attention, values = described(node)
        for groups in (1, 2, 4):
            for result, got in zip(attention.results, by_groups(attention, values, groups), strict=True):
                want = node.meta["val"][result.number]
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
                assert got.stride() == want.stride() or want.shape[0] == 1


@pytest.mark.parametrize(("form", "name"), [("flash", "logsumexp"), ("cudnn", "logsumexp"), ("efficient", "out")])
def test_slices_that_are_not_packed_are_read_wrongly(form: str, name: str) -> None:
    """Else nothing here would notice that an operand is no tensor of its own."""
    attention_ops.install()
    _, node = calls(form, *operands((4, 4), True))
    attention, values = described(node)
    (number,) = (a.value for a in attention.arguments if a.name == name)
    loose = tuple(replace(o, share="heads") if n == number else o for n, o in enumerate(attention.operands))
    (query, *_) = by_groups(replace(attention, operands=loose), values, 2)
    assert not torch.allclose(query, node.meta["val"][0], rtol=1e-3, atol=1e-3)


def test_a_packed_slice_has_the_memory_order_of_the_whole() -> None:
    attention_ops.install()
    _, node = calls("efficient", *operands((4, 4), True))
    attention, values = described(node)
    (number,) = (a.value for a in attention.arguments if a.name == "out")
    for groups in (1, 2):
        assert heads_of(attention, values, groups - 1, groups)[number].transpose(1, 2).is_contiguous()


# On ranks


def ulysses(form: str, causal: bool) -> Any:
    exchange = SPELLINGS["yunchang"]

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = FORMS[form](*(exchange.heads(t).transpose(1, 2) for t in (q, k, v)), causal)
        return exchange.sequence(out.transpose(1, 2))

    return fn


def trained(rank: int, size: int, form: str, key_heads: int, dtype: torch.dtype, options: dict[str, Any]) -> list[str]:
    attention_ops.install()
    for causal in (True, False):
        torch._dynamo.reset()
        fn = ulysses(form, causal)
        given = {"tilescale.inner": "eager", "tilescale.fuse": "always", **options}
        compiled = torch.compile(fn, backend=tilescale, fullgraph=True, options=given)
        draw = torch.Generator().manual_seed(rank)
        for _ in range(3):
            args = [
                torch.randn(2, 9, heads, WIDTH, generator=draw).to(dtype).requires_grad_()
                for heads in (8, key_heads, key_heads)
            ]
            found = []
            for call in (compiled, fn):
                out = call(*args)
                found.append([out.detach(), *torch.autograd.grad(scalar_loss(out), args)])
            for got, want in zip(*found, strict=True):
                torch.testing.assert_close(got, want)
                assert got.stride() == want.stride()
            with torch.no_grad():
                torch.testing.assert_close(compiled(*args), found[1][0])
    rows = tscompile.reports().rows
    return sorted({f"{row.pattern} {row.code} {len(row.collectives)}" for row in rows})


@pytest.mark.slow
@pytest.mark.parametrize(("form", "key_heads"), [*((form, 8) for form in FORMS), *((form, 4) for form in GROUPED)])
def test_forms_on_ranks(form: str, key_heads: int) -> None:
    found = run_world(2, trained, form, key_heads, torch.float32, {}, timeout_s=120)
    assert found == [[f"{KIND} fused 4"]] * 2


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_verify_does_not_compare_what_nothing_wrote(form: str) -> None:
    found = run_world(2, trained, form, 8, torch.bfloat16, {"tilescale.verify": True}, timeout_s=120)
    assert found == [[f"{KIND} fused 4"]] * 2
