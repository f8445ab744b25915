"""The doctor: probes that see broken things, guarded probes, exit status, plain and JSON output."""

from __future__ import annotations

import json
import mmap
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from tscompile import doctor, probes, versions
from tscompile.errors import HeapError
from tscompile.nvshmem import host, p2p
from tscompile.probes import Check


def found(probe: object) -> dict[str, Check]:
    return {check.what: check for check in probe()}  # type: ignore[operator]


@pytest.mark.parametrize(
    ("checks", "status", "words"),
    [
        ([Check("ok", "a", "")], 0, "run fused"),
        ([Check("warn", "a", "")], 0, "run fused"),
        ([Check("warn", "gloo", "", fallback=True)], 1, "because of gloo"),
        ([Check("fail", "torch", ""), Check("warn", "b", "", fallback=True)], 2, "see torch above"),
    ],
)
def test_status_and_verdict(checks: list[Check], status: int, words: str) -> None:
    assert doctor.exit_status(checks) == status
    assert words in doctor.verdict(checks)[0]
    assert status == 2 or "none here" in doctor.verdict(checks)[-1]


def test_what_gpu_ranks_do() -> None:
    memory = Check("ok", "GPU memory", "nvshmem")
    nvcc = Check("warn", "nvcc", "", fallback=True, ranks="gpu")
    assert "run fused" in doctor.verdict([memory])[-1]
    cpu, gpu = doctor.verdict([memory, nvcc])
    assert "run fused" in cpu and "because of nvcc" in gpu


def test_line() -> None:
    assert str(Check("warn", "gloo", "missing", "install it")).split("  ->") == [
        "warn  gloo                      missing",
        " install it",
    ]


def test_a_failing_probe_hides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def _probe_broken() -> Iterator[Check]:
        raise RuntimeError("no such thing")

    monkeypatch.setattr(doctor, "PROBES", (_probe_broken, lambda: [Check("ok", "after", "")]))
    first, second = doctor.examine()
    assert (first.status, first.what) == ("warn", "broken")
    assert "no such thing" in first.detail
    assert second.what == "after"


def test_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "PROBES", (lambda: [Check("warn", "gloo", "none", "install", fallback=True)],))
    assert doctor.main(["--json"]) == 1
    data = json.loads(capsys.readouterr().out)
    assert data["schema"] == 1
    assert data["exit_status"] == 1
    assert data["checks"] == [
        {"status": "warn", "what": "gloo", "detail": "none", "action": "install", "fallback": True, "ranks": "all"}
    ]


def test_runs_as_a_module_and_survives_empty_torch_logs() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "tscompile.doctor"],
        env={**os.environ, "TORCH_LOGS": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode in (0, 1, 2), run.stderr
    assert "unset TORCH_LOGS" in run.stdout
    assert "Traceback" not in run.stderr
    lines = run.stdout.split("\n\n")[0].splitlines()
    assert lines and all(re.match(r"(ok|warn|fail) ", line) for line in lines)


def test_shared_memory_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(probes, "SHM", str(tmp_path / "missing"))
    check = found(probes._probe_shared_memory)[str(tmp_path / "missing")]
    assert check.status == "warn"
    assert check.fallback


def test_stale_segments_are_those_that_nobody_maps(tmp_path: Path) -> None:
    for name in ("tscompile-old", "tscompile-used", "other"):
        (tmp_path / name).write_bytes(bytes(mmap.PAGESIZE))
    with (tmp_path / "tscompile-used").open("r+b") as file, mmap.mmap(file.fileno(), 0):
        assert probes.stale_segments(str(tmp_path)) == [str(tmp_path / "tscompile-old")]


def test_options_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TSCOMPILE_FUSE", "allways")
    assert found(probes._probe_options)["options"].status == "fail"
    monkeypatch.setenv("TSCOMPILE_FUSE", "always")
    monkeypatch.setenv("TSCOMPILE_VERIFI", "1")
    checks = found(probes._probe_options)
    assert checks["options"].detail == "TSCOMPILE_FUSE=always"
    assert "TSCOMPILE_VERIFY" in checks["TSCOMPILE_VERIFI"].action
    monkeypatch.setenv("TILELANG_USE_NVSHMEM", "0")
    monkeypatch.setenv("TILELANG_USE_DISTRIBUTED", "maybe")
    checks = found(probes._probe_options)
    assert checks["TILELANG_USE_NVSHMEM"].detail.startswith("off; TileScale's switch")
    assert checks["TILELANG_USE_DISTRIBUTED"].status == "warn"


def test_missing_compiler_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("PATH", "")
    checks = found(probes._probe_compilers)
    assert checks["C++ compiler"].status == "warn"
    assert "tilescale.inner" in checks["C++ compiler"].action
    assert not checks["C++ compiler"].fallback  # fused ops still run
    assert checks["C compiler"].fallback  # the heap's signals cannot be built


def test_two_nvshmem_wheels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "installed", lambda name: "3.4.5" if name in versions.NVSHMEM_WHEELS else None)
    check = found(probes._probe_nvshmem)["NVSHMEM wheels"]
    assert check.status == "warn"
    assert "same files" in check.detail


@pytest.mark.parametrize(
    ("library", "refusal", "status", "words"),
    [
        (True, "", "ok", "nvshmem, if all ranks of the program can enter it; else symm_mem"),
        (True, "set to NCCL", "ok", "without the second choice, symm_mem: set to NCCL"),
        (False, "", "ok", "symm_mem, since not nvshmem: no library here: install it"),
        (False, "set to NCCL", "warn", r"neither symm_mem (set to NCCL) nor nvshmem"),
    ],
)
def test_where_gpu_memory_comes_from(
    monkeypatch: pytest.MonkeyPatch, library: bool, refusal: str, status: str, words: str
) -> None:
    def load() -> SimpleNamespace:
        if not library:
            raise HeapError("no library here: install it")
        return SimpleNamespace(version=lambda: "3.4.5", source="a fake")  # nothing that initialises

    cuda = SimpleNamespace(
        is_available=lambda: True, device_count=lambda: 3, can_device_access_peer=lambda i, j: {i, j} != {0, 2}
    )
    monkeypatch.setattr(probes, "_torch", lambda: SimpleNamespace(cuda=cuda, version=SimpleNamespace(cuda="13.0")))
    monkeypatch.setattr(host, "load", load)
    monkeypatch.setattr(p2p, "backend_refusal", lambda: refusal)
    pairs, source = probes._probe_gpu_memory()
    assert (pairs.status, pairs.detail) == ("warn", "GPU 0 cannot address the memory of GPU 2 (2 such pairs)")
    assert source.status == status
    assert words in source.detail
    assert source.action == ("" if status == "ok" else "mend one of them: no library here: install it")
    assert ("3.4.5, a fake" in found(probes._probe_nvshmem)["NVSHMEM"].detail) == library


@pytest.mark.parametrize(
    ("version", "problems"),
    [
        ("2.11.0+cu130", ["autograd.Function", "all_gather_tensor"]),
        ("2.12.1", ["checkpointing + DTensor"]),
        ("2.13.0+cpu", ["checkpointing + DTensor"]),
        ("2.14.1", []),
    ],
)
def test_known_problems(version: str, problems: list[str]) -> None:
    assert [problem.what for problem in versions.known_problems(version)] == problems


@pytest.mark.parametrize(
    ("version", "status"), [("2.10.0", "fail"), ("2.11.0", "ok"), ("2.15.1", "ok"), ("2.16.0", "warn"), (None, "fail")]
)
def test_torch_range(monkeypatch: pytest.MonkeyPatch, version: str | None, status: str) -> None:
    monkeypatch.setattr(versions, "installed", lambda name: version)
    assert found(probes._probe_torch)["torch"].status == status


def test_ranges_are_those_of_the_package() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    lower, upper = (f"{major}.{minor}" for major, minor in (versions.TORCH_MIN, versions.TORCH_BELOW))
    assert f"torch>={lower},<{upper}" in project["dependencies"]
    assert f"tilelang=={versions.TILELANG}" in project["dependencies"]
    extras = project["optional-dependencies"]
    assert [extras[name][0].split(">")[0] for name in ("cu12", "cu13")] == list(versions.NVSHMEM_WHEELS)
