"""What an exchange over NVLink takes, and what it issues to the driver; on the CPU (fake_gpu.py)."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.exchange_cases import ExchangeCase, ulysses
from tscompile.nvshmem import stream
from tscompile.problem import Delivery, FusionProblem, Plan
from tscompile.templates import find_template
from tscompile.templates.nvlink import exchange
from tscompile.templates.nvlink.channel import ACK, Site
from tscompile.templates.nvlink.exchange import aligned_inputs
from tscompile.templates.nvlink.kernels.config import MAX_LEGS, SMS, WORD_BYTES
from tscompile.templates.nvlink.legs import batches_of

from .fake_gpu import Gpu, Launched

RANKS, TOKENS, HEADS, DIM = 4, 6, 2, 16
DELIVERY = Delivery(0, (1, 0, 2))


def template() -> Any:
    found = find_template("all_to_all_permute", "nvlink")
    assert found is not None
    return found


def random(*shape: int) -> Tensor:
    return torch.randn(*shape).to(torch.bfloat16)


def case(name: str) -> ExchangeCase:
    return next(each for each in ulysses(RANKS, 1, TOKENS, HEADS, DIM) if each.name == name)


# ---- what is taken ---------------------------------------------------------------------------------------------------------------


def plan(*deliveries: Delivery) -> Plan:
    return Plan(
        "all_to_all_permute", "g/site", "nvlink", "bfloat16", deliveries=deliveries, joins=(1,) * len(deliveries)
    )


@pytest.mark.parametrize(
    ("changes", "deliveries", "reason"),
    [
        ({}, (DELIVERY,), None),
        ({"dtype": "float32"}, (DELIVERY,), None),  # nothing is computed
        ({"dtype": "int64"}, (DELIVERY,), None),
        ({"group_size": 2}, (DELIVERY,), None),
        ({"group_size": 8}, (DELIVERY,), None),
        ({"capability": (9, 0)}, (DELIVERY,), None),
        ({}, tuple(Delivery(i, (0, 1, 2)) for i in range(MAX_LEGS)), None),
        ({}, (Delivery(0, (0, 3), ((1, 1), (2, 0))),), None),
        ({"device": "cpu"}, (DELIVERY,), "NVLink serves CUDA tensors, these are on cpu"),
        ({"group_size": 1}, (DELIVERY,), "2 to 8 ranks, the group has 1"),
        ({"group_size": 9}, (DELIVERY,), "2 to 8 ranks, the group has 9"),
        ({"intra_host": False}, (DELIVERY,), "several hosts"),
        ({"capability": (8, 0)}, (DELIVERY,), r"this GPU has 8\.0"),
        ({}, tuple(Delivery(i, (0, 1, 2)) for i in range(9)), "9 exchanges go to 9 places, the kernel takes 8 and 8"),
        ({}, (DELIVERY,) * 9, "1 exchanges go to 9 places, the kernel takes 8 and 8"),
        ({}, (DELIVERY, Delivery(0, (0, 2, 1))), "transposed in its innermost dim"),
        ({}, (Delivery(0, (0, 1), ((2, 3),)),), "transposed in its innermost dim"),
    ],
)
def test_problems(changes: dict[str, Any], deliveries: tuple[Delivery, ...], reason: str | None) -> None:
    facts: dict[str, Any] = {"group_size": RANKS, "intra_host": True, "device": "cuda", "dtype": "bfloat16"}
    problem = FusionProblem(**{"kind": "all_to_all_permute", "comm_bytes": 1 << 20, "gemms": (), **facts, **changes})
    found = template().supports(problem, plan(*deliveries))
    assert (found is None) == (reason is None) and re.search(reason or "", found or ""), found


@pytest.mark.parametrize(
    ("shape", "delivery", "words"),
    [
        ((RANKS, 5, 8), DELIVERY, 5),
        ((RANKS, 3, 256, 64), Delivery(0, (2, 1, 0, 3)), 3 * 256 * 8),
        ((RANKS, 5, 4), Delivery(0, (0, 1, 2)), None),  # 40 bytes to a rank
        ((RANKS, 4, 4), Delivery(0, (0, 1, 2)), 2),  # rows of half a word that follow one another on both sides
        ((RANKS, 4, 4), DELIVERY, None),
        ((RANKS, 0, 8), DELIVERY, None),
        ((RANKS, 3, 2, 2, 2, 2, 8), Delivery(0, (5, 4, 3, 2, 1, 0, 6)), None),  # six dims of which none are one
    ],
)
def test_a_slot(shape: tuple[int, ...], delivery: Delivery, words: int | None) -> None:
    x = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    need = template().scratch_bytes(plan(delivery), RANKS, [x])
    assert need == (-1 if words is None else batches_of([words], RANKS).scratch_bytes(RANKS))
    assert words is None or need >= (RANKS - 1) * words * WORD_BYTES


def test_a_slot_is_as_large_whatever_the_strides() -> None:
    x = torch.empty(RANKS, 8, 16, dtype=torch.bfloat16, device="meta")
    needs = {
        template().scratch_bytes(plan(DELIVERY), RANKS, [each])
        for each in (
            x,
            x.permute(0, 2, 1).contiguous().permute(0, 2, 1),
            x.new_empty(8, RANKS, 20)[..., 1:17].transpose(0, 1),
        )
    }
    assert len(needs) == 1 and needs.pop() > 0


@pytest.mark.parametrize("copied", [False, True])
def test_inputs_begin_with_a_word_and_lie_as_the_table_says(copied: bool) -> None:
    """The kernel reads a copy by the strides of what is copied, unless it reads all inputs as contiguous ones."""
    memory = random(4096)
    dense = memory[:512].view(8, 4, 16).transpose(0, 1)
    for x in (
        memory[8:520].view(4, 8, 16),
        dense,
        memory[1:513].view(4, 8, 16),
        memory[1:513].view(8, 4, 16).transpose(0, 1),
        memory[3 : 3 + 768].view(8, 4, 24)[..., :16].transpose(0, 1),
        memory[5:21].expand(4, 8, 16),
        memory[7:].as_strided((2, 3, 16), (0, 8, 1), 7),
    ):
        (found,) = aligned_inputs([x], copied)
        assert found.data_ptr() % WORD_BYTES == 0 and torch.equal(found, x)
        assert found.is_contiguous() if copied else found.stride() == x.stride()
        as_it_lies = x.data_ptr() % WORD_BYTES == 0 and (x.is_contiguous() or not copied)
        assert (found.data_ptr() == x.data_ptr()) == as_it_lies


# ---- what is issued --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    made = Gpu(monkeypatch)
    monkeypatch.setattr(exchange, "kernel", made.driver.kernel)
    return made


def run(gpu: Gpu, site: Site, asked: Plan, inputs: list[Tensor]) -> list[Tensor]:
    outputs: list[Tensor] = template().run(gpu.link.open(site), asked, inputs)
    return outputs


def fused(gpu: Gpu) -> list[Launched]:
    return [launched for launched in gpu.driver.launched if launched.name != "service"]


def test_an_exchange_is_one_launch(gpu: Gpu) -> None:
    """Inputs as they lie, in any strides; in every call its own epoch, inputs and outputs."""
    three, site, kept = case("q, k, v"), Site(5), []
    for epoch in range(1, 5):
        inputs = three.inputs(lambda shape: random(*shape))
        gpu.driver.issued.clear()
        outputs = run(gpu, site, three.plan("nvlink", torch.bfloat16), inputs)
        kept.append((inputs, outputs))  # no address is used twice
        assert [step["kind"] for step in gpu.driver.issued] == [stream.LAUNCH, stream.RECORD]
        assert [tuple(output.shape) for output in outputs] == [(1, HEADS, RANKS, TOKENS, DIM)] * 3
        launched = fused(gpu)[-1]
        assert (launched.name, launched.args) == ("exchange", (SMS,))
        words = TOKENS * HEADS * DIM * 2 // WORD_BYTES
        cut = batches_of([words] * 3, RANKS)
        known = {"legs": 3, "batches": cut.count, "batch_words": cut.words, "first_flag": 0, "offset": 0, "copied": 0}
        known |= {"epoch": epoch, "site": 5, "ack": ACK, "context": gpu.link.context_addresses[epoch & 1]}
        known |= {"counters": gpu.link.counter_addresses[0]}
        known |= {f"X{i}": x.data_ptr() for i, x in enumerate(inputs)}
        known |= {f"Y{i}": y.data_ptr() for i, y in enumerate(outputs)}
        known |= {f"{name}{i}": 0 for name in "XY" for i in range(3, MAX_LEGS)}
        assert launched.values.items() >= known.items() and launched.values.keys() == known.keys() | {"table"}
    assert len({launched.values["table"] for launched in fused(gpu)}) == 1 and gpu.link.pinned == []


def test_a_captured_exchange_opens_and_records_nothing(gpu: Gpu) -> None:
    back, site = case("back"), Site(5)
    inputs = back.inputs(lambda shape: random(*shape))
    run(gpu, site, back.plan("nvlink", torch.bfloat16), inputs)
    gpu.driver.issued.clear()
    gpu.driver.launched.clear()
    gpu.torch.capturing = True
    for _ in range(3):
        run(gpu, site, back.plan("nvlink", torch.bfloat16), inputs)
    assert [step["kind"] for step in gpu.driver.issued] == [stream.LAUNCH] * 6
    names = [launched.args[0] if launched.name == "service" else launched.name for launched in gpu.driver.launched]
    assert names == ["tsk_open", "exchange"] * 3
    contexts = [launched.values["context"] for launched in gpu.driver.launched]
    assert contexts == [gpu.link.context_addresses[slot] for slot in (3, 3, 2, 2, 3, 3)]
    assert {launched.values["epoch"] for launched in gpu.driver.launched} == {0}
    assert {launched.values["counters"] for launched in fused(gpu)} == {gpu.link.counter_addresses[1]}
    # Its table stays for as long as the graph may be replayed.
    assert gpu.link.pinned == [site.recipe] * 2


def test_one_input_may_go_to_several_places(gpu: Gpu) -> None:
    """q, k and v of one projection: a leg for each, since no output takes all of it, each from its place in the input."""
    fused_qkv, site = case("fused, as its reader wants each"), Site(5)
    (x,) = fused_qkv.inputs(lambda shape: random(*shape))
    outputs = run(gpu, site, fused_qkv.plan("nvlink", torch.bfloat16), [x])
    (launched,) = fused(gpu)
    assert launched.values["legs"] == 3
    starts = [launched.values[f"X{i}"] - x.data_ptr() for i in range(3)]
    assert starts == [2 * i * RANKS * HEADS * DIM for i in range(3)]
    assert [launched.values[f"Y{i}"] for i in range(3)] == [output.data_ptr() for output in outputs]


def test_inputs_that_the_kernel_cannot_read_are_copied(gpu: Gpu) -> None:
    memory = random(4096)
    odd = memory[1 : 1 + RANKS * 8 * 16].view(RANKS, 8, 16)  # it begins within a word
    gaps = memory[: RANKS * 8 * 20].view(RANKS, 8, 20)[..., :16]  # rows begin within words
    turned = memory[: RANKS * 8 * 16].view(RANKS, 16, 8).transpose(1, 2)  # the innermost dim is not
    for x in (odd, gaps, turned):
        run(gpu, Site(5), plan(DELIVERY), [x])
        address = fused(gpu)[-1].values["X0"]
        assert address % WORD_BYTES == 0
        assert not memory.data_ptr() <= address < memory.data_ptr() + memory.nbytes
    spaced = memory[: RANKS * 8 * 24].view(8, RANKS, 24)[..., 8:].transpose(0, 1)  # words, in any strides
    run(gpu, Site(5), plan(DELIVERY), [spaced])
    assert fused(gpu)[-1].values["X0"] == spaced.data_ptr()


def test_a_new_region_gets_new_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    site, first = Site(5), Gpu(monkeypatch)
    for link in (first, Gpu(monkeypatch)):
        monkeypatch.setattr(exchange, "kernel", link.driver.kernel)
        run(link, site, plan(DELIVERY), [random(RANKS, 8, 16)])
        assert site.recipe.link is link.link
        assert fused(link)[-1].values["context"] == link.link.context_addresses[1]
