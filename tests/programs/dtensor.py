"""Programs written with DTensor: tensor and sequence parallelism in its variants, and SimpleFSDP."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.utils import parametrize

from .base import MODEL_DIM, VOCAB, Built, Counts, Expected, Program, Setting
from .transformer import Block, Llama, parallelize_block, parallelize_llama

LENGTH = 32  # of the whole sequence

_SEQUENCE_PARALLEL: Counts = {"all_gather": (2, 2), "reduce_scatter": (2, 2)}
_SP_BLOCK: Expected = {"forward": _SEQUENCE_PARALLEL, "backward": _SEQUENCE_PARALLEL}
_NO_SP_BLOCK: Expected = {"forward": {"all_reduce": (2, 2)}, "backward": {"all_reduce": (5, 5)}}
# Nine parameters, two of which are norm weights that meet no matmul.
_FSDP_BLOCK: Expected = {"forward": {"all_gather": (9, 7)}, "backward": {"reduce_scatter": (9, 7)}}


def _mesh(setting: Setting) -> DeviceMesh:
    return init_device_mesh(setting.device, (setting.world_size,))


def _sp_block(
    setting: Setting,
    batch: int,
    fused: bool = False,
    bias: bool = False,
    grad: bool = True,
    dynamic: bool = False,
) -> Built:
    block = Block(fused, bias)
    setting.fill(block)
    parallelize_block(block, _mesh(setting))
    x = setting.input("x", batch, LENGTH // setting.world_size * setting.stretch, MODEL_DIM, grad=grad)
    return Built(block, (x,), ((0, 1),) if dynamic else ())


def _no_sp_block(setting: Setting, bias: bool) -> Built:
    block = Block(bias=bias)
    setting.fill(block)
    parallelize_block(block, _mesh(setting), sequence_parallel=False)
    return Built(block, (setting.input("x", 2, LENGTH, MODEL_DIM, sharded=False),))


def _llama(setting: Setting) -> Built:
    model = Llama()
    setting.fill(model)
    parallelize_llama(model, _mesh(setting))
    generator = torch.Generator().manual_seed(7)
    return Built(model, (torch.randint(0, VOCAB, (2, LENGTH), generator=generator).to(setting.device),))


class _Gather(nn.Module):
    """The parametrisation of SimpleFSDP: a sharded parameter is gathered where it is read, its gradient averaged."""

    def __init__(self, compute: torch.dtype | None, reduce: torch.dtype | None) -> None:
        super().__init__()
        self.compute = compute
        self.reduce = reduce

    def forward(self, parameter: DTensor) -> torch.Tensor:
        whole = parameter.redistribute(
            placements=(Replicate(),), forward_dtype=self.compute, backward_dtype=self.reduce
        )
        return whole.to_local(grad_placements=(Partial(reduce_op="avg"),))


def _simple_fsdp(setting: Setting, mixed: bool) -> Built:
    """Every parameter of a block sharded along dim 0; `mixed` computes in bfloat16 and reduces gradients in float32."""
    block = Block()
    setting.fill(block)
    mesh = _mesh(setting)
    compute = setting.explicit(torch.bfloat16) if mixed else None
    reduce = setting.explicit(torch.float32) if mixed else None
    for module in list(block.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            module.register_parameter(name, nn.Parameter(distribute_tensor(parameter.data, mesh, [Shard(0)])))
            # unsafe: the check of the first call would run a collective outside of the compiled region
            parametrize.register_parametrization(module, name, _Gather(compute, reduce), unsafe=True)
    x = setting.values("x", 2, 16, MODEL_DIM)
    if compute is not None:
        # Rounded in the truth as well, so that both see the same input.
        x = x.to(torch.bfloat16).to(compute)
    return Built(block, (x.requires_grad_(),))


_BOTH = (torch.float32, torch.bfloat16)

PROGRAMS: tuple[Program, ...] = (
    Program("a_tp_sp_sepqkv_B2_w4", "TP+SP B>=2", partial(_sp_block, batch=2), _SP_BLOCK),
    Program("a_tp_sp_fusedqkv_B2_w4", "TP+SP B>=2", partial(_sp_block, batch=2, fused=True), _SP_BLOCK),
    Program(
        "i2_bf16_dtensor_sp",
        "TP+SP B>=2",
        partial(_sp_block, batch=2),
        _SP_BLOCK,
        dtype=torch.bfloat16,
        numerics=(),  # the values of a_tp_sp_sepqkv_B2_w4 in bfloat16
    ),
    Program("a_tp_sp_sepqkv_B1_w4", "TP+SP B=1", partial(_sp_block, batch=1), _SP_BLOCK),
    Program(
        "i1_dyn_dtensor_sp_B1",
        "TP+SP B=1",
        partial(_sp_block, batch=1, dynamic=True),
        _SP_BLOCK,
    ),
    Program("a_tp_sp_bias_B2_w4", "TP+SP bias", partial(_sp_block, batch=2, bias=True), _SP_BLOCK),
    Program(
        "i2_autocast_dtensor_sp",
        "autocast",
        partial(_sp_block, batch=2),
        _SP_BLOCK,
        context="autocast",
        numerics=(torch.float32,),  # autocast computes in bfloat16; its parameters are float32
    ),
    Program(
        "a_llama_full_B2_w4",
        "llama",
        _llama,
        {
            # Not addressable: the embedding's reduce-scatter and the gather of its gradient.
            "forward": {"all_gather": (6, 6), "reduce_scatter": (5, 4)},
            "backward": {"all_gather": (5, 4), "reduce_scatter": (5, 5)},
        },
    ),
    Program("b_tp_nosp_B2_w4", "TP no-SP", partial(_no_sp_block, bias=False), _NO_SP_BLOCK),
    Program("b_tp_nosp_bias_B2_w4", "TP no-SP", partial(_no_sp_block, bias=True), _NO_SP_BLOCK),
    Program(
        "j_dtensor_sp_nograd",
        "Megatron + inference",
        partial(_sp_block, batch=2, grad=False),
        {"inference": _SEQUENCE_PARALLEL},
        context="no_grad",
    ),
    Program(
        "j_dtensor_sp_inference_mode",
        "Megatron + inference",
        partial(_sp_block, batch=2, grad=False),
        {"inference": _SEQUENCE_PARALLEL},
        context="inference_mode",
        extra=True,
        numerics=(torch.float32,),  # the computation of j_dtensor_sp_nograd on inference tensors
    ),
    Program("i1_dyn_dtensor_sp_B2", "dynamic", partial(_sp_block, batch=2, dynamic=True), _SP_BLOCK),
    Program("e3_simplefsdp_fp32", "SimpleFSDP", partial(_simple_fsdp, mixed=False), _FSDP_BLOCK, numerics=_BOTH),
    Program(
        "e3_simplefsdp_bf16",
        "SimpleFSDP",
        partial(_simple_fsdp, mixed=True),
        _FSDP_BLOCK,
        numerics=(torch.float32,),  # float32 parameters are what it mixes with bfloat16
    ),
)
