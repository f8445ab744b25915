"""What is written for GPUs, tried on two CPU ranks: the benchmarks with tiny sizes, and tests/gpu itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu_report, model_report, plot

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def torchrun(*args: str, timeout: float = 280) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    command += ["--nproc-per-node", "2", "--local-ranks-filter", "0", "-m", *args]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_benchmark_of_ops(tmp_path: Path) -> None:
    path = tmp_path / "ops.json"
    torchrun("benchmarks.bench_gpu", "--tiny", "--device=cpu", "--dtype=float32", f"--out={path}")
    result = json.loads(path.read_text())
    assert result["kind"] == "gpu-ops" and len(result["cases"]) == 4
    for case in result["cases"]:
        assert not case["failures"], case["failures"]
        assert {"gemm", "collective", "original", "tscompile"} <= case["rounds"]["eager"][0].keys()
        assert gpu_report.efficiency(case, "tscompile", "eager") is not None
    assert "compiled" in result["cases"][0]["rounds"]["eager"][0]
    plot.draw(result, tmp_path / "ops.png")
    assert (tmp_path / "ops.png").stat().st_size > 10_000
    path.write_text(
        json.dumps(
            {**result, "cases": [*result["cases"][:3], {"name": result["cases"][3]["name"], "status": "started"}]}
        )
    )
    again = torchrun("benchmarks.bench_gpu", "--tiny", "--device=cpu", "--dtype=float32", "--resume", f"--out={path}")
    assert "did not end" in again and "..." not in again, "a case that hung is not tried again"


def test_benchmark_of_models(tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    torchrun("benchmarks.model_llama", "--tiny", "--quick", "--device=cpu", "--dtype=float32", f"--out={path}")
    result = json.loads(path.read_text())
    assert result["kind"] == "gpu-model" and len(result["cases"]) == 1
    for case in result["cases"]:
        assert not case["failures"], case["failures"]
        assert set(case["rounds"]["eager"][0]) == {"inductor", "tilescale", "roof"}
        assert case["collectives"] >= 14 and case["collectives_left"] == 0
    assert "| tiny |" in model_report.markdown(result)
    plot.draw(result, tmp_path / "model.png")
    assert (tmp_path / "model.png").stat().st_size > 10_000


def test_gpu_tests_on_cpu_ranks() -> None:
    """All files but the programs, which tests/test_fused_programs.py runs; of the failures one."""
    chosen = "test_ops or test_stress or test_groups or silent-matmul_reduce_scatter"
    output = torchrun("pytest", "tests/gpu", "-q", "--device=cpu", "-k", chosen, "-p", "no:cacheprovider")
    assert "passed" in output and "failed" not in output
