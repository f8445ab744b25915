"""One template text for two targets: CUDA, and the C target in which a block is one thread and the grid a loop.

    def template(d: Dialect, rows: int):
        @T.prim_func
        def kernel(...):
            with T.Kernel(rows, threads=128, prelude=d.prelude) as block:
                thread = d.thread()
                tl.put_block(..., thread, 128)
                d.sync()
        return kernel

    kernel = dialect("cuda").compile(template(dialect("cuda"), 16))

On the C target: tiles are float32; parameters are not uint32 (declare int32 and pass `dtype="uint32"` where it matters); blocks run one
after another, the first axis of the grid outermost, so none may wait for a later one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import tilelang
import tilelang.language as T
from tilelang.language.kernel import KernelLaunchFrame

from ..errors import HeapError
from ..nvshmem import native
from . import backends, linking, modules, toolchain
from .backends import Backend
from .linking import Linking

_HERE = Path(__file__).parent

Target = Literal["cuda", "cpu"]


_HEADERS = ("cuda.h", "cuda_words.h", "cuda_grid.h", "cuda_team.h")


@lru_cache(maxsize=2)
def _cuda_header(nvshmem: bool) -> str:
    return "".join((_HERE / name).read_text() for name in (*_HEADERS, *["cuda_nvshmem.h"] * nvshmem))


def prelude(target: Target, nvshmem: bool = False) -> str | None:
    """What to pass as `T.Kernel(prelude=...)`; `nvshmem`: with what calls of `tl.nvshmem` need.

    The text of the headers itself, not an `#include`: TileLang's cache key covers the text of a kernel and no file it includes. None on
    the C target, whose functions are in a library that `Dialect.compile_flags` links.

    Raises:
        ValueError: no such target.
    """
    if target not in ("cuda", "cpu"):
        raise ValueError(f"target {target!r}: cuda or cpu")
    return _cuda_header(nvshmem) if target == "cuda" else None


def only_cuda(what: str, reason: str) -> None:
    """Refuse what the C target cannot do, where it is written: a kernel is for the C target if it has no prelude.

    Raises:
        ValueError: the kernel that is being written has none.
    """
    frame = KernelLaunchFrame.Current()
    if frame is not None and "pragma_import_c" not in frame.frames[-1].annotations:
        raise ValueError(f"{what}: not on the C target (a kernel without tl.prelude): {reason}")


def cpu_library() -> Path:
    """The library of the primitives for the C target, compiled if need be. Its name holds a digest of its source.

    Raises:
        HeapError: it cannot be compiled; the message says what to do.
    """
    return native.build(_HERE / "cpu.c", headers=tuple(sorted(_HERE.glob("cpu*.h"))))


@dataclass(frozen=True)
class Dialect:
    """How a template says the same thing on one target.

    Attributes:
        name: "cuda" or "cpu".
        target: for `tilelang.compile`.
        backend: execution backend for `tilelang.compile`: "tvm_ffi", "cython" or "nvrtc"; "cython" on the C target.
        prelude: for `T.Kernel`.
        alloc_shared, alloc_fragment: tiles; plain local arrays on the C target, where shared memory does not work.
        parallel: a parallel loop over a tile.
        nvshmem: how kernels get NVSHMEM's device code; None if they make none of its calls.
    """

    name: Target
    target: Any
    backend: str
    prelude: str | None
    alloc_shared: Callable[..., Any]
    alloc_fragment: Callable[..., Any]
    parallel: Callable[..., Any]
    nvshmem: Linking | None = None

    def thread(self) -> Any:
        """Number of this thread in its block, int32."""
        return T.get_thread_binding() if self.name == "cuda" else T.int32(0)

    def sync(self) -> Any:
        """Barrier of the block (of the consumers, in a warp-specialised kernel)."""
        return T.sync_threads() if self.name == "cuda" else T.int32(0)

    def compile_flags(self) -> list[str]:
        """For `tilelang.compile`. On the C target they link the primitives, and turn the optimiser on, which it is not by default.

        Raises:
            HeapError: the primitives cannot be compiled, the cache directory's name has a blank in it, or there is no NVSHMEM.
        """
        if self.name == "cuda":
            return [] if self.nvshmem is None else linking.options(self.nvshmem)
        library = cpu_library()
        if any(letter.isspace() for letter in str(library)):
            raise HeapError(f"{library}: TileLang splits flags at blanks: set XDG_CACHE_HOME to a path without any")
        return ["-O2", str(library), f"-Wl,-rpath,{library.parent}"]

    def compile(self, function: Any, pass_configs: dict[str, Any] | None = None) -> Any:
        """The compiled kernel of a prim_func, from TileLang's cache if it is there; `pass_configs` as TileLang takes them.

        Raises:
            BackendError: the execution backend lacks something on this machine; the message says what, and how to get it.
            HeapError: as `compile_flags`.
            ValueError: pass configs that do not go with the kernel's calls.
            ToolchainError: there is no nvcc, or NVSHMEM cannot be linked this way.
        """
        backends.check(self.backend, self.name)
        if self.nvshmem == "rdc":
            modules.link_where_asked()
        try:
            kernel = tilelang.compile(
                function,
                target=self.target,
                execution_backend=self.backend,
                compile_flags=self.compile_flags(),
                pass_configs=linking.pass_configs(function, pass_configs) if self.name == "cuda" else pass_configs,
            )
        except Exception:
            if self.name == "cuda" and self.backend != "nvrtc":
                toolchain.nvcc()  # not before: a kernel in the cache needs none
            raise
        return kernel if self.nvshmem is None else modules.NvshmemKernel(kernel)


def dialect(
    target: Target, arch: str = "sm_90a", execution_backend: Backend = "auto", nvshmem: Linking | None = None
) -> Dialect:
    """The dialect of a target.

    Args:
        target: "cuda" or "cpu".
        arch: of the GPU, for CUDA; compiling with "tvm_ffi" needs no GPU.
        execution_backend: TileLang's, as `tilelang.compile` takes it. "auto": what TILELANG_EXECUTION_BACKEND says, else "tvm_ffi"
            for CUDA and "cython" for the C target.
        nvshmem: "inline" or "rdc" for kernels with calls of `tl.nvshmem`, see docs/language.md. CPU ranks need neither.

    Raises:
        ValueError: no such target, or no such way to link NVSHMEM.
        BackendError: kernels with these primitives, or with NVSHMEM's calls, cannot be compiled by this backend; the message says why.
    """
    way = None if nvshmem is None else linking.checked(nvshmem)
    text, backend = prelude(target, nvshmem=way is not None), backends.choose(execution_backend, target)
    if target == "cpu":
        return Dialect("cpu", "c", backend, text, T.alloc_local, T.alloc_local, T.grid)
    if way is not None:
        backends.refuse_linking(backend)
    kind = {"kind": "cuda", "arch": arch}
    return Dialect("cuda", kind, backend, text, T.alloc_shared, T.alloc_fragment, T.Parallel, way)
