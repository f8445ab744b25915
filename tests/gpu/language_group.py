"""What tests of tscompile.language run in: memory that all ranks map, and kernels that are launched on it.

On GPUs the memory is a symmetric heap, and kernels are cubins launched through the driver, as those of the fused ops are. On CPU
ranks (`--device cpu`) it is a file, and kernels are those of TileLang's C target, to try the tests themselves.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import torch

import tscompile.language as tl
from benchmarks.bench_language import connected_heap, issue
from tests.gpu.conftest import World as Ranks
from tests.language import forms
from tests.language.forms import Form
from tests.language.world import World
from tscompile.nvshmem import stream
from tscompile.templates.nvlink.launch import Kernel

GPU_BYTES, CPU_BYTES = 144 << 20, 4 << 20
_MEET_S = 20.0  # less than what the `together` fixture grants: a rank that failed is heard of there
_COMPILE_S = 100.0
_groups = itertools.count()


def agree(problems: list[str]) -> None:
    """All that is wrong on this rank, said after the last meeting, so that no rank is left waiting."""
    assert not problems, "\n".join(problems[:20])


class Group:
    """Every rank calls the same methods in the same order."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks, self.rank, self.size, self.cuda = ranks, ranks.rank, ranks.size, ranks.cuda
        self.dialect = tl.dialect("cuda" if self.cuda else "cpu")
        self.next, self.last = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        self._test, self._turn = f"start {next(_groups)}", itertools.count()
        self._file: Path | None = None
        if self.cuda:
            self.record = torch.zeros(tl.RECORD_WORDS, dtype=torch.int64).pin_memory()
            self.heap, rows = connected_heap(self.rank, self.size, ranks.device, GPU_BYTES)
            self.memory = World(self.size, device=ranks.device, rows=rows, record=self.record)
            self._cubins = self._compile()
        else:
            self._file = Path("/dev/shm") / f"tscompile-language-{os.environ['MASTER_PORT']}"
            if self.rank == 0:
                World.create(self._file, self.size, CPU_BYTES)
            self.meet()
            self.memory = World(self.size, self._file)
        self._loaded: dict[Form, Callable[..., None]] = {}
        self.clean()

    def release(self) -> None:
        self.meet()
        if self.cuda:
            self.heap.release()
        elif self.rank == 0 and self._file is not None:
            self._file.unlink()

    def _compile(self) -> dict[Form, Future]:
        """All kernels, by all ranks: each begins elsewhere, and what another one is at or has done is not done again."""
        begin = time.monotonic()
        workers = max(2, min(12, len(os.sched_getaffinity(0)) // self.size))
        first = len(forms.FORMS) * self.rank // self.size
        with ThreadPoolExecutor(workers) as pool:
            futures = {form: pool.submit(forms.cubin, form) for form in forms.FORMS[first:] + forms.FORMS[:first]}
        self.ranks.say(f"{len(futures)} kernels, {time.monotonic() - begin:.1f} s")
        self.meet(_COMPILE_S)
        return futures

    def meet(self, seconds: float = _MEET_S) -> None:
        """All work of all ranks is done."""
        self.ranks.synchronize()
        store, turn = self.ranks.store, next(self._turn)
        keys = [f"language/{self._test}/{turn}/{rank}" for rank in range(self.size)]
        store.set(keys[self.rank], "")
        store.wait(keys, timedelta(seconds=seconds))

    def begin(self, test: str) -> None:
        """Count meetings anew: after a test that one rank left early, ranks would be at different ones."""
        self._test, self._turn = test, itertools.count()
        self.clean()

    def clean(self) -> None:
        """Nothing is signalled, nothing is aborted."""
        self.meet()
        self.memory.flags(self.rank, torch.uint8).zero_()
        self.memory.control(self.rank).zero_()
        if self.cuda:
            self.record.zero_()
        self.meet()

    @cache  # noqa: B019  # one group, and contexts must outlive the kernels that read them
    def context(self, timeout_s: float = 10.0) -> torch.Tensor:
        return self.memory.context(self.rank, timeout_s)

    def zeros(self, *shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.zeros(*shape, dtype=dtype, device=self.ranks.device)

    def tensor(self, values: Any, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=self.ranks.device)

    def run(self, *form: Any, **arguments: torch.Tensor | int) -> None:
        """Launch a form on the current stream; arguments by the names of the kernel's parameters."""
        assert form in forms.FORMS or not self.cuda, f"{form} is not in tests/language/forms.py"
        if form not in self._loaded:
            self._loaded[form] = self._cuda_kernel(form) if self.cuda else self._cpu_kernel(form)
            if not self.cuda:  # it was compiled just now
                self.meet(_COMPILE_S)
        self._loaded[form](**arguments)

    def _cuda_kernel(self, form: Form) -> Callable[..., None]:
        cubin, spec = self._cubins[form].result()
        kernel = Kernel(spec, stream.load().load_kernel(cubin, spec.kernel, spec.shared_bytes))

        def launch(**arguments: torch.Tensor | int) -> None:
            known = {
                name: value.data_ptr() if isinstance(value, torch.Tensor) else value
                for name, value in arguments.items()
            }
            values = kernel.values(known)
            issue(stream.steps_of(kernel.step(values, 0)))

        return launch

    def _cpu_kernel(self, form: Form) -> Callable[..., None]:
        function = forms.written(self.dialect, form)
        compiled = self.dialect.compile(function)
        buffers = function.buffer_map
        names = [str(buffers[p].name) if p in buffers else str(p.name) for p in function.params]
        return lambda **arguments: compiled(*(arguments[name] for name in names))
