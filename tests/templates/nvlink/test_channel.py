"""Slots, epochs, addresses and steps of a GPU group's calls; on the CPU."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from tscompile.language import context
from tscompile.nvshmem import stream
from tscompile.nvshmem.device import CONTROL_BYTES, SLOTS
from tscompile.templates.nvlink.call import EPOCH, SOURCE, Call, Sent
from tscompile.templates.nvlink.channel import ACK, DATA_FLAGS, DONE, FLAGS, MAIN, SIDE, Record, Site
from tscompile.templates.nvlink.lasting import lasting, lasting_tables

from .fake_gpu import SLOT_BYTES, Gpu

SITE = Site(5)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    return Gpu(monkeypatch)


def test_eager_calls_alternate_between_two_slots_and_captured_ones_between_two_others(gpu: Gpu) -> None:
    eager = [gpu.link.open(SITE) for _ in range(4)]
    assert [call.slot for call in eager] == [1, 0, 1, 0]
    assert [call.epoch for call in eager] == [1, 2, 3, 4]
    assert not gpu.link.was_captured
    gpu.torch.capturing = True
    captured = [gpu.link.open(SITE) for _ in range(3)]
    assert [call.slot for call in captured] == [3, 2, 3]
    assert [call.epoch for call in captured] == [0, 0, 0]  # the device counts them
    gpu.torch.capturing = False
    assert gpu.link.open(SITE).epoch == 5 and gpu.link.was_captured
    # Eager and captured kernels may run at the same time: each kind claims from counters of its own, each slot has its landings.
    addresses = {
        call.slot: tuple(call.values()[name] for name in ("counters", "landed", "context")) for call in eager + captured
    }
    assert addresses[0][0] == addresses[1][0] != addresses[2][0] == addresses[3][0]
    assert len({landed for _, landed, _ in addresses.values()}) == len({at for *_, at in addresses.values()}) == SLOTS


def test_calls_of_a_group_follow_one_another_across_streams(gpu: Gpu) -> None:
    waits = []
    for current in (0, 0, 9, 0):  # 0 is the default stream
        gpu.torch.stream = current
        gpu.driver.issued.clear()
        gpu.link.open(SITE)
        waits.append([(step["kind"], step["stream"], step["event"]) for step in gpu.driver.issued])
    last = [(stream.AWAIT, MAIN, DONE)]  # recorded at the end of every eager call
    assert waits == [[], [], last, last]
    gpu.torch.capturing, gpu.torch.stream = True, 11
    gpu.driver.issued.clear()
    gpu.link.open(SITE)  # a graph orders its own nodes, and a captured stream cannot wait for one that is not
    assert gpu.driver.issued == []


def test_contexts_and_the_layout_of_the_control_block(gpu: Gpu) -> None:
    bases, own = gpu.memory.bases, gpu.memory.bases[1]
    cells, used = [], []
    for slot, words in enumerate(tensor.tolist() for tensor in gpu.link.contexts):
        assert words[context.RANK] == 1 and words[context.SIZE] == 4
        assert words[context.TIMEOUT_NS] == 5 * 10**9
        assert words[context.DATA : context.DATA + 4] == [base + CONTROL_BYTES + slot * SLOT_BYTES for base in bases]
        assert words[context.CONTROL : context.CONTROL + 4] == bases
        assert words[context.ABORT_WORD] == own + words[context.ABORT_OFFSET]
        assert words[context.RECORD] == gpu.link.record.data_ptr()
        flags = [word - base for word, base in zip(words[context.FLAGS : context.FLAGS + 4], bases, strict=True)]
        assert len(set(flags)) == 1
        used.append((flags[0], flags[0] + FLAGS * 4))
        cells.append(words[context.EPOCH_CELL] - own)
    # Eager calls bring their epoch: their word stays 0. The words of captured calls are written on the device.
    assert cells[0] == cells[1] and len(set(cells)) == 3
    abort = gpu.link.contexts[0][context.ABORT_OFFSET].item()
    used += [(cell, cell + 4) for cell in {*cells, abort}]
    used.sort()
    assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(used)) and used[0][0] >= 0
    assert used[-1][1] <= CONTROL_BYTES
    assert DATA_FLAGS <= ACK and ACK + context.MAX_RANKS <= FLAGS


def test_another_timeout_reaches_the_kernels(gpu: Gpu) -> None:
    gpu.link.set_timeout(0.5)
    assert {tensor[context.TIMEOUT_NS].item() for tensor in gpu.link.contexts} == {5 * 10**8}
    assert gpu.link.timeout_s == 0.5


def test_signals(gpu: Gpu) -> None:
    eager = gpu.link.open(SITE)
    step = eager.signal_step(3, 2)
    assert (step.kind, step.stream) == (stream.WRITE, SIDE)  # its value is patched in at every call
    assert step.dst == gpu.memory.bases[3] + (FLAGS + 2) * 4
    gpu.torch.capturing = True
    captured = gpu.link.open(SITE)
    step = captured.signal_step(0, 2)
    assert (step.kind, step.stream, step.bytes) == (stream.COPY, SIDE, 4)  # of what the word holds when the graph runs
    assert step.src == gpu.link.contexts[3][context.EPOCH_CELL].item()
    assert step.dst == gpu.memory.bases[0] + (3 * FLAGS + 2) * 4


def kinds(gpu: Gpu, call: Call) -> list[tuple[int, int]]:
    gpu.driver.issued.clear()
    gpu.link.issue(call.steps)
    return [(step["kind"], step["stream"]) for step in gpu.driver.issued]


def test_steps_around_a_call(gpu: Gpu) -> None:
    eager = gpu.link.open(SITE)
    copy, launch = (
        Sent(kind=stream.COPY, stream=SIDE),
        gpu.link.closer.step(gpu.link.closer.values(eager.values()), MAIN),
    )
    fork, join = [(stream.RECORD, MAIN), (stream.AWAIT, SIDE)], [(stream.RECORD, SIDE), (stream.AWAIT, MAIN)]
    alone = Call(eager, [launch], [], [])
    assert kinds(gpu, alone) == [(stream.LAUNCH, MAIN), (stream.RECORD, MAIN)]
    side = [copy, eager.signal_step(3, 2), copy, eager.signal_step(0, 2)]
    both = Call(eager, [Sent(kind=stream.COPY, stream=MAIN), launch], side, [])
    sends = [(stream.COPY, SIDE), (stream.WRITE, SIDE)] * 2
    main = [(stream.COPY, MAIN), (stream.LAUNCH, MAIN)]
    assert kinds(gpu, both) == [*fork, *sends, *main, *join, (stream.RECORD, MAIN)]
    for source, epoch in ((70, 5), (1 << 50, -3)):
        both.words[SOURCE], both.words[EPOCH] = source, epoch
        gpu.driver.issued.clear()
        gpu.link.issue(both.steps)
        assert [step["src"] for step in gpu.driver.issued if step["kind"] == stream.COPY] == [source] * 3
        assert [step["value"] for step in gpu.driver.issued if step["kind"] == stream.WRITE] == [epoch % 2**32] * 2


def test_a_captured_call_opens_first_and_leaves_the_watchdogs_event(gpu: Gpu) -> None:
    gpu.torch.capturing = True
    captured = gpu.link.open(Site(6))
    copy = Sent(kind=stream.COPY, stream=SIDE)
    call = Call(captured, [], [copy, captured.signal_step(3, 2)], [])
    call.words[SOURCE], call.words[EPOCH] = 70, 80
    gpu.link.issue(call.steps)
    cell = gpu.link.contexts[3][context.EPOCH_CELL].item()
    assert [step["src"] for step in gpu.driver.issued if step["kind"] == stream.COPY] == [70, cell]
    events = (stream.RECORD, stream.AWAIT)
    assert [step["kind"] for step in gpu.driver.issued] == [stream.LAUNCH, *events, stream.COPY, stream.COPY, *events]
    (opened,) = gpu.driver.launched
    assert opened.args == ("tsk_open",)
    words = gpu.link.context_addresses[3]
    assert opened.values == {"context": words, "epoch": 0, "site": 6, "ack": ACK}


def test_records_idleness_and_the_abort_word(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    link = gpu.link
    gpu.driver.done = False
    assert link.is_idle()  # nothing was enqueued yet
    link.open(SITE)
    assert not link.is_idle() and not link.has_record()
    now = [10.0]
    monkeypatch.setattr("tscompile.templates.nvlink.channel.time.monotonic", lambda: now[0])
    assert not link.is_stuck()
    now[0] += 1.5
    link.open(SITE)  # another call: it does go on
    assert not link.is_stuck()
    now[0] += 1.5
    assert not link.is_stuck()
    now[0] += 1.5
    assert link.is_stuck()
    link.record[:5] = torch.tensor([3, 0, 77, 9, 8])
    assert link.has_record() and link.read_record() == Record(2, 0, 77, 9, 8)
    link.stop()
    offset = link.contexts[0][context.ABORT_OFFSET].item()
    assert [step["dst"] for step in gpu.driver.issued] == [base + offset for base in gpu.memory.bases]
    assert {(step["kind"], step["value"]) for step in gpu.driver.issued} == {(stream.WRITE, 2)}


def test_epochs_go_on_where_an_int32_ends(gpu: Gpu) -> None:
    """Kernels compare epochs modulo 2**32: one that fell back to 0 would find all its flags set already."""
    gpu.link._eager = 2**31 - 3
    calls = [gpu.link.open(SITE) for _ in range(4)]
    assert [call.epoch for call in calls] == [2**31 - 2, 2**31 - 1, -(2**31), 1 - 2**31]
    for call in calls:  # a flag's value has 32 bits
        step = call.signal_step(0, 2)
        step.value = call.epoch
        assert step.value == call.epoch % 2**32
    assert [call.slot for call in calls] == [0, 1, 0, 1]
    gpu.link._eager = 2**32 - 2
    assert [gpu.link.open(SITE).epoch for _ in range(3)] == [-1, 0, 1]


def test_lasting_tensors_come_from_another_thread() -> None:
    """CUDA graph trees claim what the calling thread allocates; and its modes must not stick to what outlives them."""
    makers: list[str] = []

    def make() -> torch.Tensor:
        makers.append(threading.current_thread().name)
        return torch.zeros(3)

    with torch.inference_mode(), FakeTensorMode():
        made = lasting(make, torch.device("cpu"))
        (table,) = lasting_tables([[]], torch.device("cpu"))
    assert makers != [threading.current_thread().name]
    assert not made.is_inference() and not isinstance(made, FakeTensor)
    assert table.shape == (0, 8) and table.dtype == torch.int32
    with pytest.raises(ZeroDivisionError):
        lasting(lambda: 1 // 0, torch.device("cpu"))
