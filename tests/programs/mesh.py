"""Matmuls on a 2-D mesh of ranks: DTensor's own, SUMMA spelled out, and the 1-D layouts that such a mesh is made of.

The mesh is (2, world / 2), so two ranks have a mesh with an axis of one rank.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from ..compat import all_gather
from .base import Built, Counts, Expected, Program, Setting

M, N, K, BATCH = 64, 48, 32, 4

Placements = tuple[Placement, ...]
Function = Callable[..., Tensor]
_BLOCKS: Placements = (Shard(0), Shard(1))  # rows over the first axis of the mesh, columns over the second
_BATCH_AND_COLUMNS: Placements = (Shard(0), Shard(2))


def _mesh(setting: Setting, axes: int) -> DeviceMesh:
    shape = (2, setting.world_size // 2) if axes == 2 else (setting.world_size,)
    return init_device_mesh(setting.device, shape)


def _distributed(
    setting: Setting, mesh: DeviceMesh, key: str, size: tuple[int, ...], placements: Placements
) -> DTensor:
    """A leaf of that size, of which each rank draws its own part; scaled like a weight."""
    local = list(size)
    for axis, placement in enumerate(placements):
        if isinstance(placement, Shard):
            local[placement.dim] //= mesh.size(axis)
    part = setting.values(key, *local, scale=size[-1] ** -0.5)
    return DTensor.from_local(part, mesh, placements, run_check=False).detach().requires_grad_()


def _program(
    setting: Setting,
    function: Function,
    a: tuple[int, ...],
    b: tuple[int, ...],
    placed: Placements,
    placed_b: Placements,
) -> Built:
    """`function` of two DTensors, its result as a local tensor: before torch 2.14 a DTensor result may have no backward."""
    mesh = _mesh(setting, len(placed))

    def call(x: DTensor, y: DTensor) -> Tensor:
        out = function(x, y)
        assert isinstance(out, DTensor)
        return out.to_local()

    return Built(call, (_distributed(setting, mesh, "a", a, placed), _distributed(setting, mesh, "b", b, placed_b)))


def _placed(x: Any, *placements: Placement) -> DTensor:
    result: DTensor = x.redistribute(placements=placements)
    return result


def _summa(a: DTensor, b: DTensor) -> Tensor:
    """The left operand gathered along its row of the mesh, the right one along its column."""
    return torch.mm(_placed(a, Shard(0), Replicate()), _placed(b, Replicate(), Shard(1)))


def _blocks(setting: Setting, function: Function) -> Built:
    return _program(setting, function, (M, K), (K, N), _BLOCKS, _BLOCKS)


def _linear(setting: Setting, function: Function) -> Built:
    return _program(setting, function, (BATCH, M // BATCH, K), (N, K), _BATCH_AND_COLUMNS, _BLOCKS)


def _line(setting: Setting, function: Function, dim: int, other_dim: int) -> Built:
    """Both operands sharded over all ranks, along these dims."""
    return _program(setting, function, (M, K), (K, N), (Shard(dim),), (Shard(other_dim),))


def _functional(setting: Setting, grad: bool, rows: bool = False) -> Built:
    """SUMMA in functional collectives; with `rows`, rows and columns of the result are gathered instead of what is contracted."""
    mesh = _mesh(setting, 2)
    down, across = mesh.get_group(0), mesh.get_group(1)
    m, k = (M // across.size(), K) if rows else (M, K // across.size())
    k_b, n = (K, N // down.size()) if rows else (K // down.size(), N)

    def call(a: Tensor, b: Tensor) -> Tensor:
        return all_gather(a, int(not rows), across) @ all_gather(b, int(rows), down)

    a, b = (setting.values(key, *size, scale=K**-0.5) for key, size in (("a", (m, k)), ("b", (k_b, n))))
    return Built(call, (a.requires_grad_(grad), b.requires_grad_(grad)))


_TWO_GATHERS: Counts = {"all_gather": (2, 2)}
_ONE_SIDE: Counts = {"all_gather": (1, 1)}
_SUMMA: Expected = {"forward": _TWO_GATHERS, "backward": {"reduce_scatter": (2, 2)}}
# The backward of DTensor's own rule has no collective: it gathers both operands once more in the forward, for later.
_OWN_RULE: Expected = {"forward": {"all_gather": (4, 2)}, "backward": {}}
_SCATTERED: Expected = {"forward": {"reduce_scatter": (1, 1)}, "backward": _ONE_SIDE}

_FAMILY = "2-D mesh"
_mm = torch.mm

PROGRAMS: tuple[Program, ...] = (
    Program("g1_2dmesh_S0S1_x_S0S1_default", _FAMILY, partial(_blocks, function=_mm), _OWN_RULE),
    Program("g1_2dmesh_SUMMA_explicit", _FAMILY, partial(_blocks, function=_summa), _SUMMA),
    Program(
        "g2_2dmesh_linear_w_S0S1_x_S0S2",
        _FAMILY,
        partial(_linear, function=F.linear),
        {"forward": {"all_gather": (2, 1)}, "backward": {}},
    ),
    Program(
        "g2_2dmesh_linear_outS0S2",
        _FAMILY,
        partial(_linear, function=lambda x, w: _placed(F.linear(x, w), *_BATCH_AND_COLUMNS)),
        {"forward": {"all_gather": (2, 1), "reduce_scatter": (1, 1)}, "backward": _ONE_SIDE},
    ),
    Program(
        "g3_1d_S0_x_S0",
        _FAMILY,
        partial(_line, function=_mm, dim=0, other_dim=0),
        {"forward": {"all_gather": (2, 1)}, "backward": {}},
    ),
    Program(
        "g3_1d_S1_x_S0_to_S0",
        _FAMILY,
        partial(_line, function=lambda a, b: _placed(_mm(a, b), Shard(0)), dim=1, other_dim=0),
        _SCATTERED,
    ),
    Program(
        "g3_1d_AG_x_S1",
        _FAMILY,
        partial(_line, function=lambda a, b: _mm(_placed(a, Replicate()), b), dim=0, other_dim=1),
        {"forward": _ONE_SIDE, "backward": {"reduce_scatter": (1, 1)}},
    ),
    Program(
        "g3_1d_S1gatherK_x_S1",
        _FAMILY,
        partial(_line, function=lambda a, b: _mm(_placed(a, Replicate()), b), dim=1, other_dim=1),
        {"forward": _ONE_SIDE, "backward": {"reduce_scatter": (1, 1)}},
    ),
    Program(
        "g3_1d_partial_to_S1_lastdim",
        _FAMILY,
        partial(_line, function=lambda a, b: _placed(_mm(a, b), Shard(1)), dim=1, other_dim=0),
        _SCATTERED,
    ),
    Program(
        "g3_1d_partial_to_R",
        _FAMILY,
        partial(_line, function=lambda a, b: _placed(_mm(a, b), Replicate()), dim=1, other_dim=0),
        {"forward": {"all_reduce": (1, 1)}, "backward": {}},
    ),
    Program(
        "g1_2dmesh_S0S1_x_S0S1_outS0S1",
        _FAMILY,
        partial(_blocks, function=lambda a, b: _placed(_mm(a, b), *_BLOCKS)),
        _OWN_RULE,
        extra=True,  # the graphs of g1_2dmesh_S0S1_x_S0S1_default
        numerics=(),
    ),
    Program(
        "g1_2dmesh_SUMMA_functional",
        _FAMILY,
        partial(_functional, grad=False),
        {"inference": _TWO_GATHERS},
        context="no_grad",
        extra=True,
    ),
    Program("g1_2dmesh_rows_x_columns", _FAMILY, partial(_functional, grad=True, rows=True), _SUMMA, extra=True),
)
