"""Calls of every form of attention, forward and backward, as nodes of a graph whose inputs have their values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from tscompile.fx_passes.attention import attention_form, result_of
from tscompile.problem import Attention, Operand, Result
from tscompile.templates.attention import Results, attend, heads_of

aten = torch.ops.aten
SCALE = 0.4
# The forward op of each form, and what it is called with beside query, key and value.
_FORWARD: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "cpu": (aten._scaled_dot_product_flash_attention_for_cpu.default, (0.0, True)),
    "flash": (aten._scaled_dot_product_flash_attention.default, (0.0, True)),
    "cudnn": (aten._scaled_dot_product_cudnn_attention.default, (None, True, 0.0, True)),
    "efficient": (aten._scaled_dot_product_efficient_attention.default, (None, True, 0.0, True)),
}


def operands(
    batch: int,
    heads: tuple[int, int],
    length: int,
    width: int,
    by_rows: bool,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """query, key, value `[B, heads, S, D]`, in the memory order of `[B, S, heads, D]` or as they are."""
    draw = torch.Generator().manual_seed(0)

    def one(count: int) -> Tensor:
        shape = (batch, length, count, width) if by_rows else (batch, count, length, width)
        x = torch.randn(shape, generator=draw).to(device, dtype)
        return x.transpose(1, 2) if by_rows else x

    return one(heads[0]), one(heads[1]), one(heads[1])


def calls(form: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[fx.Node, fx.Node]:
    """The forward and the backward call of a form, causal; what they return is the value of the node."""
    op, rest = _FORWARD[form]
    forward = node_of(op, q, k, v, *rest)
    results = forward.meta["val"]
    out, lse = results[:2]
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out).transpose(1, 2).contiguous()
    lengths = q.shape[2], k.shape[2]
    given: dict[str, tuple[Any, ...]] = {
        "cpu": (out, lse, 0.0, True),
        "flash": (out, lse, None, None, *lengths, 0.0, True, *results[6:8]),
        "cudnn": (out, lse, *results[6:8], None, None, None, *lengths, 0.0, True),
        "efficient": (None, out, lse, *results[2:4], 0.0, [True, True, True, False], True),
    }
    backward = getattr(aten, f"{op._opname}_backward").default
    return forward, node_of(backward, grad.transpose(1, 2), q, k, v, *given[form])


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
    node = graph.call_function(target, tuple(placed), {"scale": SCALE})
    node.meta["val"] = target(*args, scale=SCALE)
    return node


def described(node: fx.Node) -> tuple[Attention, list[Tensor]]:
    """What a plan says of a call none of whose operands is exchanged, all results with heads returned; and the operands."""
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
    """The results with heads, computed group by group."""
    kept = Results(attention)
    for group in range(groups):
        kept.keep(attend(attention, heads_of(attention, values, group, groups)), group, groups)
    return [
        tensor.permute([result.layout.index(dim) for dim in range(tensor.dim())])
        for tensor, result in zip(kept.tensors, attention.results, strict=True)
    ]
