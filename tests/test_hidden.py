"""Communication outside of compiled graphs is named, once."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import tscompile
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


def list_exchange(x: Tensor) -> Tensor:
    return ListExchange.apply(x * 2).sum()


def list_form() -> tuple[list[str], str, list[str]]:
    """What was logged, and what the report and another explanation of the same function say."""
    records = Records()
    logging.getLogger("tscompile").addHandler(records)
    x = torch.randn(2, 4, 4, 8, requires_grad=True)
    torch.compile(list_exchange, backend=tilescale, options=OPTIONS)(x)
    return records.texts, str(tscompile.reports()), tscompile.explain(list_exchange, x).outside


def test_the_list_form_of_all_to_all_breaks_the_graph_and_is_named() -> None:
    """What broke, where, and what to write instead; once, whatever breaks there again."""
    lines = Path(__file__).read_text().splitlines()
    call = "dist.all_to_all(got, parts)"
    where = f"{__file__}:{lines.index(' ' * 8 + call) + 1}, `{call}`"
    for texts, report, explained in run_ranks(2, list_form, timeout_s=120):
        (told,) = (text for text in texts if "graph break" in text)
        assert where in told and "list-form all_to_all" in told and "dist.all_to_all_single(got, sent)" in told
        assert explained == [told]
        assert (
            "no collectives in the graphs" in report and " ".join(report.split()).count(f"not in a graph: {told}") == 1
        )


class AdvisedExchange(torch.autograd.Function):
    """The same exchange in the words of the advice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        sent = torch.stack(x.chunk(dist.get_world_size(), 2))
        got = torch.empty_like(sent)
        dist.all_to_all_single(got, sent)
        return torch.cat(list(got), 1)

    backward = ListExchange.backward


def advised() -> tuple[bool, list[tuple[str, list[str]]]]:
    """Whether it is what the list form computes, and the decisions about it."""
    x = torch.randn(2, 4, 4, 8, requires_grad=True)
    options = {**OPTIONS, "tilescale.fuse": "always"}
    got = torch.compile(lambda t: AdvisedExchange.apply(t * 2), backend=tilescale, fullgraph=True, options=options)(x)
    rows = [(row.decision, row.collectives) for row in tscompile.reports().rows]
    return torch.equal(got, ListExchange.apply(x * 2)), rows


def test_the_advice_about_the_list_form_is_captured_and_fused() -> None:
    for equal, rows in run_ranks(2, advised, timeout_s=120):
        assert equal
        assert [decision for decision, _ in rows] == ["fused"], rows
