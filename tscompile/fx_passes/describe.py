"""Short texts about graph nodes for the report."""

from __future__ import annotations

import re

import torch
from torch import fx

_SHORT = {"float32": "f32", "bfloat16": "bf16", "float16": "f16", "float64": "f64"}


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def shape_text(node: fx.Node) -> str:
    """For example "bf16[4096, 1024]"."""
    value = node.meta["val"]
    name = dtype_name(value.dtype)
    return f"{_SHORT.get(name, name)}[{', '.join(str(s) for s in value.shape)}]"


def source_line(node: fx.Node) -> str:
    """The innermost line of the user's program that the node comes from, "file.py:12 in forward"; "" if unknown."""
    trace = node.meta.get("stack_trace") or ""
    frames = re.findall(r'File "([^"]+)", line (\d+), in (\S+)', trace)
    for path, line, function in reversed(frames):
        if "/site-packages/torch/" not in path:
            return f"{path.rsplit('/', 1)[-1]}:{line} in {function}"
    return ""
