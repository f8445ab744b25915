"""Programs with explicit collectives: functional ones, Megatron's autograd functions over in-place c10d, inference."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from ..compat import TORCH, all_gather
from .base import FFN_DIM, MODEL_DIM, Built, Counts, Expected, Program, Setting
from .transformer import RMSNorm

LENGTH = 8  # of a rank's part of the sequence
BATCH = 2

_PAIR: Counts = {"all_gather": (1, 1), "reduce_scatter": (1, 1)}
_MLP: Expected = {"forward": _PAIR, "backward": _PAIR}
_CHECKPOINTED: Expected = {"forward": _PAIR, "backward": {"all_gather": (2, 2), "reduce_scatter": (1, 1)}}


def _world() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group


def _gathered(x: torch.Tensor) -> torch.Tensor:
    out = x.new_empty((x.shape[0] * dist.get_world_size(), *x.shape[1:]))
    dist.all_gather_into_tensor(out, x.contiguous())
    return out


def _scattered(x: torch.Tensor) -> torch.Tensor:
    out = x.new_empty((x.shape[0] // dist.get_world_size(), *x.shape[1:]))
    dist.reduce_scatter_tensor(out, x.contiguous())
    return out


class _GatherFromSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return _gathered(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return _scattered(grad)


class _ScatterToSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return _scattered(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return _gathered(grad)


class _CopyToRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad


class _ReduceFromRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad


class _ColumnLinear(torch.autograd.Function):
    """Megatron's linear: keeps the shard of its input and gathers it again for the weight gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return torch.matmul(_gathered(x), weight.t())

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, weight = ctx.saved_tensors
        whole = _gathered(x)
        grad_x = _scattered(grad.matmul(weight))
        return grad_x, grad.flatten(0, 1).t().matmul(whole.flatten(0, 1))


class _Mlp(nn.Module):
    """The two weights of a gated MLP, split over the ranks along the hidden dim."""

    def __init__(self, setting: Setting, dim: int = 0) -> None:
        super().__init__()
        hidden = FFN_DIM // setting.world_size
        self.w1 = setting.parameter("w1", 2 * hidden, MODEL_DIM)
        self.w2 = setting.parameter("w2", MODEL_DIM, hidden, fan_in=FFN_DIM)
        self.dim = dim

    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = F.linear(x, self.w1).chunk(2, -1)
        return F.linear(F.silu(gate) * up, self.w2)


class _Functional(_Mlp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        whole = all_gather(x, self.dim, _world())
        return funcol.reduce_scatter_tensor(self.hidden(whole), "sum", self.dim, _world())


class _FunctionalSaved(_Functional):
    """Its backward reads what the reduce-scatter returned."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return torch.sin(y) * y


class _Sequence(_Mlp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _ScatterToSequence.apply(self.hidden(_GatherFromSequence.apply(x)))  # type: ignore[no-any-return]


class _AllReduced(_Mlp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _ReduceFromRanks.apply(self.hidden(_CopyToRanks.apply(x)))  # type: ignore[no-any-return]


class _Column(_Mlp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _ColumnLinear.apply(x, self.w1)  # type: ignore[no-any-return]


class _GatherOutput(_Mlp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return all_gather(F.linear(x, self.w1), 2, _world())


class _GatherList(_Mlp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x)
        return F.linear(torch.cat(parts, 0), self.w1)


class _InPlace(_Mlp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _scattered(self.hidden(_gathered(x)))


class _InPlaceReduce(_Mlp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.hidden(x)
        dist.all_reduce(y)
        return y


class _TwoConsumers(_Mlp):
    """The gathered tensor feeds a matmul and a mean, and the result joins the residual."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        whole = funcol.all_gather_tensor(x, 0, _world())
        half = self.w1.shape[0] // 2
        y = F.silu(F.linear(whole, self.w1[:half])) + whole.mean(-1, keepdim=True)
        return funcol.reduce_scatter_tensor(F.linear(y, self.w2), "sum", 0, _world()) + x


class _ReduceThenNorm(nn.Module):
    """Row-parallel linear, all-reduce, residual, norm, linear: the seam of an inference engine's layers."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.w1 = setting.parameter("w1", MODEL_DIM, MODEL_DIM)
        self.norm = RMSNorm(MODEL_DIM).to(device=setting.device)
        setting.fill(self.norm)
        self.w2 = setting.parameter("w2", MODEL_DIM, MODEL_DIM)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        residual = residual + funcol.all_reduce(F.linear(x, self.w1), "sum", _world())
        return F.linear(self.norm(residual), self.w2), residual


class _Einsum(nn.Module):
    """Projections written as einsums over a head dim, whose weights are three-dimensional."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        heads, head_dim = 4, MODEL_DIM // 4
        self.wq = setting.parameter("wq", MODEL_DIM, heads, head_dim, fan_in=MODEL_DIM)
        self.wo = setting.parameter("wo", heads, head_dim, MODEL_DIM, fan_in=MODEL_DIM)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = torch.einsum("bsd,dhk->bshk", all_gather(x, 1, _world()), self.wq)
        return funcol.reduce_scatter_tensor(torch.einsum("bshk,hkd->bsd", q, self.wo), "sum", 1, _world())


class _Checkpointed(nn.Module):
    """Activation checkpointing around a module: in full, or keeping what `policy` says."""

    def __init__(self, inner: nn.Module, selective: bool) -> None:
        super().__init__()
        self.inner = inner
        self.kwargs = {"context_fn": partial(create_selective_checkpoint_contexts, _keep)} if selective else {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.inner, x, use_reentrant=False, **self.kwargs)  # type: ignore[no-any-return]


_KEPT = (torch.ops.aten.mm.default, torch.ops._c10d_functional.reduce_scatter_tensor.default)


def _keep(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def _sequence_first(setting: Setting, module: type[_Mlp], grad: bool = True, dynamic: bool = False) -> Built:
    x = setting.input("x", LENGTH * setting.stretch, BATCH, MODEL_DIM, grad=grad)
    return Built(module(setting), (x,), ((0, 0),) if dynamic else ())


def _batch_first(setting: Setting, dynamic: tuple[int, ...] = (), batch: int = BATCH) -> Built:
    """`dynamic`: dims of the input that are marked, and that a stretch makes longer."""
    size = [batch, LENGTH, MODEL_DIM]
    for dim in dynamic:
        size[dim] *= setting.stretch
    return Built(_Functional(setting, dim=1), (setting.input("x", *size),), tuple((0, dim) for dim in dynamic))


def _matrix(setting: Setting) -> Built:
    return Built(_Functional(setting), (setting.input("x", LENGTH * BATCH, MODEL_DIM),))


def _replicated(setting: Setting, module: type[_Mlp], *size: int, grad: bool = True) -> Built:
    return Built(module(setting), (setting.input("x", *size, MODEL_DIM, sharded=False, grad=grad),))


def _reduce_then_norm(setting: Setting) -> Built:
    residual = setting.input("residual", 16, MODEL_DIM, sharded=False)
    return Built(_ReduceThenNorm(setting), (setting.input("x", 16, MODEL_DIM), residual))


def _einsum(setting: Setting) -> Built:
    return Built(_Einsum(setting), (setting.input("x", BATCH, LENGTH, MODEL_DIM),))


def _checkpointed(setting: Setting, module: type[_Mlp], selective: bool) -> Built:
    x = setting.input("x", LENGTH, BATCH, MODEL_DIM)
    return Built(_Checkpointed(module(setting), selective), (x,))


_SPELLINGS = "einsum, consumers, gather-output"
_AC = "AC / SAC"
_MEGATRON = "Megatron + inference"
_INFERENCE: Expected = {"inference": _PAIR}

PROGRAMS: tuple[Program, ...] = (
    Program("c1_funcol_sbh_dim0", _MEGATRON, partial(_sequence_first, module=_Functional), _MLP),
    Program("c1_funcol_bsh_dim1", _MEGATRON, _batch_first, _MLP),
    Program("c1_funcol_2d", _MEGATRON, _matrix, _MLP),
    Program("c2_autogradfn_inplace_c10d", _MEGATRON, partial(_sequence_first, module=_Sequence), _MLP),
    Program(
        "c4_megatron_linear_sync_bwd_regather",
        _MEGATRON,
        partial(_sequence_first, module=_Column),
        # AOTAutograd moves the second gather into the forward; before torch 2.14 it also sees that it repeats the first.
        {"forward": {"all_gather": (1 if TORCH < (2, 14) else 2, 1)}, "backward": {"reduce_scatter": (1, 1)}},
    ),
    Program(
        "c7_allgather_list_nograd",
        _MEGATRON,
        partial(_sequence_first, module=_GatherList, grad=False),
        {"inference": {"all_gather": (1, 1)}},
        context="no_grad",
    ),
    Program(
        "j_inplace_c10d_nograd",
        _MEGATRON,
        partial(_sequence_first, module=_InPlace, grad=False),
        _INFERENCE,
        context="no_grad",
    ),
    Program(
        "j_inplace_c10d_inference_mode",
        _MEGATRON,
        partial(_sequence_first, module=_InPlace, grad=False),
        _INFERENCE,
        context="inference_mode",
    ),
    Program(
        "j_funcol_nograd",
        _MEGATRON,
        partial(_sequence_first, module=_Functional, grad=False),
        _INFERENCE,
        context="no_grad",
    ),
    Program("i3_noac_savedRS_funcol", _MEGATRON, partial(_sequence_first, module=_FunctionalSaved), _MLP, extra=True),
    Program(
        "c3_autogradfn_allreduce",
        "TP no-SP",
        lambda setting: _replicated(setting, _AllReduced, LENGTH * setting.world_size, BATCH),
        {"forward": {"all_reduce": (1, 1)}, "backward": {"all_reduce": (1, 1)}},
    ),
    Program(
        "k_ar_residual_rmsnorm",
        "TP no-SP",
        _reduce_then_norm,
        {"forward": {"all_reduce": (1, 1)}, "backward": {"all_reduce": (1, 1)}},
    ),
    Program(
        "j_vllm_style_allreduce_nograd",
        "TP no-SP",
        lambda setting: _replicated(setting, _InPlaceReduce, 16, grad=False),
        {"inference": {"all_reduce": (1, 1)}},
        context="no_grad",
    ),
    Program(
        "i2_autocast_funcol",
        "autocast",
        partial(_sequence_first, module=_Functional),
        _MLP,
        context="autocast",
        numerics=(torch.float32,),  # autocast computes in bfloat16; its parameters are float32
    ),
    Program("i1_dyn_sbh_dim0", "dynamic", partial(_sequence_first, module=_Functional, dynamic=True), _MLP),
    Program("i1_dyn_bsh_dim1", "dynamic", partial(_batch_first, dynamic=(1,)), _MLP),
    Program("i1_dyn_bsh_both", "dynamic", partial(_batch_first, dynamic=(0, 1), batch=3), _MLP),
    Program("i3_ac_full_funcol", _AC, partial(_checkpointed, module=_Functional, selective=False), _CHECKPOINTED),
    Program(
        "i3_sac_saveRS_funcol",
        "AC / SAC",
        partial(_checkpointed, module=_FunctionalSaved, selective=True),
        _CHECKPOINTED,
    ),
    Program("k_multi_consumer", _SPELLINGS, partial(_sequence_first, module=_TwoConsumers), _MLP),
    Program("k_einsum_bsd_dhk", _SPELLINGS, _einsum, _MLP),
    Program(
        "c7_colpar_gather_output_lastdim",
        _SPELLINGS,
        lambda setting: _replicated(setting, _GatherOutput, LENGTH, BATCH),
        {"forward": {"all_gather": (1, 1)}, "backward": {"reduce_scatter": (1, 1)}},
    ),
)
