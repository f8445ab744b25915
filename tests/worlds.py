"""Worlds of ranks for tests in which ranks may die on purpose; ranks start from a fork server that has torch loaded."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tscompile.nvshmem.shm import PREFIX, SHM_DIR

_pids: set[int] = set()  # of all ranks that this process has started

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torch.distributed", "tscompile.lowering.runtime"])


def _rank_main(
    rank: int, size: int, port: int, folder: str, backend: str, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    log = os.open(f"{folder}/log.{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    code = 1
    try:
        store = dist.TCPStore("127.0.0.1", port, is_master=False)
        device = torch.device("cuda", rank) if backend == "nccl" else None
        if device is not None:
            torch.cuda.set_device(device)
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, device_id=device)
        result = function(rank, size, *args)
        Path(f"{folder}/result.{rank}").write_bytes(pickle.dumps(result))
        code = 0
        if backend == "nccl":  # with peers that are gone it may wait for them when it is torn down
            os._exit(0)
        dist.destroy_process_group()
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        os._exit(code)


def segments_left(pids: Collection[int] = _pids) -> list[str]:
    """What processes, those of all worlds so far, have left in shared memory. What belongs to tests beside this one does not count."""
    names = [path.name for path in SHM_DIR.glob(f"{PREFIX}*-*-*-*")]
    return [name for name in names if int(name.removeprefix(PREFIX).split("-")[1]) in pids]


def run_world(
    size: int,
    function: Callable[..., Any],
    *args: Any,
    timeout_s: float = 60.0,
    dying: tuple[int, ...] = (),
    backend: str = "gloo",
) -> list[Any]:
    """Run `function(rank, size, *args)` on `size` ranks; returns the results, None for the ranks that are to die.

    Fails with the output of all ranks if one fails or the world is not done in time. Ranks that are to die are not waited for:
    what is left of them once the others are done is killed.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            _context.Process(target=_rank_main, args=(rank, size, store.port, folder, backend, function, args))
            for rank in range(size)
        ]
        for process in ranks:
            process.start()
            _pids.add(process.pid or 0)
        deadline = time.monotonic() + timeout_s
        living = [rank for rank in range(size) if rank not in dying]
        for rank in living:
            ranks[rank].join(max(0.0, deadline - time.monotonic()))
        late = [rank for rank in living if ranks[rank].is_alive()]
        for process in ranks:
            process.kill()
            process.join()
        failed = [rank for rank in living if ranks[rank].exitcode != 0]
        if late or failed:
            story = []
            for rank, process in enumerate(ranks):
                with contextlib.suppress(OSError):
                    output = Path(f"{folder}/log.{rank}").read_text(errors="replace")[-4000:]
                    story.append(f"--- rank {rank}, exit code {process.exitcode}\n{output}")
            why = f"ranks {late} were not done after {timeout_s} s" if late else f"ranks {failed} failed"
            raise AssertionError(why + "\n" + "\n".join(story))
        return [
            None if rank in dying else pickle.loads(Path(f"{folder}/result.{rank}").read_bytes())
            for rank in range(size)
        ]
