"""Attention in a graph: every form in which torch's scaled_dot_product_attention appears, forward and backward."""

from __future__ import annotations

import operator

from torch import fx

from .layout import walk_moved

# Forward ops of torch.ops.aten; the backward of each has "_backward" behind its name. cuDNN, flash and memory-efficient kernels on
# GPUs, flash on CPU, and what other devices register.
_FORMS = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_fused_attention_overrideable",
)


def is_attention(node: fx.Node) -> bool:
    """True for the forward and the backward op of a fused attention."""
    name = str(getattr(node.target, "_opname", ""))
    return node.op == "call_function" and name.removesuffix("_backward") in _FORMS


def feeds_attention(node: fx.Node) -> bool:
    """True if an attention reads `node` through movement alone."""
    return any(is_attention(reached) for reached in walk_moved(list(node.users), lambda n: list(n.users)))


def fed_by_attention(node: fx.Node) -> bool:
    """True if `node` is moved from a result of an attention."""
    reached = walk_moved([node], lambda n: n.all_input_nodes)
    return any(n.target is operator.getitem and is_attention(n.all_input_nodes[0]) for n in reached)
