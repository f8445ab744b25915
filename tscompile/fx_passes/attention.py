"""Attention in a graph: every form in which torch's scaled_dot_product_attention appears, forward and backward.

What an op takes and returns is read off its schema by name, since positions differ between the forms and between versions of torch. The
tables below say what each name means for a group of heads; a name that they do not have is refused.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import fx

from ..problem import Argument, Keep, Share
from .layout import is_movement, walk_moved
from .sizes import known_eq


@dataclass(frozen=True)
class _Kind:
    """shares: operands of which the kernels do not ask for every stride (templates/attention.py)."""

    name: str
    shares: Mapping[str, Share] = field(default_factory=dict)
    by_heads: bool = True


# Forward ops of torch.ops.aten; the backward of each has "_backward" behind its name.
_FORMS = {
    "_scaled_dot_product_flash_attention": _Kind("flash attention", {"logsumexp": "packed"}),
    "_scaled_dot_product_flash_attention_for_cpu": _Kind("flash attention"),
    "_scaled_dot_product_cudnn_attention": _Kind("cuDNN attention", {"logsumexp": "packed"}),
    "_scaled_dot_product_efficient_attention": _Kind("memory-efficient attention", {"out": "rows"}),
    "_scaled_dot_product_fused_attention_overrideable": _Kind("a device's own attention", by_heads=False),
}
# Arguments, by their names in the schemas.
_WITH_HEADS = ("query", "key", "value", "grad_out", "grad_out_", "out", "logsumexp")
_WHOLE = ("philox_seed", "philox_offset")  # not read, since nothing is drawn
_LENGTHS = {"max_q": "query", "max_k": "key"}  # dim 2 of these
_CONSTANTS = ("is_causal", "scale", "compute_log_sumexp", "grad_input_mask")
_MASK = "no kernel takes an attention with a mask by groups of heads"
_PACKED_SEQUENCES = "sequences of different lengths lie behind one another: the heads are no dim of their own"
_MUST_BE_OFF = {
    "dropout_p": "dropout draws for all heads at once",
    "attn_mask": _MASK,
    "attn_bias": _MASK,
    "return_debug_mask": "the program asks for the mask of dropout, of all heads at once",
    "cum_seq_q": _PACKED_SEQUENCES,
    "cum_seq_k": _PACKED_SEQUENCES,
}
# Tensors among the results. Those without a name are gradients of the query, the key, the value and the bias.
_RESULTS_WITH_HEADS = ("output", "logsumexp", "log_sumexp", "grad_query", "grad_key", "grad_value")
_RESULTS_OF_DRAWING = ("philox_seed", "philox_offset", "rng_state", "unused")

_FLEX = ("flex_attention", "flex_attention_backward")
_RNG = ("run_and_save_rng_state", "run_with_rng_state")
_BETWEEN = ("mul", "div", "add", "sub", "amax", "exp", "sum", "where", "_softmax", "exp2", "maximum", "tanh")


@dataclass(frozen=True)
class Form:
    """An attention op of a graph.

    op: its name in torch.ops.aten.
    operands: its tensors, those with heads `[B, heads, ...]`; shares: what a group of heads reads of each.
    arguments: all that it is called with; numbers of operands are places in `operands`.
    refusal: why it cannot be computed by groups of heads, if it cannot.
    """

    node: fx.Node
    name: str
    op: str
    operands: tuple[fx.Node, ...] = ()
    shares: tuple[Share, ...] = ()
    arguments: tuple[Argument, ...] = ()
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
    kind = _FORMS.get(op.removesuffix("_backward"))
    if kind is None:
        return None
    found = _refused(node, kind) or _call(node, kind)
    if isinstance(found, str):
        return Form(node, kind.name, op, refusal=Keep("no-kernel", found))
    operands, shares, arguments = found
    return Form(node, kind.name, op, operands, shares, arguments)


def _refused(node: fx.Node, kind: _Kind) -> str | None:
    """Why the op is none that can be called for a group of heads."""
    if _name(node.target) in _RNG:
        return "a checkpoint saves the state of the random numbers around the attention, once for all heads"
    if not kind.by_heads:
        return f"no kernel takes {kind.name} by groups of heads"
    overload = getattr(node.target, "_overloadname", "default")
    return None if overload == "default" else f"no kernel takes {kind.name} of {overload} operands by groups of heads"


def _call(node: fx.Node, kind: _Kind) -> str | tuple[tuple[fx.Node, ...], tuple[Share, ...], tuple[Argument, ...]]:
    """Operands, what a group of heads reads of each, and the arguments; or why not."""
    given = _given(node)
    operands: list[fx.Node] = []
    shares: list[Share] = []
    arguments: list[Argument] = []
    numbers: dict[str, int] = {}
    for name, value in given.items():
        if name in _MUST_BE_OFF:
            if isinstance(value, fx.Node) or value:
                return _MUST_BE_OFF[name]
            arguments.append(Argument(name, "constant", value))
        elif (name in _WITH_HEADS or name in _WHOLE) and isinstance(value, fx.Node):
            numbers[name] = len(operands)
            arguments.append(Argument(name, "operand", numbers[name]))
            operands.append(value)
            shares.append("whole" if name in _WHOLE else kind.shares.get(name, "heads"))
        elif name in _LENGTHS and _LENGTHS[name] in numbers:
            number = numbers[_LENGTHS[name]]
            length = value.meta["val"] if isinstance(value, fx.Node) else value
            if not known_eq(length, operands[number].meta["val"].shape[2]):
                return f"nothing says that {name} of the attention is the length of its {_LENGTHS[name]}"
            arguments.append(Argument(name, "size", (number, 2)))
        elif (name in _CONSTANTS or name in _WHOLE) and not isinstance(value, fx.Node):
            arguments.append(Argument(name, "constant", tuple(value) if isinstance(value, (list, tuple)) else value))
        elif name in _CONSTANTS:
            return f"{name} of the attention is known only at run time"
        else:
            return f"torch calls its {kind.name} with {name}, which this version does not know"
    return tuple(operands), tuple(shares), tuple(arguments)


def _given(node: fx.Node) -> dict[str, Any]:
    """What each argument of the schema is, defaults included."""
    found: dict[str, Any] = {}
    for place, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if place < len(node.args):
            found[argument.name] = node.args[place]
        else:
            found[argument.name] = node.kwargs.get(argument.name, argument.default_value)
    return found


def result_of(node: fx.Node, number: int) -> Literal["heads", "undrawn", "plain"] | None:
    """What a result of an attention is: a tensor with heads, the state of numbers that nothing draws, or a size or None."""
    if not isinstance(node.meta["val"][number], torch.Tensor):
        return "plain"
    name = node.target._schema.returns[number].name  # type: ignore[union-attr]
    if name in _RESULTS_WITH_HEADS or (not name and _op(node).endswith("_backward") and number < 3):
        return "heads"
    return "undrawn" if name in _RESULTS_OF_DRAWING else None


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
