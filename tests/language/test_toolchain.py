"""nvcc from the NVIDIA wheels of the `nvcc` extra, on a machine that shows no other."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tscompile.language import toolchain

MISSING = "the nvcc wheels are missing: ./dev setup installs them"

COMPILE = """
from tscompile.language import toolchain
{prepare}
import tscompile.language as tl
from tests.language import kernels
d = tl.dialect("cuda")
assert d.compile(kernels.threads(d)).get_kernel_source()
assert tl.compile_cuda(kernels.threads(d)).cubin[:4] == b"\\x7fELF"
print(tl.nvcc(), toolchain.nvcc_version())
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("CUDA_HOME", "CUDA_PATH")}
    folders = [part for part in kept["PATH"].split(os.pathsep) if not (Path(part) / "nvcc").exists()]
    kept |= {"PATH": os.pathsep.join(folders), "TILELANG_DISABLE_CACHE": "1"}
    root = Path(__file__).parents[2]
    return subprocess.run(
        [sys.executable, "-c", code], env=kept | environment, cwd=root, capture_output=True, text=True, timeout=200
    )


@pytest.mark.parametrize(
    ("prepare", "environment"),
    [("", {}), ("toolchain.use_wheels()", {"CUDA_HOME": "/nowhere"})],
    ids=["nothing set", "CUDA_HOME leads nowhere"],
)
def test_a_kernel_compiles_with_nothing_but_the_wheels(prepare: str, environment: dict) -> None:
    home = toolchain.wheel_home()
    assert home is not None, MISSING
    done = run(COMPILE.format(prepare=prepare), **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    path, version = done.stdout.split()[-2:]
    assert Path(path) == home / "bin" / "nvcc"
    assert version.startswith("13.")


def test_no_nvcc_at_all() -> None:
    done = run("from tscompile.language import toolchain\ntoolchain.nvcc()", CUDA_HOME="/nowhere")
    assert "no nvcc: pip install 'tscompile[nvcc]', or set CUDA_HOME" in done.stderr


def test_use_wheels_comes_too_late() -> None:
    assert toolchain.wheel_home() is not None, MISSING
    done = run(
        "import tilelang\nfrom tscompile.language import toolchain\ntoolchain.use_wheels()", CUDA_HOME="/nowhere"
    )
    assert "call use_wheels() before it is imported" in done.stderr


def test_no_wheels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "wheel_home", lambda: None)
    with pytest.raises(toolchain.ToolchainError, match=r"pip install 'tscompile\[nvcc\]'"):
        toolchain.use_wheels()


def test_a_kernel_that_does_not_compile(tmp_path: Path) -> None:
    code = """
import tilelang.language as T, tscompile.language as tl
@T.prim_func
def broken(x: T.Tensor((1,), "int32")):
    with T.Kernel(1, threads=32, prelude="#error this is no kernel\\n") as _:
        x[0] = 1
tl.compile_cuda(broken)
"""
    (tmp_path / "broken_kernel.py").write_text(code)  # TileLang reads the source of a kernel, so it must be in a file
    done = run("import broken_kernel", PYTHONPATH=str(tmp_path))
    assert "ToolchainError" in done.stderr and "this is no kernel" in done.stderr
