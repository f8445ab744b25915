"""Musters of ranks that are threads, or processes at a TCP store."""

from __future__ import annotations

import multiprocessing
import time

import pytest
import torch.distributed as dist

from tscompile.nvshmem.muster import Muster, Ruling, Worker, judge_alike, judge_ready

from .fakes import together


def attend(muster: Muster, statement: dict[str, object], bound_s: float = 10.0, delay_s: float = 0.0) -> Ruling:
    time.sleep(delay_s)
    muster.post(0, statement)
    return muster.settle(0, judge_alike(muster.size, {"host": "are on different hosts"}), bound_s)[0]


def musters(size: int) -> list[Muster]:
    store = dist.HashStore()
    return [Muster(store, rank, size) for rank in range(size)]


def test_all_ready() -> None:
    all_musters = musters(4)
    rulings = together([lambda m=m: attend(m, {"host": "a"}, delay_s=0.05 * m.rank) for m in all_musters])
    assert rulings == [Ruling(True)] * 4
    assert all_musters[2].ruling(0) == Ruling(True)
    assert all_musters[2].ruling(1) is None


def test_one_refuses() -> None:
    start = time.monotonic()
    rulings = together(
        [lambda m=m: attend(m, {"refusal": "no library"} if m.rank == 1 else {"host": "a"}) for m in musters(3)]
    )
    assert rulings == [Ruling(False, "rank 1: no library")] * 3
    assert time.monotonic() - start < 5


def test_statements_that_differ() -> None:
    rulings = together([lambda m=m: attend(m, {"host": "ab"[m.rank == 2]}) for m in musters(3)])
    assert rulings == [Ruling(False, "ranks 0 and 2 are on different hosts")] * 3


def test_one_is_late_and_adopts_what_stands() -> None:
    rulings = together(
        [lambda m=m: attend(m, {"host": "a"}, 0.2, delay_s=0.6 if m.rank == 2 else 0.0) for m in musters(3)]
    )
    assert rulings == [Ruling(False, "rank 2 did not answer within 0.2 s")] * 3


def test_a_ruling_is_made_once() -> None:
    first, second = musters(2)
    assert first.rule(0, Ruling(False, "mine")) == Ruling(False, "mine")
    assert second.rule(0, Ruling(True)) == Ruling(False, "mine")
    assert attend(second, {"host": "a"}) == Ruling(False, "mine")


@pytest.mark.parametrize("attempt", range(5))
def test_ranks_that_come_at_the_bound_agree(attempt: int) -> None:
    rulings = together(
        [lambda m=m: attend(m, {"host": "a"}, 0.1, delay_s=0.1 if m.rank == 0 else 0.0) for m in musters(4)]
    )
    assert len(set(rulings)) == 1, rulings


def test_judge_waits_for_all() -> None:
    judge = judge_ready(2)
    assert judge({}) is None
    assert judge({1: {}}) is None
    assert judge({0: {}, 1: {}}) == Ruling(True)


def _attend_in_process(port: int, rank: int, size: int, queue: multiprocessing.Queue) -> None:
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    queue.put((rank, attend(Muster(store, rank, size), {"host": "a"}, 20.0)))


@pytest.mark.slow
def test_processes_at_a_tcp_store() -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    ranks = [context.Process(target=_attend_in_process, args=(store.port, rank, 2, queue)) for rank in range(2)]
    for process in ranks:
        process.start()
    found = dict(queue.get(timeout=60) for _ in ranks)
    for process in ranks:
        process.join(30)
    assert found == {0: Ruling(True), 1: Ruling(True)}


def test_worker_keeps_the_error() -> None:
    def action() -> None:
        raise RuntimeError("no")

    worker = Worker("test", action)
    worker.join(5)
    assert isinstance(worker.error, RuntimeError)
