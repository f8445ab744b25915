"""Two processes that share memory: push, signal and wait across them, with a peer that is late and one that never comes."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

import pytest
import torch

import tscompile.language as tl

from . import kernels
from .world import World

SIZE, EPOCHS, DELAY_S, TIMEOUT_S = 1000, 20, 0.4, 0.5


def payload(rank: int, epoch: int) -> torch.Tensor:
    return torch.arange(SIZE, dtype=torch.float32) + 10000 * rank + 100 * epoch


def rank_main(rank: int, path: Path, barrier, queue) -> None:
    d = tl.dialect("cpu")
    kernel, peer, world = d.compile(kernels.exchange(d, SIZE)), 1 - rank, World(2, path)
    ctx, out, done = world.context(rank), torch.zeros(SIZE), torch.zeros(1, dtype=torch.int32)
    wrong, waited = [], 0.0
    barrier.wait(120)
    for epoch in range(1, EPOCHS + 1):
        if rank == 1 and epoch in (1, 7):
            time.sleep(DELAY_S)
        start = time.monotonic()
        kernel(ctx, payload(rank, epoch), out, peer, epoch, epoch, done)
        waited = max(waited, time.monotonic() - start)
        if int(done[0]) != epoch or not torch.equal(out, payload(peer, epoch)):
            wrong.append(epoch)
    barrier.wait(120)
    # Rank 0 waits for an epoch in which rank 1 has no part, and then rank 1 for one that nobody will ever send.
    last, awaited, patience_s = EPOCHS + 1 + rank, EPOCHS + 1 + rank * 100, TIMEOUT_S if rank == 0 else 60.0
    if rank == 1:
        while world.abort(0) == 0:
            time.sleep(0.01)
    start = time.monotonic()
    kernel(world.context(rank, patience_s), payload(rank, last), out, peer, last, awaited, done)
    queue.put((rank, wrong, waited, int(done[0]), time.monotonic() - start, world.record(rank), world.abort(rank)))


@pytest.mark.slow
def test_push_signal_and_wait_between_processes() -> None:
    path = Path("/dev/shm") / f"tscompile-test-language-{os.getpid()}"
    World.create(path, 2)
    spawn = multiprocessing.get_context("spawn")
    barrier, queue = spawn.Barrier(2), spawn.Queue()
    ranks = [spawn.Process(target=rank_main, args=(rank, path, barrier, queue), daemon=True) for rank in range(2)]
    try:
        for process in ranks:
            process.start()
        results = sorted(queue.get(timeout=200) for _ in ranks)
        for process in ranks:
            process.join(30)
    finally:
        path.unlink()
        for process in ranks:
            process.kill()
    first, second = results
    assert [process.exitcode for process in ranks] == [0, 0]
    assert first[1] == [] and second[1] == []
    assert first[2] > DELAY_S / 2  # it did wait for the late one
    assert first[3] == EPOCHS and second[3] == EPOCHS  # the last wait of each was given up
    assert TIMEOUT_S <= first[4] < 20 and second[4] < 20
    assert first[5] == [1, 1, 11, EPOCHS + 1, EPOCHS]  # 1 + rank, peer, site, expected, seen
    assert second[5] == [0] * 5  # the first to give up reports, the other only ends
    assert first[6] == 1 and second[6] == 1
