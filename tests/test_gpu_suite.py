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


def torchrun(*args: str, timeout: float = 280, ranks: int = 2) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    command += ["--nproc-per-node", str(ranks), "--local-ranks-filter", "0", "-m", *args]
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


def test_benchmark_of_expert_parallelism(tmp_path: Path) -> None:
    path = tmp_path / "deepep.json"
    said = torchrun("benchmarks.bench_deepep", "--device=cpu", "--rounds=2", f"--out={path}")
    assert "results are right" in said and said.count(" x once, ") == 3
    cases = {case["name"]: case for case in json.loads(path.read_text())["cases"]}
    assert list(cases) == ["dispatch", "cached dispatch", "combine"]
    for case in cases.values():
        assert case["bytes"] > 0 and case["best"] == f"{case['name']}, 2 SMs" and case["of_peak"] is None
        once = f"{case['name'].split()[-1]} once"
        ratios = sorted(times[once] / times[case["best"]] for times in case["rounds"])
        assert case["speedup_once"]["value"] == pytest.approx(sum(ratios) / 2)


def test_benchmark_of_meshes(tmp_path: Path) -> None:
    path = tmp_path / "mesh.json"
    torchrun("benchmarks.bench_mesh", "--sizes=64", "--rounds=2", "--device=cpu", f"--out={path}", ranks=4)
    result = json.loads(path.read_text())
    assert result["kind"] == "gpu-mesh" and [case["name"] for case in result["cases"]] == ["summa 64", "blocks 64"]
    for case in result["cases"]:
        assert not case["failures"], case["failures"]
        assert {"gemm", "original", "one_gather, left", "one_gather, right", "tscompile"} == case["us"].keys()


@pytest.mark.parametrize("ranks", [2, 4])
def test_benchmark_of_exchanges(tmp_path: Path, ranks: int) -> None:
    path = tmp_path / "exchange.json"
    sizes = ("--tokens", "16", "64", "--heads=4", "--rounds=2")
    said = torchrun("benchmarks.bench_exchange", "--device=cpu", *sizes, f"--out={path}", ranks=ranks)
    result = json.loads(path.read_text())
    assert result["kind"] == "gpu-exchange" and result["environment"]["ranks"] == ranks
    rivals = {
        "q, k, v": {"nccl", "nccl, twice"},
        "fused qkv": {"nccl", "nccl, twice"},
        "back": {"nccl, twice"},
        "projected": {"permute", "nccl", "roof"},
    }
    whats = [(what, tokens) for tokens in (16, 64) for what in rivals]
    assert [(case["what"], case["tokens"]) for case in result["cases"]] == whats
    for case in result["cases"]:
        tensors = 1 if case["what"] == "back" else 3
        assert case["bytes_sent"] == tensors * case["tokens"] * 4 * 128 * 2 * (ranks - 1) // ranks**2
        assert f"{case['name']:24} eager" in said and "graph" not in case  # gloo is not captured
        us, rounds = case["eager"]["us"], case["eager"]["rounds"]
        assert us.keys() == {"ours", *rivals[case["what"]]} and len(rounds) == 2
        for name in us:
            assert us[name] == pytest.approx(1e6 * sum(times[name] for times in rounds) / 2)
        for name in rivals[case["what"]]:
            ratios = [times[name] / times["ours"] for times in rounds]
            assert case["eager"]["speedup"][name]["value"] == pytest.approx(sum(ratios) / 2)
        assert case["eager"]["gbytes_per_s"] == pytest.approx(case["bytes_sent"] / us["ours"] / 1e3)


@pytest.mark.parametrize(("name", "cases"), [("model_ulysses", 3), ("bench_kv_gather", 2)])
def test_benchmark_of_programs_around_attention(tmp_path: Path, name: str, cases: int) -> None:
    path = tmp_path / "attention.json"
    torchrun(f"benchmarks.{name}", "--tiny", f"--out={path}")
    found = json.loads(path.read_text())["cases"]
    assert len(found) == cases
    for case in found:
        assert not case["failures"], case["failures"]
        assert set(case["rounds"]["eager"][0]) == {"inductor", "tilescale", "roof"} and len(case["errors"]) == 2
    assert any(site["decision"] == "fused" for case in found for site in case["sites"])


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


def test_benchmark_of_the_examples(tmp_path: Path) -> None:
    path = tmp_path / "tilescale.json"
    torchrun("benchmarks.bench_tilescale", "--device=cpu", "--sizes", "64", "1024", "--rounds=2", f"--out={path}")
    cases = json.loads(path.read_text())["cases"]
    assert [case["name"] for case in cases] == [
        f"{op} {kib} KiB" for op in ("all_gather", "all_to_all") for kib in (64, 1024)
    ]
    assert all(len(case["rounds"]) == 2 and case["us"].keys() == {"ours", "gloo"} for case in cases)


def test_gpu_tests_on_cpu_ranks() -> None:
    """All files but the programs, which tests/test_fused_programs.py runs; of the failures one."""
    chosen = "test_ops or test_stress or test_groups or test_backends or test_attention_variants or silent-matmul_reduce_scatter"
    output = torchrun("pytest", "tests/gpu", "-q", "--device=cpu", "-k", chosen, "-p", "no:cacheprovider")
    assert "passed" in output and "failed" not in output
