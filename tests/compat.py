"""What the suite must say differently to older torch versions."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor

from tscompile.versions import major_minor

TORCH = major_minor(torch.__version__)


def all_gather(x: Tensor, dim: int, group: Any) -> Tensor:
    """all_gather_tensor; torch before 2.13 cannot trace it along other dims than 0, so its two halves are written out."""
    if dim == 0 or TORCH >= (2, 13):
        gathered: Tensor = funcol.all_gather_tensor(x, dim, group)
        return gathered
    return torch.cat(funcol.all_gather_tensor(x, 0, group).chunk(group.size()), dim)


def permuted_group(ranks: list[int]) -> Any:
    """A group whose ranks keep the order given here; torch versions without `sort_ranks` sort them."""
    keeps = {"sort_ranks": False} if "sort_ranks" in inspect.signature(dist.new_group).parameters else {}
    return dist.new_group(ranks, **keeps)
