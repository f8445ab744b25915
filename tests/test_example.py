"""The example: its verdict on losses (in-process), and a short run on two gloo ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from examples import train_llama_tp as example

ROOT = Path(__file__).parents[1]
BACKEND = "tilescale"


def trainer(backend: str, losses: list[float], block_seconds: list[float]) -> SimpleNamespace:
    return SimpleNamespace(backend=backend, losses=losses, block_seconds=block_seconds, tokens_per_second=1.0)


FALLING = [5.0, 4.0, 3.0, 2.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("ours", "complaint"),
    [
        (FALLING, None),
        ([5.0, 4.0, 3.0, 2.0, 1.0, 1.00001], None),
        ([5.0, 4.0, 3.0, 2.0, 1.0, 1.001], "losses differ from eager by 1.0e-03"),
        ([5.0, 4.0, float("nan"), 2.0, 1.0, 1.0], "losses differ from eager by nan"),
        ([5.0, 5.1, 5.1, 5.2, 5.1, 5.1], "the loss did not fall"),
    ],
)
def test_verdict(ours, complaint, monkeypatch):
    monkeypatch.setattr(example, "say", lambda *_: None)
    eager = ours if complaint == "the loss did not fall" else FALLING
    result, problems = example.summarize(
        [
            trainer(BACKEND, ours, [1.0, 2.0, 10.0]),
            trainer("eager", eager, [2.0] * 3),
            trainer("inductor", eager, [1.2, 3.0, 11.0]),
        ]
    )
    assert result["speedup_over_inductor"] == pytest.approx(1.2)
    assert bool(problems) == (complaint is not None)
    assert complaint is None or any(complaint in problem for problem in problems)


def test_batches_depend_on_seed_and_step_only():
    text = example.standard_library_text()
    assert len(text) > 1_000_000

    def batch(seed: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        owner = SimpleNamespace(args=Namespace(seed=seed, batch=2, seq=16), text=text)
        owner.mesh = SimpleNamespace(device_type="cpu")
        return example.Trainer.batch(owner, step)

    tokens, targets = batch(seed=3, step=7)
    assert torch.equal(tokens, batch(seed=3, step=7)[0])
    assert not torch.equal(tokens, batch(seed=3, step=8)[0])
    assert torch.equal(tokens[:, 1:], targets[:, :-1])


@pytest.mark.slow
def test_short_run(tmp_path):
    """As a user runs it: its own process per rank, the backend by name. It compares losses with eager itself."""
    entry = tmp_path / "tscompile-0.dist-info"  # the backend's name resolves also where the package is not installed
    entry.mkdir()
    (entry / "METADATA").write_text("Metadata-Version: 2.1\nName: tscompile\nVersion: 0\n")
    (entry / "entry_points.txt").write_text("[torch_dynamo_backends]\ntilescale = tscompile.backend:tilescale\n")
    saved = tmp_path / "run.json"
    size = ["--steps", "5", "--layers", "1", "--dim", "128", "--batch", "2", "--seq", "64"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    command += ["--nproc-per-node", "2", "examples/train_llama_tp.py", "--backend", BACKEND]
    path = os.pathsep.join(filter(None, [str(ROOT), str(tmp_path), os.environ.get("PYTHONPATH")]))
    run = subprocess.run(
        [*command, *size, "--save-json", str(saved)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "collectives fused" in run.stdout
    assert "x the tokens/s of inductor" in run.stdout
    result = json.loads(saved.read_text())
    assert result["max_relative_loss_difference"] <= example.LOSS_TOLERANCE
    assert len(result[BACKEND]["losses"]) == example.WARMUP_STEPS + 5
