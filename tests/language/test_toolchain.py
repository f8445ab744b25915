"""nvcc from the NVIDIA wheels of the `nvcc` extra, on a machine that shows no other."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

from tscompile.language import toolchain
from tscompile.language.compile import parse

MISSING = "the nvcc wheels are missing: ./dev setup installs them"

COMPILE = """
import tscompile.language as tl
from tests.language import kernels
d = tl.dialect("cuda")
assert d.compile(kernels.threads(d)).get_kernel_source()
assert tl.compile_cuda(kernels.threads(d)).cubin[:4] == b"\x7fELF"
"""
SHOW = """
from tscompile.language import toolchain
print(toolchain.nvcc(), toolchain.nvcc_version())
"""
USE = "import tscompile.language as tl\ntl.use_wheels()\n"


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("CUDA_HOME", "CUDA_PATH")}
    folders = [part for part in kept["PATH"].split(os.pathsep) if not (Path(part) / "nvcc").exists()]
    kept |= {"PATH": os.pathsep.join(folders), "TILELANG_DISABLE_CACHE": "1"}
    root = Path(__file__).parents[2]
    return subprocess.run(
        [sys.executable, "-c", code], env=kept | environment, cwd=root, capture_output=True, text=True, timeout=200
    )


@pytest.mark.parametrize(
    ("code", "environment"),
    [(COMPILE + SHOW, {}), (USE + SHOW, {"CUDA_HOME": "/nowhere"})],
    ids=["nothing set", "CUDA_HOME leads nowhere"],
)
def test_nothing_but_the_wheels(code: str, environment: dict) -> None:
    home = toolchain.wheel_home()
    assert home is not None, "the nvcc wheels are missing: ./dev setup installs them"
    done = run(code, **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    path, version = done.stdout.split()[-2:]
    assert Path(path) == home / "bin" / "nvcc"
    assert version.startswith("13.")


def test_no_nvcc_at_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from tilelang.contrib import nvcc

    monkeypatch.setattr(nvcc, "CUDA_HOME", "")
    with pytest.raises(toolchain.ToolchainError, match=r"no nvcc: pip install 'tscompile\[nvcc\]', or set CUDA_HOME"):
        toolchain.nvcc()
    monkeypatch.setattr(nvcc, "CUDA_HOME", str(tmp_path))
    with pytest.raises(toolchain.ToolchainError, match="no nvcc"):
        toolchain.nvcc()


def test_use_wheels_comes_too_late(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(toolchain, "wheel_home", lambda: tmp_path)
    monkeypatch.setitem(sys.modules, "tilelang", pytest)
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    with pytest.raises(toolchain.ToolchainError, match="before it is imported"):
        toolchain.use_wheels()


def test_no_wheels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "wheel_home", lambda: None)
    with pytest.raises(toolchain.ToolchainError, match=r"pip install 'tscompile\[nvcc\]'"):
        toolchain.use_wheels()


def test_a_kernel_is_parsed_again_where_threads_have_met() -> None:
    """CPython 3.11 fails then, with a SystemError; any other error is the kernel's own."""
    raised = [SystemError("AST constructor recursion depth mismatch (before=138, after=70)")]

    def write() -> str:
        if raised:
            raise raised.pop()
        return "function"

    assert parse(write) == "function"
    raised.append(SystemError("something else"))
    with pytest.raises(SystemError, match="something else"):
        parse(write)


def test_threads_that_import_tilelang_at_once() -> None:
    """The vote asks for nvcc while kernels are compiled in threads. Without a lock most runs of this fail on a cold cache."""
    program = """
        import threading
        from importlib import import_module
        from tscompile import language
        from tscompile.language import toolchain
        from tscompile.templates.nvlink import jit

        def kernel():
            jit._build("service", ("tsk_open",))

        ready, errors = threading.Barrier(4), []
        def run(action):
            ready.wait()
            try:
                action()
            except Exception as error:
                errors.append(repr(error))

        actions = [toolchain.nvcc, lambda: language.ld, kernel, kernel]
        threads = [threading.Thread(target=run, args=(action,)) for action in actions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors, errors
    """
    done = subprocess.run([sys.executable, "-c", dedent(program)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
