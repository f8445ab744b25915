"""Exchange code of yunchang and DeepSpeed, unmodified from the package index, compiled on CPU ranks: equal to eager, and fused."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.compat import TORCH
from tests.numerics_worker import Outcome
from tests.peers import packages
from tests.peers.blocks import PROGRAMS
from tscompile.testing import run_ranks

RANKS = 2
WORLD_S = 400  # all blocks in one world: half a minute on a quiet machine
OPTIONS = {"tilescale.inner": "eager", "tilescale.fuse": "always"}
WRONG = {name for name, program in PROGRAMS.items() if program.backward and "opaque" not in name and TORCH < (2, 12)}
# The attention itself is in the op, and not only the exchanges around it: a group of heads computes while others travel.
BY_HEADS = {
    "yunchang",
    "yunchang, no_grad",
    "yunchang USP",
    "DeepSpeed",
    "DeepSpeed, sequence first",
    "DeepSpeed, inference_mode",
    "DeepSpeed, opaque op",
    "DeepSpeed, opaque op, full, no_grad",
}


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Outcome]]:
    """Of each rank the outcome of each block; the ranks compile with `fullgraph`, so no exchange is outside of a graph."""
    names = [name for name in PROGRAMS if name not in WRONG]
    env = {"DS_ACCELERATOR": "cpu"}  # DeepSpeed would look for GPUs
    found: list[list[Outcome]] = run_ranks(
        RANKS, "tests.peers.worker:run", folder, names, OPTIONS, timeout_s=WORLD_S, env=env
    )
    return [{outcome.program: outcome for outcome in outcomes} for outcomes in found]


@pytest.mark.slow
@pytest.mark.timeout(WORLD_S + packages.WAIT_S + 40)
@pytest.mark.parametrize("name", PROGRAMS)
def test_equals_eager_and_is_fused(ranks: list[dict[str, Outcome]], name: str) -> None:
    if name in WRONG:
        pytest.skip("torch 2.11 captures autograd.Functions with in-place collectives wrongly, with every backend")
    (op,) = {op for counts in PROGRAMS[name].expected.values() for op in counts}
    for rank, outcomes in enumerate(ranks):
        outcome = outcomes[name]
        assert not outcome.failure, f"rank {rank}:\n{outcome.failure}"
        equal = outcome.equal or (outcome.adds_panels and not outcome.wrong(torch.float32))
        assert equal and outcome.errors, f"rank {rank}: other bits than eager: {outcome.errors}"
        assert any(label.endswith("wqkv") for label in outcome.errors) == PROGRAMS[name].backward
        exchanges = {decision: n for (decision, what), n in outcome.collectives.items() if what == op}
        assert exchanges == {"fused": PROGRAMS[name].addressable}, outcome.decisions
        fused = [line.split()[2] for line in outcome.decisions if line.startswith("fused")]
        assert outcome.fused == len(fused), "a fused op was not launched"
        assert name not in BY_HEADS or set(fused) == {"all_to_all_attention"}, outcome.decisions


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(packages, "user_cache_path", lambda name: tmp_path / name)
    return tmp_path


def pip_says(monkeypatch: pytest.MonkeyPatch, stderr: str) -> None:
    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", stderr)

    monkeypatch.setattr(packages.subprocess, "run", run)


def test_an_index_that_cannot_be_reached_is_a_reason_to_skip(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip_says(monkeypatch, "WARNING: Retrying\nERROR: No matching distribution found for yunchang==0.6.4\n")
    with pytest.raises(packages.NotFetchedError, match="No matching distribution found for yunchang"):
        packages.fetch()
    assert not [path for path in (empty_cache / "tscompile/test-packages").iterdir() if path.is_dir()]


def test_other_files_than_the_pinned_ones_are_an_error(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip_says(monkeypatch, "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.\n")
    with pytest.raises(RuntimeError, match="other files than those that the tests are pinned to"):
        packages.fetch()
