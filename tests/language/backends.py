"""What each of TileLang's execution backends makes of a few kernels, up to the step that needs a GPU: loading what was compiled."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import tilelang
import tilelang.language as T
import tvm
from tilelang.backend.module import create_backend_context
from tilelang.engine.lower import lower_with_context

import tscompile.language as tl
from tscompile.language import backends
from tscompile.language.compile import parse
from tscompile.language.dialects import Dialect

from . import kernels
from .kernels import CTX

NO_SYNC = {"tl.disable_thread_storage_sync": True}
OWN_HEADER = """
TSL int own_sum(uint64_t words, int count) {   // a program's own device code may stand on the primitives
  int sum = 0;
  for (int i = 0; i < count; ++i) sum += (int)tsl_x_ld_acquire_sys_u32(words + 4 * i);
  return sum;
}
"""


def own_header(d: Dialect):
    """A function of the kernel's own header, which calls a primitive, on words of a peer."""

    @T.prim_func
    def own_header_kernel(ctx: CTX, words: T.Tensor((8,), "int32"), to: T.int32, out: T.Tensor((1,), "int32")):
        with T.Kernel(1, threads=32, prelude=d.prelude + OWN_HEADER) as _:
            if d.thread() == 0:
                out[0] = T.call_extern("int32", "own_sum", tl.remote(ctx, words[0], to), 8)

    return own_header_kernel


KERNELS: dict[str, tuple[str, Callable[[Dialect], Any], dict[str, Any]]] = {
    "exchange": ("put, get, signal, wait", lambda d: kernels.exchange(d), {}),
    "waiting_gemm": ("wgmma and TMA that wait for a peer", lambda d: kernels.waiting_gemm(d, one_warp=True), {}),
    "bulk": ("tiles to and from a peer by TMA", lambda d: kernels.bulk(d), NO_SYNC),
    "own_header": ("device code of one's own beside the primitives", own_header, {}),
}
"""Name -> (what it shows, how it is written, pass configs). tests/gpu/test_backends.py launches them."""


def written(name: str) -> Any:
    return parse(lambda: KERNELS[name][1](tl.dialect("cuda")))


def lowered(function: Any, target: Any, backend: str, pass_configs: dict[str, Any] | None = None) -> tuple[Any, Any]:
    """(TileLang's context of the compilation, what its backend generated: source for the device and modules)."""
    context = create_backend_context(target, None, backend)
    with tvm.transform.PassContext(opt_level=3, config=pass_configs or {}), context.target:
        return context, lower_with_context(function, context, enable_host_codegen=False, enable_device_compile=False)


def digest(name: str) -> str:
    """Of all that the kernel's text is compiled from: it changes where compiling could have another outcome."""
    d = tl.dialect("cuda")
    _, artifact = lowered(written(name), d.target, "tvm_ffi", KERNELS[name][2])
    return sha256(f"{tilelang.__version__} {artifact.kernel_source}".encode()).hexdigest()[:16]


def compiled(name: str, backend: str) -> bytes:
    """The cubin, or for "cython" the shared library, that a backend makes of a kernel for sm_90a.

    Raises:
        BackendError: the backend refuses such kernels, or is not installed.
        RuntimeError: it does not compile.
    """
    d = tl.dialect("cuda", execution_backend=backend)
    function, pass_configs = written(name), KERNELS[name][2]
    if d.backend == "tvm_ffi":
        kernel = d.compile(function, pass_configs)  # needs no GPU until it is launched
        with tempfile.TemporaryDirectory() as folder:
            kernel.export_library(f"{folder}/kernel.so")
            return Path(folder, "kernel.so").read_bytes()
    if d.backend == "nvrtc":
        backends._check_nvrtc()
    context, artifact = lowered(function, d.target, d.backend, pass_configs)
    wrapper, generator = _tools(d.backend, context.target)
    wrapper.assign_optimized_module(tvm.IRModule({function.attrs["global_symbol"]: function}))
    wrapper.assign_pass_configs(pass_configs)
    wrapper.assign_host_module(artifact.host_mod)
    wrapper.assign_device_module(artifact.device_mod)
    host = wrapper.wrap(artifact.kernel_source)
    generator.assign_pass_configs(pass_configs)
    with tempfile.TemporaryDirectory() as folder, context.target:
        if d.backend == "nvrtc":
            generator.update_lib_code(artifact.kernel_source)
            generator.update_host_func(host["host_func"])
            generator.assign_compile_flags(None)
        else:
            generator.update_lib_code(host)
            generator.assign_compile_flags([f"-L{_stand_in(folder)}"])
        generator.compile_lib()
        made = Path(generator.libpath)
        code = made.read_bytes()
        for path in made.parent.glob(f"{made.stem}.*"):
            path.unlink()
        return code


def _tools(backend: str, target: Any) -> tuple[Any, Any]:
    from tilelang.jit.adapter.wrapper import TLPyWrapper, TLWrapper

    if backend == "nvrtc":
        from tilelang.jit.adapter.nvrtc.libgen import NVRTCLibraryGenerator

        return TLPyWrapper(target), NVRTCLibraryGenerator(target, True)
    from tilelang.jit.adapter.libgen import LibraryGenerator

    return TLWrapper(target), LibraryGenerator(target)


def _stand_in(folder: str) -> str:
    """A folder with a libcuda to link against, where there is no driver: nothing is taken from it before the library is loaded."""
    command = ["cc", "-shared", "-x", "c", "-", "-o", f"{folder}/libcuda.so"]
    subprocess.run(command, input=b"", check=True, timeout=60)
    return folder
