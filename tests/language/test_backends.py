"""TileLang's execution backends: which kernels they compile, and what is said of those that cannot. No GPU needed."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import tilelang
import torch

import tscompile.language as tl
from tscompile.errors import BackendError
from tscompile.language import backends, toolchain
from tscompile.language.backends import Backend

from . import backends as compilers
from . import kernels


@pytest.mark.parametrize(
    ("backend", "target", "chosen"),
    [
        ("auto", "cuda", "tvm_ffi"),
        ("tvm_ffi", "cuda", "tvm_ffi"),
        ("cython", "cuda", "cython"),
        ("nvrtc", "cuda", "nvrtc"),
        ("auto", "cpu", "cython"),
        ("cython", "cpu", "cython"),
    ],
)
def test_what_is_chosen(backend: Backend, target: tl.Target, chosen: str) -> None:
    assert tl.dialect(target, execution_backend=backend).backend == chosen


@pytest.mark.parametrize(
    ("backend", "target", "said"),
    [
        ("cutedsl", "cuda", '\'cutedsl\' cannot be used: it turns a kernel into Python .*: use "tvm_ffi", "cython" or'),
        ("torch", "cuda", "'torch' cannot be used: it is for Apple's GPUs: use"),
        ("nvcc", "cuda", "'nvcc' cannot be used: TileLang has none of this name: use one of tvm_ffi, cython, nvrtc"),
        (
            "nvrtc",
            "cpu",
            "'nvrtc' cannot be used: TileLang compiles its C target with \"cython\" only: leave it out for",
        ),
        ("cutedsl", "cpu", "'cutedsl' cannot be used: TileLang compiles its C target with"),
    ],
)
def test_what_can_never_serve(backend: Backend, target: tl.Target, said: str) -> None:
    with pytest.raises(BackendError, match=said) as raised:
        tl.dialect(target, execution_backend=backend)
    assert raised.value.backend == backend


def test_the_default_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TILELANG_EXECUTION_BACKEND", "cython")
    assert tl.dialect("cuda").backend == tl.dialect("cpu").backend == "cython"
    assert tl.dialect("cuda", execution_backend="nvrtc").backend == "nvrtc"
    monkeypatch.setenv("TILELANG_EXECUTION_BACKEND", "cutedsl")
    with pytest.raises(BackendError, match=r"prelude.* \(named by TILELANG_EXECUTION_BACKEND\): use"):
        tl.dialect("cuda")


def test_a_target_without_the_primitives() -> None:
    """`tilelang.jit(target="cutedsl")` writes the kernel within its target; elsewhere `dialect` is the one to ask."""
    from tvm.target import Target

    with (
        Target({"kind": "cuda", "arch": "sm_90a", "keys": ["cuda", "gpu", "cutedsl"]}),
        pytest.raises(BackendError, match="'cutedsl' cannot be used"),
    ):
        kernels.exchange(tl.dialect("cuda"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_what_needs_a_gpu_to_compile_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    function = kernels.put_remote(tl.dialect("cuda"), 100)
    with pytest.raises(
        BackendError, match='no GPU with a driver here: compile on a machine with a GPU, or with "tvm_ffi"'
    ):
        tl.dialect("cuda", execution_backend="cython").compile(function)
    monkeypatch.setattr(backends, "_check_nvrtc", lambda: None)
    with pytest.raises(BackendError, match="'nvrtc' cannot be used: it loads a kernel as soon as"):
        tl.dialect("cuda", execution_backend="nvrtc").compile(function)


def test_no_nvcc(monkeypatch: pytest.MonkeyPatch) -> None:
    """Said where TileLang fails without it; a failure beside a good nvcc stays what it is."""

    def fails(*_: object, **__: object) -> Path:
        raise RuntimeError("what TileLang says")

    def none() -> Path:
        raise toolchain.ToolchainError("no nvcc: pip install")

    function = kernels.put_remote(tl.dialect("cuda"), 100)
    monkeypatch.setattr(tilelang, "compile", fails)
    monkeypatch.setattr(toolchain, "nvcc", Path)
    with pytest.raises(RuntimeError, match="what TileLang says"):
        tl.dialect("cuda").compile(function)
    monkeypatch.setattr(toolchain, "nvcc", none)
    with pytest.raises(toolchain.ToolchainError, match="no nvcc: pip install"):
        tl.dialect("cuda").compile(function)


class Nvrtc:
    """Stands for cuda.bindings.nvrtc where libnvrtc is missing."""

    def nvrtcVersion(self) -> None:
        raise RuntimeError("no libnvrtc.so\nand more")


def test_what_nvrtc_lacks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real, missing = importlib.import_module, {"cuda.bindings.driver", "cuda.bindings.nvrtc"}

    def imported(name: str, *more: str) -> object:
        if name in missing:
            raise ImportError(f"No module named {name!r}")
        return Nvrtc() if name.startswith("cuda.bindings") else real(name, *more)

    monkeypatch.setattr(importlib, "import_module", imported)
    with pytest.raises(BackendError, match=r"bindings of CUDA are missing .*: pip install 'tscompile\[nvrtc\]'"):
        backends._check_nvrtc()
    missing.clear()
    with pytest.raises(BackendError, match=r"libnvrtc cannot be loaded \(no libnvrtc.so\): pip install"):
        backends._check_nvrtc()
    monkeypatch.setattr(Nvrtc, "nvrtcVersion", lambda self: None)
    monkeypatch.setattr(sys.modules["tilelang.env"], "CUDA_HOME", str(tmp_path))
    with pytest.raises(BackendError, match=rf"there is no cuda_runtime.h under {tmp_path}: set CUDA_HOME"):
        backends._check_nvrtc()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["tvm_ffi", "cython", "nvrtc"])
def test_a_kernel_of_the_table_really_compiles(backend: str) -> None:
    """All of them are compiled when the table in docs/language.md is made."""
    if backend == "nvrtc":
        try:
            backends._check_nvrtc()
        except BackendError as error:
            pytest.skip(str(error))
    name = "own_header" if backend == "cython" else "waiting_gemm"  # nvcc takes long for the whole of a program
    code = compilers.compiled(name, backend)
    assert code[:4] == b"\x7fELF" and f"{name}_kernel_kernel".encode() in code


def test_kernels_of_the_cython_backend_start_in_stream_order() -> None:
    """TileLang launches them with an attribute that lets them start early; the macro of cuda.h takes it away."""
    from tilelang.jit.adapter import wrapper

    attribute = "cudaLaunchAttributeProgrammaticStreamSerialization"
    assert f"attribute[0].id = {attribute};" in wrapper.KERNEL_LAUNCH_FUNC_CODE, "no longer so: drop the macro"
    prelude = tl.prelude("cuda")
    assert prelude is not None
    text = f"#include <cuda_runtime.h>\n{prelude}\nint id = {attribute};\n"
    done = subprocess.run(
        [str(toolchain.nvcc()), "-E", "-x", "cu", "-"], input=text, capture_output=True, text=True, timeout=120
    )
    assert "int id = cudaLaunchAttributeIgnore;" in done.stdout, done.stderr


def test_cutedsl_still_drops_the_prelude() -> None:
    """The reason it is refused for: names of the primitives, and nothing that they could name."""
    from tilelang.jit.adapter.cutedsl.checks import check_cutedsl_available

    try:
        check_cutedsl_available()
    except ImportError as error:
        pytest.skip(str(error))
    target = {"kind": "cuda", "arch": "sm_90a", "keys": ["cuda", "gpu", "cutedsl"]}
    _, artifact = compilers.lowered(compilers.written("exchange"), target, "cutedsl")
    assert "tsl_x_copy_block(" in artifact.kernel_source and "def tsl_x_copy_block" not in artifact.kernel_source
    assert "#pragma once" not in artifact.kernel_source
