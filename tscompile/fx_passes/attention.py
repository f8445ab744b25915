"""Attention in a graph: every form in which torch's scaled_dot_product_attention appears, forward and backward."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

from torch import fx

from ..problem import Keep
from .layout import is_movement, walk_moved

_ON_CPU = "_scaled_dot_product_flash_attention_for_cpu"
# Forward ops of torch.ops.aten; the backward of each has "_backward" behind its name.
_FORMS = {
    "_scaled_dot_product_flash_attention": "flash attention",
    _ON_CPU: "flash attention",
    "_scaled_dot_product_cudnn_attention": "cuDNN attention",
    "_scaled_dot_product_efficient_attention": "memory-efficient attention",
    "_scaled_dot_product_fused_attention_overrideable": "a device's own attention",
}
_FLEX = ("flex_attention", "flex_attention_backward")
_RNG = ("run_and_save_rng_state", "run_with_rng_state")
_BETWEEN = ("mul", "div", "add", "sub", "amax", "exp", "sum", "where", "_softmax", "exp2", "maximum", "tanh")


@dataclass(frozen=True)
class Form:
    """An attention op of a graph.

    op: its name in torch.ops.aten; operands: its tensors `[B, heads, ...]`.
    refusal: why it cannot be computed by groups of heads, if it cannot.
    """

    node: fx.Node
    name: str
    op: str
    operands: tuple[fx.Node, ...] = ()
    causal: bool = False
    scale: float | None = None
    refusal: Keep | None = None


def is_attention(node: fx.Node) -> bool:
    """True for the forward and the backward op of a fused attention, FlexAttention included."""
    return node.op == "call_function" and (_op(node).removesuffix("_backward") in _FORMS or _op(node) in _FLEX)


def attention_form(node: fx.Node) -> Form | None:
    """What attention `node` is, or the first matmul of, if torch decomposed it; None if it is none."""
    op = _op(node)
    if node.op != "call_function":
        return None
    if op in _FLEX:
        reason = "FlexAttention is one generated kernel for all heads, whose mask may depend on the head"
        return Form(node, "FlexAttention", op, refusal=Keep("no-kernel", reason))
    if op == "bmm" and _is_decomposed(node):
        reason = "the attention is decomposed into matmuls and a softmax: no kernel takes it by groups of heads"
        return Form(node, "decomposed attention", op, refusal=Keep("no-kernel", reason))
    name = _FORMS.get(op.removesuffix("_backward"))
    if name is None:
        return None
    if _name(node.target) in _RNG:
        reason = "a checkpoint saves the state of the random numbers around the attention, once for all heads"
        return Form(node, name, op, refusal=Keep("no-kernel", reason))
    if op.removesuffix("_backward") != _ON_CPU:
        return Form(node, name, op, refusal=Keep("no-kernel", f"no kernel takes {name} on GPUs by groups of heads"))
    count = 6 if op.endswith("_backward") else 3
    arguments: tuple[Any, ...] = node.args
    dropout, causal = (
        (*arguments[count:], 0.0, False)[:2] if len(arguments) == count else (*arguments[count:], False)[:2]
    )
    refusal = None
    if dropout:
        refusal = Keep("no-kernel", "dropout draws for all heads at once")
    elif node.kwargs.get("attn_mask") is not None:
        refusal = Keep("no-kernel", "no kernel takes an attention with a mask by groups of heads")
    scale: Any = node.kwargs.get("scale")
    return Form(node, name, op, arguments[:count], bool(causal), scale, refusal)


def _op(node: fx.Node) -> str:
    """Name of the op, or of the one that a checkpoint wraps to draw the same random numbers again."""
    target: Any = node.target
    if _name(target) in _RNG:
        target = next((arg for arg in node.args if hasattr(arg, "_opname")), target)
    return _name(target)


def _name(target: Any) -> str:
    return str(getattr(target, "_opname", "") or getattr(target, "_name", ""))


def _is_decomposed(node: fx.Node) -> bool:
    """True if a softmax of the product `node` goes into another one."""
    seen, stack, normalised = {node}, [node], False
    while stack:
        for user in stack.pop().users:
            if user in seen or user.op != "call_function":
                continue
            seen.add(user)
            op = _op(user)
            if op == "bmm" and normalised:
                return True
            normalised |= op in ("exp", "exp2", "_softmax")
            if op in _BETWEEN or is_movement(user):
                stack.append(user)
    return False


def feeds_attention(node: fx.Node) -> bool:
    """True if an attention reads `node` through movement alone."""
    return any(is_attention(reached) for reached in walk_moved(list(node.users), lambda n: list(n.users)))


def fed_by_attention(node: fx.Node) -> bool:
    """True if `node` is moved from a result of an attention."""
    reached = walk_moved([node], lambda n: n.all_input_nodes)
    return any(n.target is operator.getitem and is_attention(n.all_input_nodes[0]) for n in reached)
