"""The helpers that distributed tests stand on: a failure of a rank must be seen, and must not hang the run."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tscompile import testing
from tscompile.rank_server import RankServer, ServerError, Start
from tscompile.testing import RankFailure, collective_counts, fake_world, run_ranks, short_name


def _sum(value: float) -> tuple[int, float, str]:
    tensor = torch.tensor(value * dist.get_rank())
    dist.all_reduce(tensor)
    return dist.get_rank(), tensor.item(), os.environ["LOCAL_WORLD_SIZE"]


def _raise_on_rank_1() -> None:
    if dist.get_rank() == 1:
        raise ValueError("broken on purpose")
    dist.barrier()


def _hang() -> None:
    print("about to sleep", flush=True)
    time.sleep(60)


def _setting() -> tuple[str | None, int]:
    return os.environ.get("TSCOMPILE_TEST_SETTING"), os.getppid()


def _tell_and_sleep(path: str) -> None:
    Path(path).write_text(str(os.getpid()))
    time.sleep(600)


def test_variables_of_a_call_count_from_the_first_import_on() -> None:
    """So its ranks come from a server of their own; all others share one."""
    (plain,), (again,) = (run_ranks(1, _setting, backend=None) for _ in range(2))
    assert plain == again and plain[0] is None
    ((value, server),) = run_ranks(1, _setting, backend=None, env={"TSCOMPILE_TEST_SETTING": "1"})
    assert value == "1" and server != plain[1]
    assert run_ranks(1, _setting, backend=None) == [plain]


def test_another_environment_or_process_is_another_server(monkeypatch: pytest.MonkeyPatch) -> None:
    class Server:
        def __init__(self, env: dict[str, str]) -> None:
            self.env, self.alive, self.closed = env, lambda: True, False

        def close(self) -> None:
            self.closed = True

    monkeypatch.setattr(testing, "RankServer", Server)
    monkeypatch.setattr(testing, "_server", None)
    first = testing._server_of({"A": "1", "PYTEST_CURRENT_TEST": "a"})
    assert testing._server_of({"A": "1", "PYTEST_CURRENT_TEST": "b"}) is first and not first.closed
    second = testing._server_of({"A": "2"})
    assert second is not first and first.closed and second.env == {"A": "2"}
    second.alive = lambda: False
    assert testing._server_of({"A": "2"}) is not second and second.closed


def test_ranks_end_with_the_program_that_started_them(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    code = f"from tscompile.testing import run_ranks; run_ranks(1, '{__name__}:_tell_and_sleep', {str(path)!r}, backend=None)"
    root = Path(__file__).parents[1]
    program = subprocess.Popen([sys.executable, "-c", code], cwd=root, env=os.environ | {"PYTHONPATH": str(root)})
    deadline = time.monotonic() + 120
    try:
        while not (path.exists() and path.read_text()):
            assert program.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        program.kill()
        program.wait()
    while Path(f"/proc/{path.read_text()}").exists():
        assert time.monotonic() < deadline, "the rank has outlived its program"
        time.sleep(0.05)


def test_a_server_that_cannot_start_says_why() -> None:
    server = RankServer({**os.environ, "TORCH_LOGS": "no such artifact"})
    with pytest.raises(ServerError, match=r"(?s)has ended.*no such artifact"):
        server.start(Start("os:_exit", (), {}, [], "/", os.devnull))
    server.close()


def test_results_come_back_in_rank_order() -> None:
    assert run_ranks(2, _sum, 3.0) == [(0, 3.0, "2"), (1, 3.0, "2")]


def test_traceback_of_a_failed_rank_is_shown() -> None:
    with pytest.raises(RankFailure, match="broken on purpose") as failure:
        run_ranks(2, _raise_on_rank_1, timeout_s=60)
    assert "_raise_on_rank_1" in str(failure.value)


def test_time_out_kills_the_ranks_and_shows_output() -> None:
    start = time.monotonic()
    with pytest.raises(RankFailure, match="not done after 6 s") as failure:
        run_ranks(1, _hang, timeout_s=6, backend=None)
    assert "about to sleep" in str(failure.value)
    assert time.monotonic() - start < 30


def test_fake_world_leaves_nothing_behind() -> None:
    for rank in (0, 2):
        with fake_world(4, rank) as group:
            assert (dist.get_rank(), group.size()) == (rank, 4)
        assert not dist.is_initialized()


def test_fake_world_refuses_to_nest() -> None:
    with fake_world(2), pytest.raises(RuntimeError, match="process group exists"), fake_world(2):
        pass
    assert not dist.is_initialized()


def test_collective_counts_names_spellings_alike() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    ops = torch.ops._c10d_functional
    gathered = graph.call_function(ops.all_gather_into_tensor.default, (x, 2, "0"))
    waited = graph.call_function(ops.wait_tensor.default, (gathered,))
    reduced = graph.call_function(ops.all_reduce_.default, (waited, "sum", "0"))
    graph.output(graph.call_function(ops.all_reduce.default, (reduced, "sum", "0")))
    assert collective_counts(graph) == {"all_gather": 1, "all_reduce": 2}


@pytest.mark.parametrize(
    ("op", "short"),
    [
        ("_c10d_functional.reduce_scatter_tensor.default", "reduce_scatter"),
        ("all_to_all_single", "all_to_all"),
        ("all_gather_into_tensor_coalesced", "all_gather"),
        ("all_reduce", "all_reduce"),
    ],
)
def test_short_name(op: str, short: str) -> None:
    assert short_name(op) == short
