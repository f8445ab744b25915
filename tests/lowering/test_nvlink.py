"""What becomes of a GPU group that fails: records, watchdog, errors; on memory of the CPU, two ranks in one process."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.nvshmem.test_device import fake_heaps, grow
from tests.templates.nvlink.fake_gpu import Gpu
from tscompile.errors import HeapError, PeerError
from tscompile.lowering import nvlink
from tscompile.lowering.executors import Memo, ShmExecutor, make_executor
from tscompile.lowering.group import GroupState
from tscompile.lowering.nvlink import NvlinkExecutor
from tscompile.lowering.vote import Verdict
from tscompile.nvshmem.device import NvlinkHeap
from tscompile.nvshmem.heap import DowngradedError, HostChannel, site_hash
from tscompile.problem import Plan
from tscompile.templates.nvlink.channel import Site

RANKS = (4, 6)
PLAN = Plan("matmul_all_reduce", "forward-1/down", "nvlink", "bfloat16", coefficients=(1.0,))


class Rank:
    """One rank's heap, executor and group; the link's copy engine and streams are fakes."""

    def __init__(self, patch: pytest.MonkeyPatch, heap: NvlinkHeap, watched: list[NvlinkExecutor]) -> None:
        self.heap = heap
        self.gpu = Gpu(patch, heap.rank, heap.size)  # patches the module; the executor makes its own link
        self.executor = NvlinkExecutor()
        patch.setattr(nvlink, "kernel", self.gpu.driver.kernel)
        patch.setattr(nvlink, "_watchdog", type("Watch", (), {"watch": staticmethod(watched.append)}))
        self.executor.adopt(heap, RANKS, 2.5)
        assert self.executor.link is not None
        self.link = self.executor.link
        self.driver = self.gpu.driver
        self.group = GroupState(RANKS, RANKS[heap.rank], 2.5, self.executor)
        self.group.heap = heap

    def record(self, peer: int, expected: int = 9, seen: int = 8, site: str = PLAN.site) -> None:
        """As a kernel that gave up."""
        number = site_hash(site) & 0x7FFFFFFF
        self.link.record[:5] = torch.tensor([self.heap.rank + 1, peer, number, expected, seen])

    def enqueue(self) -> None:
        """A call that runs."""
        self.executor.run(Nothing(), None, PLAN, (), Memo(0))  # type: ignore[arg-type]
        self.driver.done = False

    def stopped(self) -> bool:
        """The abort words of all ranks have been set."""
        return [step["value"] for step in self.driver.issued] == [self.heap.rank + 1] * 2


class Nothing:
    """A template whose call does nothing."""

    def run(self, *_: object) -> list[torch.Tensor]:
        return []


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> list[Rank]:
    heaps, _ = fake_heaps(2)
    grow(heaps, [4096, 4096])
    watched: list[NvlinkExecutor] = []
    made = [Rank(monkeypatch, heap, watched) for heap in heaps]
    assert watched == [rank.executor for rank in made]
    return made


def test_a_record_says_who_waited_for_whom_where_and_how_long(ranks: list[Rank]) -> None:
    first = ranks[0]
    assert first.executor.failed() is None
    first.enqueue()
    first.record(peer=1)
    failure = first.executor.failed()
    assert failure is not None
    guilty, text = failure
    assert guilty == 1
    for words in ("rank 6 did not send within 2.5 s", "rank 4 waited", "site forward-1/down", "epoch 8 of 9", "NaN"):
        assert words in text
    assert "tilescale.timeout_s" in text


def test_a_record_of_a_rank_that_waited_for_its_own_copies(ranks: list[Rank]) -> None:
    ranks[0].enqueue()
    ranks[0].record(peer=0)
    failure = ranks[0].executor.failed()
    assert failure is not None and failure[0] == 0
    for words in (
        "copies of rank 4 to its peers did not end within 2.5 s",
        "site forward-1/down",
        "tilescale.timeout_s",
    ):
        assert words in failure[1]
    assert "waited for" not in failure[1]


def test_a_record_of_a_site_that_this_rank_does_not_know(ranks: list[Rank]) -> None:
    ranks[0].record(peer=1, site="another")
    failure = ranks[0].executor.failed()
    assert failure is not None and f"site number {site_hash('another') & 0x7FFFFFFF}" in failure[1]


def test_a_rank_that_was_told_to_give_up_names_the_one_at_fault(
    ranks: list[Rank], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = ranks
    monkeypatch.setattr(nvlink, "_HEARSAY_S", 0.5)
    first.link.record[:3] = torch.tensor([1, 1, 0])  # as a kernel that another rank has ended: no site
    news = threading.Timer(0.1, lambda: second.heap.abort(0, "rank 4 did not send"))
    news.start()
    assert first.executor.failed() == (0, "rank 4 did not send")
    news.join()


def test_a_rank_that_was_told_to_give_up_and_hears_no_more(ranks: list[Rank], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvlink, "_HEARSAY_S", 0.05)
    ranks[0].link.record[:3] = torch.tensor([1, 1, 0])
    failure = ranks[0].executor.failed()
    assert failure is not None and failure[0] == 1 and "rank 6 gave up waiting" in failure[1]


def test_the_next_launch_raises_what_a_kernel_recorded(ranks: list[Rank]) -> None:
    first, second = ranks
    first.enqueue()
    first.record(peer=1)
    for _ in range(2):  # and the one after that
        with pytest.raises(PeerError, match=r"rank 6 did not send within 2\.5 s") as caught:
            first.group.launch(PLAN, (), lambda: pytest.fail("the reference ran on one rank only"))
        assert caught.value.rank == 6
    with pytest.raises(PeerError, match=r"rank 6 did not send .* stay refused") as caught:
        second.group.launch(PLAN, (), lambda: pytest.fail("the reference ran on one rank only"))
    assert caught.value.rank == 6


def test_the_watchdog_spreads_a_failure_to_the_hosts_and_theirs_to_the_gpu(ranks: list[Rank]) -> None:
    first, second = ranks
    for rank in ranks:
        rank.enqueue()
        rank.executor.look()
    assert first.heap.aborted() is None and not first.stopped()
    first.record(peer=1)
    first.executor.look()
    record = second.heap.aborted()
    assert record is not None and (record.guilty, record.writer) == (1, 0) and "rank 6 did not send" in record.text
    assert first.stopped()
    second.executor.look()  # its own kernels wait for a rank that has given up
    assert second.stopped()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_the_watchdogs_thread_leaves_captures_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA ends a capture of any thread if another one looks at an event, unless that one has said that it may."""
    events: list[str] = []
    looked = threading.Event()

    class Executor:
        def look(self) -> None:
            events.append("look")
            looked.set()
            raise SystemExit  # ends the thread

    driver = type("Driver", (), {"relax_captures": lambda self: events.append("relax")})()
    monkeypatch.setattr(nvlink.stream, "load", lambda: driver)
    monkeypatch.setattr(nvlink, "_LOOK_EVERY_S", 0.0)
    executor, watchdog = Executor(), nvlink._Watchdog()
    watchdog.watch(executor)  # type: ignore[arg-type]
    assert looked.wait(10)
    assert watchdog._thread is not None
    watchdog._thread.join(10)
    assert events == ["relax", "look"]


def test_the_watchdog_leaves_an_idle_gpu_alone(ranks: list[Rank]) -> None:
    first, second = ranks
    second.enqueue()
    second.driver.done = True
    first.heap.abort(0, "somewhere else")
    second.executor.look()
    assert not second.stopped()


def test_a_dead_peer_matters_only_if_the_gpu_is_stuck(ranks: list[Rank], monkeypatch: pytest.MonkeyPatch) -> None:
    first = ranks[0]
    now = [100.0]
    monkeypatch.setattr("tscompile.templates.nvlink.channel.time.monotonic", lambda: now[0])
    first.enqueue()
    monkeypatch.setattr(first.heap, "alive", lambda peer: peer != 1)
    first.executor.look()
    now[0] += 1.0
    first.executor.look()
    assert first.heap.aborted() is None and not first.stopped()  # it may have done its part
    now[0] += 1.5
    first.executor.look()
    record = first.heap.aborted()
    assert record is not None and record.guilty == 1 and "the process of rank 6 has ended" in record.text
    assert first.stopped()


def test_a_program_that_only_replays_graphs_hears_of_a_failure(
    ranks: list[Rank], monkeypatch: pytest.MonkeyPatch
) -> None:
    rank = ranks[0]
    monkeypatch.setattr(nvlink, "_RAISE_AFTER_S", 0.05)
    rank.link._captured = 1
    ranks[1].heap.abort(1, "rank 6 ended")

    def watch() -> None:
        for _ in range(50):
            rank.executor.look()
            time.sleep(0.01)

    watchdog = threading.Thread(target=watch)
    watchdog.start()
    with pytest.raises(PeerError, match="rank 6 ended") as failure:
        for _ in range(1000):  # the program's loop
            time.sleep(0.01)
    watchdog.join()
    assert failure.value.rank == 6 and rank.executor.raised and rank.stopped()


def test_what_ends_a_group_ends_those_that_ops_join_it_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 4 in its row and in its column; a rank of the row fails, and the column hears of it, though its GPU had nothing to do."""
    watched: list[NvlinkExecutor] = []
    (row, row_peer), (column, column_peer) = (list(fake_heaps(2)[0]) for _ in range(2))
    for heaps in ((row, row_peer), (column, column_peer)):
        grow(list(heaps), [4096, 4096])
    one, other = (Rank(monkeypatch, heap, watched) for heap in (row, column))
    one.executor.join(other.executor)
    other.enqueue()
    one.executor.look()
    assert column_peer.aborted() is None
    row_peer.abort(1, "rank 6 ended")
    one.executor.look()
    record = column_peer.aborted()
    assert record is not None and record.guilty == 0 and "rank 6 ended" in record.text and "[4, 6]" in record.text
    other.executor.look()
    assert other.stopped()
    with pytest.raises(PeerError, match="rank 6 ended"):
        other.group.launch(PLAN, (), lambda: pytest.fail("the reference ran on one rank only"))


def test_an_op_of_two_groups_opens_a_call_of_each(ranks: list[Rank]) -> None:
    left, right = (rank.executor for rank in ranks)
    seen: list[Any] = []
    template = type("Noting", (), {"run": staticmethod(lambda calls, *_: seen.append(calls) or [])})()
    memo = Memo(0)
    for _ in range(2):
        left.run_joined(right, template, PLAN, (), memo)
    for calls in seen:
        assert [call.link for call in calls] == [left.link, right.link]
        assert calls[0].site is calls[1].site is memo.kept and not calls[0].captured
    assert [call.slot for call in seen[0]] != [call.slot for call in seen[1]]
    for rank in ranks:
        rank.record(peer=1)
        failure = rank.executor.failed()
        assert failure is not None and f"site {PLAN.site}" in failure[1]


def test_an_executor_without_a_link_has_nothing_to_say() -> None:
    executor = NvlinkExecutor()
    assert executor.failed() is None
    executor.look()
    executor.stop()
    with pytest.raises(KeyError):
        make_executor("abacus")
    assert make_executor("nvlink").runs_ahead and not make_executor("shm").runs_ahead


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a process that sees no GPU")
def test_a_heap_without_a_gpu_is_refused() -> None:
    with pytest.raises(HeapError, match="CUDA_VISIBLE_DEVICES"):
        NvlinkExecutor().make_heap(RANKS, 0, None)


def test_adopting_again(ranks: list[Rank]) -> None:
    first = ranks[0]
    first.executor.adopt(first.heap, RANKS, 1.0)
    assert first.executor.link is first.link and first.link.timeout_s == 1.0
    released: list[object] = []

    def note(memory: Any) -> Any:
        memory.release = lambda: released.append(memory)
        return memory

    def regrow(half: int) -> Any:
        note(first.heap.memory)
        grow([rank.heap for rank in ranks], [half] * 2)
        first.executor.adopt(first.heap, RANKS, 1.0)
        return first.executor.link

    one = first.heap.memory
    link = regrow(1 << 22)
    assert link is not first.link and released == [one]
    described = first.executor.describe(first.heap, RANKS)
    assert (described.ranks, described.provider) == (RANKS, first.heap.provider)
    assert described.bytes == first.heap.memory.nbytes and described.reason
    # A captured graph holds the addresses of its region, and what its link keeps, for ever: however often the memory grows.
    ranks[-1].gpu.torch.capturing = True  # its fake is the one that the module has
    link.open(Site(1))
    ranks[-1].gpu.torch.capturing = False
    two = first.heap.memory
    third = regrow(1 << 23)
    three = first.heap.memory
    assert regrow(1 << 24) is not third and released == [one, three]
    assert two not in released and first.executor._links[:-1] == [link]
    link.record[:5] = torch.tensor([1, 1, 77, 9, 8])  # a replay that gave up
    failure = first.executor.failed()
    assert failure is not None and "rank 6 did not send" in failure[1]
    ranks[-1].driver.issued.clear()
    first.executor.stop()
    assert len(ranks[-1].driver.issued) == 2 * len(RANKS)  # abort words of both regions that may have work


VERDICT = Verdict(False, "lone-compile", "rank 4 started a new graph alone")


def test_what_a_peer_has_enqueued_cannot_be_downgraded(ranks: list[Rank]) -> None:
    """The peer's kernels wait for this rank on the GPU, so the group ends with an error on all ranks."""
    first, second = ranks
    second.heap.enter(1, PLAN.site)
    with pytest.raises(PeerError, match="rank 4 started a new graph alone") as caught:
        first.group.refuse(VERDICT)
    assert caught.value.rank == 4
    assert first.group.error is caught.value and first.group.refusal is None
    assert first.heap.downgraded() is None
    assert first.stopped()
    with pytest.raises(PeerError, match="started a new graph alone"):
        second.group.launch(PLAN, (), lambda: pytest.fail("the reference ran on one rank only"))


def test_a_group_whose_peers_wait_is_downgraded(ranks: list[Rank]) -> None:
    first, second = ranks
    first.group.refuse(VERDICT)
    assert first.group.error is None and first.group.refusal == VERDICT
    assert not first.stopped()
    assert first.heap.downgraded() == second.heap.downgraded() == (1, f"{VERDICT.code}|{VERDICT.reason}")
    outputs, fused = second.group.launch(PLAN, (), lambda: [torch.ones(1)])
    assert not fused and outputs[0].item() == 1.0


def test_a_host_executor_is_downgraded_though_a_peer_is_ahead(ranks: list[Rank]) -> None:
    first, second = ranks
    group = GroupState(RANKS, RANKS[0], 2.5, ShmExecutor())
    group.heap = first.heap
    second.heap.enter(1, PLAN.site)
    group.refuse(VERDICT)
    assert group.error is None and first.heap.downgraded() is not None
    with pytest.raises(DowngradedError):  # the peer, which waits on its host, leaves its wait
        HostChannel(second.heap, RANKS, 1, PLAN.site, 2.5).check()


class Counting:
    """A template that notes each question about its memory."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.need = 64

    def scratch_bytes(self, plan: Plan, size: int, *args: Any) -> int:
        self.asked.append(args)
        return self.need


def test_launches_of_one_layout_share_a_memo(ranks: list[Rank]) -> None:
    group, template = ranks[0].group, Counting()
    a, b = torch.zeros(4, 8), torch.zeros(8, 8)
    first = group.memo(template, PLAN, ([a], [b], [None], 1))  # type: ignore[arg-type]
    again = group.memo(template, PLAN, ([a.clone()], [b + 1], [None], 1))  # type: ignore[arg-type]
    assert first is again and first.need == 64 and len(template.asked) == 1
    others = [
        ([torch.zeros(8, 8)], [b], [None], 1),
        ([a], [b.t()], [None], 1),
        ([a], [b], [torch.zeros(8)], 1),
        ([a], [b], [None], 2),
        ([a, b], [], [None], 1),
    ]
    memos = {id(group.memo(template, PLAN, args)) for args in others}  # type: ignore[arg-type]
    assert len(memos) == len(others) and id(first) not in memos
    assert group.memo(template, replace(PLAN, site="other"), ([a], [b], [None], 1)) is not first  # type: ignore[arg-type]


def test_layouts_of_symbolic_shapes_do_not_pile_up(ranks: list[Rank], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tscompile.lowering.group._MAX_LAYOUTS", 4)
    settled: list[bool] = []
    group, template = ranks[0].group, Counting()
    monkeypatch.setattr(group.executor, "settle", lambda: settled.append(True) or True)
    for rows in range(1, 9):
        group.memo(template, PLAN, (torch.zeros(rows, 8),))  # type: ignore[arg-type]
        assert len(group._memos[PLAN.site]) <= 4
    assert len(settled) == 2  # what is enqueued may still read their tables
    for number in range(100):  # a large model has many sites
        group.memo(template, replace(PLAN, site=f"s{number}"), (torch.zeros(1, 8),))  # type: ignore[arg-type]
    assert len(settled) == 2 and len(group._memos) == 101


def test_nothing_is_forgotten_while_a_graph_is_recorded(ranks: list[Rank], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tscompile.lowering.group._MAX_LAYOUTS", 2)
    rank, template = ranks[0], Counting()
    monkeypatch.setattr(nvlink, "torch", rank.gpu.torch)
    rank.gpu.torch.capturing = True
    for rows in range(1, 9):
        rank.group.memo(template, PLAN, (torch.zeros(rows, 8),))  # type: ignore[arg-type]
    assert len(rank.group._memos[PLAN.site]) == 8
    rank.gpu.torch.capturing = False
    rank.group.memo(template, PLAN, (torch.zeros(9, 8),))  # type: ignore[arg-type]
    assert len(rank.group._memos[PLAN.site]) == 8


def test_calls_of_sizes_that_no_kernel_serves_are_reported(ranks: list[Rank], monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[str] = []
    monkeypatch.setattr("tscompile.lowering.group.ledger.keep_site", lambda site, code, reason: kept.append(site))
    template = Counting()
    template.need = -1
    for _ in range(3):
        ranks[0].group.memo(template, PLAN, (torch.zeros(1, 8),))  # type: ignore[arg-type]
    assert kept == [PLAN.site]
