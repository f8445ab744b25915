"""Processes for the ranks of a test, forked from one that has torch and its compiler loaded: importing them takes each rank seconds.

One server serves all calls whose environment is the same. It is a program of its own, so nothing of the caller's state (threads,
process groups, compiled graphs, random numbers) reaches a rank.
"""

from __future__ import annotations

import importlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import NoReturn

_PRELOAD = ("torch.distributed.tensor", "torch._inductor.compile_fx", "tscompile.backend", "tscompile.lowering.runtime")
_OWN = {
    "OMP_NUM_THREADS": "1",
    "PYTHONUNBUFFERED": "1",
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # whether there is a GPU is asked without CUDA, which would not survive a fork
}
_START_S = 300.0  # to load everything, on a machine that is busy
_KILL_S = 60.0
_TURN_S = 0.02


class ServerError(RuntimeError):
    """The server did not start or has died; the message carries what it printed."""


@dataclass(frozen=True)
class Start:
    """A rank: `module:function` is called with `args` and must not return. Output goes to `log`."""

    function: str
    args: tuple[str, ...]
    env: dict[str, str]
    path: list[str]
    folder: str
    log: str


class Rank:
    """A process that the server has forked: session leader, `returncode` as `subprocess.Popen` has it."""

    def __init__(self, server: RankServer, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._server = server

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._server.ended(self.pid)
        return self.returncode

    def kill(self) -> None:
        """Kill it and its children, which may outlive it; wait a bounded time until it has ended."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        deadline = time.monotonic() + _KILL_S
        with suppress(ServerError):  # who else would know when it has ended
            while self.poll() is None and time.monotonic() < deadline:
                time.sleep(_TURN_S)


class RankServer:
    """A process that forks ranks until `close`, or until this process ends.

    Args:
        env: what the modules that ranks will use may read while they are imported.
    """

    def __init__(self, env: dict[str, str]) -> None:
        self.env, self.owner = env, os.getpid()
        self._lock = threading.Lock()
        self._ended: dict[int, int] = {}
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  it lives as long as the server
        here, there = socket.socketpair()
        path = os.pathsep.join(part for part in sys.path if part)  # pytest puts test folders there
        with there:
            self._process = subprocess.Popen(
                [sys.executable, "-c", f"from {__name__} import serve; serve({there.fileno()})"],
                env=env | _OWN | {"PYTHONPATH": path},
                pass_fds=[there.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                start_new_session=True,  # Ctrl-C is the caller's, who then ends the ranks
            )
        self._connection = Connection(here.detach())

    def start(self, rank: Start) -> Rank:
        """Fork a rank.

        Raises:
            ServerError: the server cannot load what it must, or is gone.
        """
        with self._lock:
            try:
                self._connection.send(rank)
                deadline = time.monotonic() + _START_S
                while self._connection.poll(max(0.0, deadline - time.monotonic())):
                    event, pid, code = self._connection.recv()
                    if event == "started":
                        return Rank(self, pid)
                    self._ended[pid] = code
            except (OSError, EOFError):
                raise ServerError(f"the server of ranks has ended:\n{self._said()}") from None
            except BaseException:  # a time-out of the test, say: the answer would be taken for that to the next call
                self._connection.close()
                raise
            self._connection.close()
        raise ServerError(f"no rank was started in {_START_S:.0f} s: is the machine overloaded?\n{self._said()}")

    def ended(self, pid: int) -> int | None:
        """The exit status of a rank, once: negative for a signal; None while it runs."""
        with self._lock:
            try:
                while self._connection.poll():
                    _, ended, code = self._connection.recv()
                    self._ended[ended] = code
            except (OSError, EOFError):
                raise ServerError(f"the server of ranks has ended:\n{self._said()}") from None
            return self._ended.pop(pid, None)

    def alive(self) -> bool:
        return self.owner == os.getpid() and not self._connection.closed and self._process.poll() is None

    def close(self) -> None:
        self._connection.close()
        if self.owner == os.getpid():
            self._process.wait(_KILL_S)
        self._log.close()

    def _said(self) -> str:
        self._log.seek(0)
        return self._log.read()[-4000:]


def serve(descriptor: int) -> None:
    """The server: forks what is asked for, and tells when a rank has ended. Ends, with its ranks, when the connection does."""
    for name in _PRELOAD:
        importlib.import_module(name)
    connection = Connection(descriptor)
    ranks: set[int] = set()
    try:
        while True:
            if connection.poll(_TURN_S if ranks else None):
                start: Start = connection.recv()
                pid = os.fork()
                if not pid:
                    connection.close()
                    _become(start)
                ranks.add(pid)
                connection.send(("started", pid, 0))
            while ranks:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if not pid:
                    break
                ranks.discard(pid)
                connection.send(("ended", pid, os.waitstatus_to_exitcode(status)))
    except (EOFError, OSError):
        for pid in ranks:
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)


def _become(start: Start) -> NoReturn:
    """Turn a fork of the server into the rank."""
    try:
        os.setsid()
        log = os.open(start.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        os.chdir(start.folder)
        os.environ.clear()
        os.environ.update(start.env)
        sys.path[:] = start.path
        module, _, name = start.function.partition(":")
        function: Callable[..., object] = getattr(importlib.import_module(module), name)
        function(*start.args)
    except BaseException:
        traceback.print_exc()
    os._exit(1)
