"""Every kernel that tests/gpu/test_language.py launches, so that all can be compiled before, and without a GPU."""

from __future__ import annotations

from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import tscompile.language as tl
from tscompile.language.compile import lower, parse
from tscompile.language.dialects import Dialect
from tscompile.language.launch_spec import LaunchSpec
from tscompile.templates.nvlink import jit

from . import copy_kernels, kernels, message_kernels, rank_kernels, thread_kernels

Form = tuple[Any, ...]
"""Name of a function of the modules below, and its arguments after the dialect."""

INTEGERS = [f"{sign}int{bits}" for bits in (8, 16, 32, 64) for sign in ("", "u")]
FLOATS = ["float16", "bfloat16", "float32", "float64", "float8_e4m3fn", "float8_e5m2"]
ELEMENTS = [*((kernels.carrier(dtype), dtype) for dtype in INTEGERS), *((dtype, dtype) for dtype in FLOATS)]
WIDE = [("float32", 4), ("float16", 8), ("int64", 2)]
TYPED = [("uint8", 1), ("bfloat16", 2), ("float32", 4), ("int64", 8)]
SUMS = ["uint32", "uint64", "float32"]
FLAGS = ["int32", "uint32", "int64", "uint64"]
WRAPPED = ["uint32", "int64"]
SHUFFLED = ["int32", "uint32", "float32", "int64", "uint64", "float64"]
JOBS, TILES, ADDERS, MESSENGERS, GRID = 512, 128, 16, 8, 132

FORMS: list[Form] = [
    ("copies", JOBS),
    *(("typed_copies", *form) for form in TYPED),
    ("tiles", TILES),
    ("bulk",),
    *(("every_word", *form) for form in ELEMENTS),
    *(("every_wide_word", *form) for form in WIDE),
    *(("adds", dtype, ADDERS) for dtype in SUMS),
    *(("signals", dtype) for dtype in FLAGS),
    *(("signals", dtype, ("epoch",)) for dtype in WRAPPED),
    *(("messages", way, MESSENGERS) for way in message_kernels.WAYS),
    ("stuck",),
    ("threads",),
    ("votes",),
    *(("shuffles", dtype) for dtype in SHUFFLED),
    ("handovers",),
    *(("meetings", blocks) for blocks in (1, GRID)),
    ("grid", GRID),
    ("who",),
    ("named_waits",),
]

_MODULES = (kernels, copy_kernels, rank_kernels, message_kernels, thread_kernels)


def written(d: Dialect, form: Form) -> Any:
    """The prim_func of a form."""
    (module,) = [module for module in _MODULES if form[0] in vars(module)]
    return parse(lambda: getattr(module, form[0])(d, *form[1:]))


def pass_configs(form: Form) -> dict[str, Any] | None:
    """Kernels that hand shared memory to primitives say themselves where their blocks meet."""
    shared = form[0] in ("bulk", "tiles", "stuck") or (form[0] == "messages" and form[1] in message_kernels.BULK)
    return {"tl.disable_thread_storage_sync": True} if shared else None


def lowered(form: Form) -> Any:
    """What TileLang makes of a form."""
    return lower(written(tl.dialect("cuda"), form), pass_configs=pass_configs(form))


@cache
def _texts() -> str:
    files = sorted(Path(__file__).parent.glob("*kernels.py"))
    return sha256(b"".join(path.read_bytes() for path in [*files, Path(__file__)])).hexdigest()


def cubin(form: Form) -> tuple[bytes, LaunchSpec]:
    """The compiled kernel of a form, from tscompile's cache directory if it is there."""

    def build() -> tuple[bytes, LaunchSpec]:
        from tscompile.language.compile import build_cubin

        return build_cubin(written(tl.dialect("cuda"), form), pass_configs=pass_configs(form))

    return jit.kept(f"test-{form[0]}", f"{form} {_texts()}", build)
