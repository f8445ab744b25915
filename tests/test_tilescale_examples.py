"""The scripts of examples/tilescale on CPU ranks, as a user runs them; test_tilescale_kernels.py compiles their kernels for GPUs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "tilescale"
RUN_ALL = [sys.executable, str(FOLDER / "run_all.py")]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

sys.path.insert(0, str(FOLDER))  # the scripts import each other as they do when they are run
from run_all import NAMES  # noqa: E402

pytestmark = pytest.mark.slow


def run(command: list[str], timeout_s: float = 240.0) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout_s, check=False
    )


@cache
def lines_of_all() -> tuple[dict[str, str], subprocess.CompletedProcess[str]]:
    """One run of all examples, which start from one server that has loaded everything: name -> its line."""
    done = run(RUN_ALL)
    return {line.split()[1]: line for line in done.stdout.splitlines() if re.match(r"ok|FAILED", line)}, done


def example_of(name: str):
    return __import__(name).EXAMPLE


@pytest.mark.parametrize("name", NAMES)
def test_runs_and_checks_itself(name: str) -> None:
    lines, done = lines_of_all()
    assert name in lines, done.stdout + done.stderr
    assert re.match(rf"ok +{name} +{example_of(name).ranks} ranks +[\d.]+ s  \S", lines[name]), done.stdout


def test_all_ran() -> None:
    lines, done = lines_of_all()
    assert list(lines) == list(NAMES) and done.returncode == 0, done.stdout + done.stderr
    helpers = {"common", "mesh", "run_all", "kv_attention", "sp_ag_bench", "two_level"}
    scripts = {path.stem for path in FOLDER.glob("*.py")} - helpers
    assert scripts == set(NAMES), "add the script to NAMES in run_all.py"
    table = (FOLDER / "README.md").read_text()
    assert all(f"| `{name}.py` |" in table for name in NAMES), "add the script to the table in README.md"


def moved(routes, side: int) -> None:
    """Move numbered blocks as the routes say, and check that every product of blocks that makes up C comes together, once."""
    ranks = [divmod(rank, side) for rank in range(side * side)]
    held = [(set(), set()) for _ in ranks]
    products = [set() for _ in ranks]
    for step in range(side):
        before, held = held, [(set(), set()) for _ in ranks]
        for rank, place in enumerate(ranks):
            for kind, route in enumerate(routes(side, *place, step)):
                blocks = before[rank][kind] if route.forward else {place}
                for to in route.to:
                    assert routes(side, *ranks[to], step)[kind].source == rank
                    assert not held[to][kind]
                    held[to][kind].update(blocks)
        for rank, ((a_block,), (b_block,)) in enumerate(held):
            assert (a_block[0], b_block[1]) == ranks[rank] and a_block[1] == b_block[0]
            products[rank].add(a_block[1])
    assert all(found == set(range(side)) for found in products)


@pytest.mark.parametrize("side", [1, 2, 3, 4])
@pytest.mark.parametrize("name", ["cannon", "summa"])
def test_routes_over_larger_meshes_than_can_run_here(name: str, side: int) -> None:
    moved(__import__(name).routes, side)


def test_a_script_under_torchrun_with_another_number_of_ranks() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    done = run([*command, "--nproc-per-node", "3", str(FOLDER / "primitives.py"), "--only", "1", "--rounds", "2"])
    assert done.returncode == 0 and "put_block" in done.stdout, done.stdout + done.stderr


RUNS = """
import sys
from pathlib import Path
sys.path.insert(0, {folder!r})
from common import launch
if __name__ == "__main__":
    for name, ranks, options in {runs!r}:
        print(name, launch(Path({folder!r}) / f"{{name}}.py", [f"--ranks={{ranks}}", *options], ranks), flush=True)
"""


def test_virtual_nodes_and_the_race_of_attention(tmp_path: Path) -> None:
    """From one server, as run_all.py does it: most of a run's time is the loading of torch and TileLang."""
    few = ["--rounds=3", "--repeat=1"]
    runs = [
        ("allgather_two_level", 2, ["--ranks-per-node=1", *few]),
        ("allgather_two_level", 6, ["--ranks-per-node=2", *few]),
        ("reduce_scatter_two_level", 2, ["--ranks-per-node=2", *few]),
        ("reduce_scatter_two_level", 6, ["--ranks-per-node=3", *few]),
        ("sp_ag_attention", 2, ["--bench", "--seq=64", "--rounds=1"]),
    ]
    script = tmp_path / "runs.py"
    script.write_text(RUNS.format(folder=str(FOLDER), runs=runs))
    done = run([sys.executable, str(script)])
    assert done.returncode == 0, done.stdout + done.stderr
    for text in ("2 nodes of 1", "3 nodes of 2", "1 nodes of 2", "2 nodes of 3"):
        assert text in done.stdout
    for name in ("full", "zig-zag"):
        sides = r"tscompile [\d.]+; gloo \+ flash [\d.]+; flash, keys there [\d.]+; "
        assert re.search(rf"^{name}: {sides}", done.stdout, re.MULTILINE), done.stdout


def test_nodes_that_ranks_do_not_make_up(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        example_of("allgather_two_level").parse(["--ranks=4", "--ranks-per-node=3"])
    assert "4 ranks are no nodes of 3" in capsys.readouterr().err


def test_a_rank_that_fails_ends_the_others() -> None:
    done = run([sys.executable, str(FOLDER / "primitives.py"), "--only", "9"])
    assert done.returncode == 1 and "ValueError: --only 9: there are 1 to 6" in done.stderr, done.stdout + done.stderr


def test_names_that_are_not_there() -> None:
    done = run([*RUN_ALL, "alltoall"])
    assert done.returncode == 2 and "there is no alltoall" in done.stderr
