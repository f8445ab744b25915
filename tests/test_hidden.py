"""Communication outside of compiled graphs is named, once."""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.compat import TORCH
from tests.programs import EVERY_PROGRAM, Setting
from tscompile.backend import tilescale
from tscompile.testing import run_ranks

OPTIONS = {"tilescale.inner": "eager"}


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.linear(x)) + x


class Records(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def train_wrapped(wrapper: str) -> list[str]:
    """Train two compiled layers under a data-parallel wrapper; what was logged."""
    records = Records()
    logging.getLogger("tscompile").addHandler(records)
    model: nn.Module = nn.Sequential(Layer(), Layer())
    if wrapper == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in model.children():
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    else:
        model = nn.parallel.DistributedDataParallel(model)
    compiled = torch.compile(model, backend=tilescale, options=OPTIONS)
    for _ in range(2):
        compiled(torch.randn(4, 16)).sum().backward()
    return records.texts


def test_fsdp2_is_named_once() -> None:
    for texts in run_ranks(2, train_wrapped, "fsdp2", timeout_s=120):
        assert len([t for t in texts if "fully_shard" in t]) == 1, texts


def test_ddp_is_named_once() -> None:
    for texts in run_ranks(2, train_wrapped, "ddp", timeout_s=120):
        assert len([t for t in texts if "DistributedDataParallel" in t]) == 1, texts


def megatron_style() -> list[str]:
    records = Records()
    logging.getLogger("tscompile").addHandler(records)
    program = EVERY_PROGRAM["c2_autogradfn_inplace_c10d"]
    built = program.build(Setting(dist.get_world_size(), dist.get_rank(), torch.float32))
    torch.compile(built.call, backend=tilescale, options=OPTIONS)(*built.args)
    return records.texts


def test_the_wrong_gradients_of_torch_2_11_are_told_there_and_only_there() -> None:
    for texts in run_ranks(2, megatron_style, timeout_s=120):
        assert len([t for t in texts if "wrong gradients" in t]) == (1 if TORCH < (2, 12) else 0), texts


class ListExchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [part.contiguous() for part in x.chunk(dist.get_world_size(), 2)]
        got = [torch.empty_like(part) for part in parts]
        dist.all_to_all(got, parts)
        return torch.cat(got, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.chunk(dist.get_world_size(), 1)[0].repeat(1, 1, dist.get_world_size(), 1)  # never asked for


def list_form() -> list[str]:
    records = Records()
    logging.getLogger("tscompile").addHandler(records)

    def fn(x: Tensor) -> Tensor:
        return ListExchange.apply(x * 2).sum()

    torch.compile(fn, backend=tilescale, options=OPTIONS)(torch.randn(2, 4, 4, 8, requires_grad=True))
    return records.texts


def test_the_list_form_of_all_to_all_breaks_the_graph_and_is_named() -> None:
    for texts in run_ranks(2, list_form, timeout_s=120):
        assert any("graph break on communication" in t and "list-form all_to_all" in t for t in texts), texts
