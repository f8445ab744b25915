"""Attention by chunks of keys over NVLink, on the CPU: what is issued in which order, and what torch computes of what peers sent."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tscompile.nvshmem import stream
from tscompile.nvshmem.device import CONTROL_BYTES
from tscompile.problem import ChunkedAttention, Delivery, Keys, Plan, Scatter
from tscompile.templates import find_template
from tscompile.templates.key_chunks import as_returned, chunk_of
from tscompile.templates.nvlink import chunks
from tscompile.templates.nvlink.channel import ACK, MAIN, SIDE, Site

from .fake_gpu import SLOT_BYTES, Gpu, Launched

RANK, R = 1, 4
BATCH, HEADS, HELD, WIDTH = 2, 3, 8, 16
OP = "_scaled_dot_product_flash_attention_for_cpu"
ORDER = tuple((r,) for r in range(R))
NBYTES = BATCH * HEADS * HELD * WIDTH * 4


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    made = Gpu(monkeypatch, RANK, R)
    monkeypatch.setattr(chunks, "kernel", made.driver.kernel)
    return made


def rand(keys: int = HELD) -> Tensor:
    return torch.randn(BATCH, HEADS, keys, WIDTH)


def run(gpu: Gpu, site: Site, plan: Plan, *args: Any) -> list[Tensor]:
    template = find_template(plan.kind, "nvlink")
    assert template is not None
    assert 0 < template.scratch_bytes(plan, R, *args) <= SLOT_BYTES
    outputs: list[Tensor] = template.run(gpu.link.open(site), plan, *args)
    return outputs


def in_slot(gpu: Gpu, offset: int, epoch: int) -> Tensor:
    """What lies in this rank's slot, of one chunk of keys or values."""
    start = CONTROL_BYTES + (epoch & 1) * SLOT_BYTES + offset
    return gpu.memory.bytes[start : start + NBYTES].view(torch.float32).view(BATCH, HEADS, HELD, WIDTH)


def story(gpu: Gpu) -> list[str]:
    """What was issued, in words."""
    words = {stream.COPY: "copy", stream.WRITE: "flag", stream.LAUNCH: "launch"}
    return [words[step["kind"]] for step in gpu.driver.issued if step["kind"] in words]


def forward_plan() -> Plan:
    dims = ((1,), (2,), (3,), (4,))
    attention = ChunkedAttention(
        OP, False, None, ORDER, (0, 1), ((0, 2, 1, 3), (0, 2, 1)), keys=(Keys(0, dims), Keys(1, dims))
    )
    keys = tuple(Delivery(number, (1, 2, 0, 3, 4)) for number in (0, 1))
    return Plan("all_gather_attention", "g/site", "nvlink", "float32", deliveries=keys, joins=(1, 1), chunks=attention)


def test_forward(gpu: Gpu) -> None:
    site = Site(5)
    for epoch in (1, 2, 3):
        q, k, v = rand(), rand(R * HELD), rand(R * HELD)
        own = [chunk_of(ORDER, RANK, t).clone() for t in (k, v)]
        gpu.driver.issued.clear()
        gpu.driver.launched.clear()

        def arrive(launched: Launched, whole: tuple[Tensor, Tensor] = (k, v), epoch: int = epoch) -> None:
            """What a rank sends is there when it has been waited for, and not before."""
            if launched.args == ("tsk_wait_rank",):
                peer = launched.values["ack"]
                assert story(gpu).count("flag") == R - 1, "all sends are issued before the first wait"
                for number, tensor in enumerate(whole):
                    in_slot(gpu, (2 * peer + number) * NBYTES, epoch).copy_(chunk_of(ORDER, peer, tensor))

        gpu.driver.on_launch = arrive
        gpu.memory.bytes[CONTROL_BYTES:].fill_(0xFF)
        out, lse, keys, values = run(gpu, site, forward_plan(), q, own)
        expected = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
        torch.testing.assert_close(out.permute(0, 2, 1, 3), expected[0])
        torch.testing.assert_close(lse.permute(0, 2, 1), expected[1])
        assert torch.equal(keys.view_as(k), k) and torch.equal(values.view_as(v), v)
        waited = [each.values for each in gpu.driver.launched if each.args == ("tsk_wait_rank",)]
        assert [each["ack"] for each in waited] == [2, 3, 0] and {each["epoch"] for each in waited} == {epoch}
        assert {each["site"] for each in waited} == {5}
        copies = [step for step in gpu.driver.issued if step["kind"] == stream.COPY]
        assert [step["src"] for step in copies] == [t.data_ptr() for t in own] * 3
        base = [owner + CONTROL_BYTES + (epoch & 1) * SLOT_BYTES for owner in gpu.memory.bases]
        there = [base[peer] + (2 * RANK + number) * NBYTES for peer in (0, 3, 2) for number in (0, 1)]
        assert [step["dst"] for step in copies] == there and {step["bytes"] for step in copies} == {NBYTES}
        flags = [step for step in gpu.driver.issued if step["kind"] == stream.WRITE]
        assert {(step["stream"], step["value"]) for step in flags} == {(SIDE, epoch)}
        spoiled = [each.values for each in gpu.driver.launched if each.name == "spoil"]
        assert [(s["out"], s["bytes"]) for s in spoiled] == [(t.data_ptr(), t.nbytes) for t in (out, lse, keys, values)]
        assert gpu.driver.issued[-1]["kind"] == stream.RECORD and gpu.driver.issued[-1]["stream"] == MAIN


def backward_plan(reduce_op: Any = "sum") -> Plan:
    names = ("grad_out", "query", "key", "value", "out", "logsumexp")
    scatters = (Scatter((2,), 4, (0, 1, 2, 3)), Scatter((1,), 4, (2, 0, 1, 3)))
    layouts = ((0, 2, 1, 3),)
    attention = ChunkedAttention(f"{OP}_backward", False, None, ORDER, (0,), layouts, operands=names, scatters=scatters)
    return Plan("attention_reduce_scatter", "g/site", "nvlink", "float32", reduce_op=reduce_op, chunks=attention)


@pytest.mark.parametrize("reduce_op", ["sum", "avg"])
def test_backward(gpu: Gpu, reduce_op: str) -> None:
    site, sizes = Site(5), [BATCH, HEADS, HELD, WIDTH] * 2
    for epoch in (1, 2, 3):
        q, k, v, grad = rand(), rand(R * HELD), rand(R * HELD), rand()
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, False
        )
        others = {peer: (rand(), rand()) for peer in (0, 2, 3)}
        gpu.driver.issued.clear()
        gpu.driver.launched.clear()

        def arrive(launched: Launched, others: Any = others, epoch: int = epoch) -> None:
            if launched.args == ("tsk_wait_rank",):
                peer = launched.values["ack"]
                of_values, of_keys = others[peer]
                in_slot(gpu, 2 * peer * NBYTES, epoch).copy_(of_values)
                there = in_slot(gpu, (2 * peer + 1) * NBYTES, epoch)
                there.view(HELD, BATCH, HEADS, WIDTH).copy_(of_keys.permute(2, 0, 1, 3))

        gpu.driver.on_launch = arrive
        gpu.memory.bytes[CONTROL_BYTES:].fill_(0xFF)
        query, values, keys = run(gpu, site, backward_plan(reduce_op), [grad, q, k, v, out, lse], sizes)
        torch.testing.assert_close(query.permute(0, 2, 1, 3), dq)
        share = 1 / R if reduce_op == "avg" else 1.0
        want = [(chunk_of(ORDER, RANK, t) + sum(o[i] for o in others.values())) * share for i, t in enumerate((dv, dk))]
        torch.testing.assert_close(values, want[0])
        torch.testing.assert_close(keys.permute(1, 2, 0, 3), want[1])
        for peer in others:  # what is staged for it
            staged = in_slot(gpu, 2 * (R + peer) * NBYTES, epoch)
            torch.testing.assert_close(staged, chunk_of(ORDER, peer, dv))
        copies = [step for step in gpu.driver.issued if step["kind"] == stream.COPY]
        own = [owner + CONTROL_BYTES + (epoch & 1) * SLOT_BYTES for owner in gpu.memory.bases]
        assert [step["dst"] for step in copies] == [own[peer] + 2 * RANK * NBYTES for peer in (0, 3, 2)]
        assert [step["src"] for step in copies] == [own[RANK] + 2 * (R + peer) * NBYTES for peer in (0, 3, 2)]
        words = story(gpu)
        assert words.index("launch") > max(i for i, word in enumerate(words) if word == "flag")


def test_captured_calls_open_and_acknowledge(gpu: Gpu) -> None:
    gpu.torch.capturing = True
    site = Site(5)
    run(gpu, site, forward_plan(), rand(), [rand(), rand()])
    names = [each.args[0] if each.args else each.name for each in gpu.driver.launched]
    assert names == ["tsk_open", *["tsk_wait_rank"] * 3, *["spoil"] * 4, "tsk_acknowledge"]
    assert {each.values["epoch"] for each in gpu.driver.launched if each.args} == {0}
    assert gpu.driver.launched[-1].values["ack"] == ACK
    assert len(gpu.link.pinned) == 1
    kinds = [step["kind"] for step in gpu.driver.issued]
    assert stream.WRITE not in kinds, "flags are copied from the epoch's cell when the graph runs"


def test_the_logsumexp_of_every_form() -> None:
    lse = torch.randn(2, 3, 5)
    assert torch.equal(as_returned(lse, torch.zeros(2, 3, 5)), lse)
    assert torch.equal(as_returned(lse, torch.zeros(2, 3, 5, 1)), lse[..., None])  # cuDNN
    padded = as_returned(lse, torch.full((2, 3, 32), 7.0))  # memory-efficient
    assert torch.equal(padded[..., :5], lse) and (padded[..., 5:] == 7).all()
