"""The tables of tscompile.language: its primitives, traced and compiled for both targets, and TileLang's execution backends.

Compiling with each backend takes a minute, so what came out stands in backends.json beside a digest of what was compiled; a cell whose
digest is no longer right is compiled anew. Everything else is made each time.
"""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from markdown_table import table

import tscompile.language as tl
from tests.language import backends, uses
from tscompile.errors import BackendError
from tscompile.language import toolchain
from tscompile.language.dialects import Dialect

RECORD = Path(__file__).with_name("backends.json")
BACKENDS = {
    "tvm_ffi": ("TVM's runtime, the default", "nvcc; no GPU until the first launch"),
    "cython": ("a shared library with the CUDA runtime", "nvcc, and a GPU with its driver where it compiles"),
    "nvrtc": (
        "NVIDIA's run-time compiler, launched from Python",
        "`tscompile[nvrtc]`, headers of CUDA, a GPU with its driver",
    ),
    "cutedsl": ("Python for the CuTe DSL", "`nvidia-cutlass-dsl`"),
}

_GIVES_UP = (
    "st.relaxed.sys.global.u32",
    "ld.relaxed.sys.global.u32",
    "st.volatile",
    "membar.sys",
    "fence.sc.sys",
    "atom.sys",
)
_SHOWN = r"(?:ld|st|atom|red|cp|fence|membar|bar|barrier|mbarrier|vote|shfl|elect)\b"


# ---- primitives ----


def source(d: Dialect, name: str) -> str:
    """What TileLang generates for the use of a primitive.

    Raises:
        ValueError: the target does not have it.
    """
    _, artifact = backends.lowered(uses.function_of(d, name), d.target, d.backend, backends.NO_SYNC)
    return str(artifact.kernel_source)


def refusals() -> dict[str, str]:
    """Primitives that the C target does not have, and why: the text of the error where such a kernel is written.

    All others are compiled for it, together, and linked with the library of the primitives.

    Raises:
        CalledProcessError: one of them does not compile.
    """
    d = tl.dialect("cpu")
    texts, refused = [], {}
    for _, name, _ in uses.primitives():
        try:
            texts.append(source(d, name))
        except ValueError as error:
            refused[name] = str(error)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "uses.cpp")
        path.write_text("".join(texts))
        from tilelang.env import TILELANG_TEMPLATE_PATH

        command = [
            "g++",
            "-std=c++17",
            "-shared",
            "-fPIC",
            "-Wl,--no-undefined",
            f"-I{TILELANG_TEMPLATE_PATH}",
        ]
        command += [str(path), "-o", f"{folder}/uses.so", *d.compile_flags()[1:]]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    return refused


def instructions() -> dict[str, list[str]]:
    """Per primitive the PTX instructions that its use is made of: accesses, fences, barriers and votes, in order, each once."""
    d = tl.dialect("cuda")
    texts = {name: source(d, name) for _, name, _ in uses.primitives()}
    start = 'extern "C" __global__'
    head = next(iter(texts.values()))
    bodies = [text[text.index(start) :] for text in texts.values()]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "uses.cu")
        path.write_text(head[: head.index(start)] + "".join(bodies))
        from tilelang.contrib.nvcc import default_compile_options

        command = [
            str(toolchain.nvcc()),
            "-ptx",
            "-arch=sm_90a",
            *default_compile_options(),
            "-o",
            f"{folder}/uses.ptx",
            str(path),
        ]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
        ptx = Path(folder, "uses.ptx").read_text()
    entries = dict(re.findall(r"\.entry (use_\w+)_kernel\b.*?\n\{(.*?)\n\}", ptx, re.DOTALL))
    return {name: _shown(entries[uses.symbol(name)]) for name in texts}


def _shown(body: str) -> list[str]:
    """Instructions of the primitives' own code (inline assembly), and those that nvcc's intrinsics become."""
    own = " ".join(re.findall(r"// begin inline asm(.*?)// end inline asm", body, re.DOTALL))
    intrinsics = re.findall(r"\b(?:vote|shfl|bar|barrier|atom|red|membar|fence)\.[\w.:]+", body)
    found = list(dict.fromkeys([*re.findall(rf"(?<![\w.%@])(?:{_SHOWN})[\w.:]*|%laneid", own), *intrinsics]))
    if "globaltimer" in body:  # a bounded wait: how it gives up is the same everywhere, and explained beside the table
        found = [name for name in found if not name.startswith(_GIVES_UP)]
    return found


def summary(function: Any) -> str:
    """The first sentence of a docstring."""
    text = " ".join((inspect.getdoc(function) or "").split("\n\n")[0].split())
    return re.split(r"(?<=\.)\s", text)[0]


def signature(function: Any) -> str:
    parameters = inspect.signature(function).parameters.values()
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
    return str(inspect.Signature(plain)).replace(str(0xFFFFFFFF), "0xFFFFFFFF")


def primitives() -> str:
    refused, ptx, parts = refusals(), instructions(), []
    for module, heading in uses.MODULES.items():
        rows = []
        for owner, name, function in uses.primitives():
            if owner == module:
                lowered = ", ".join(f"`{one}`" for one in ptx[name]) or "arithmetic on the context"
                rows.append(
                    [
                        f"`{name}{signature(function)}`",
                        summary(function),
                        lowered,
                        f"no. {refused[name]}" if name in refused else "yes",
                    ]
                )
        parts.append(f"## {heading}\n\n" + table(["call", "what it does", "PTX of a use, sm_90a", "C target"], rows))
    return "\n\n".join(parts)


# ---- execution backends ----


def outcome(kernel: str, backend: str) -> str:
    """What compiling a kernel with a backend came to, in a few words.

    Raises:
        SystemExit: the backend is not installed here, so nobody can say.
    """
    try:
        tl.dialect("cuda", execution_backend=backend)
    except BackendError:
        return "refused"
    try:
        code = backends.compiled(kernel, backend)
    except BackendError as error:
        raise SystemExit(f"docs: the table of execution backends must be made anew: {error}") from error
    assert code[:4] == b"\x7fELF"
    return "compiles"


def record(check: bool) -> dict[str, dict[str, dict[str, str]]]:
    """The outcomes, kernel by kernel: those on record where they are still right; the others are found out, or with `check` "stale"."""
    known = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    found: dict[str, dict[str, dict[str, str]]] = {}
    for kernel in backends.KERNELS:
        digest = backends.digest(kernel)
        for backend in BACKENDS:
            cell = known.get(kernel, {}).get(backend, {})
            if cell.get("digest") != digest:
                cell = {"digest": digest, "outcome": "stale" if check else outcome(kernel, backend)}
            found.setdefault(kernel, {})[backend] = cell
    return found


def execution_backends(check: bool) -> str:
    found = record(check)
    if not check:
        RECORD.write_text(json.dumps(found, indent=1) + "\n")
    header = ["backend", "what it is", "needs", *(shows for shows, _, _ in backends.KERNELS.values()), "C target"]
    rows = []
    for backend, (what, needs) in BACKENDS.items():
        cells = [found[kernel][backend]["outcome"] for kernel in backends.KERNELS]
        try:
            tl.dialect("cpu", execution_backend=backend)  # type: ignore[arg-type]
            on_c = "compiles"
        except BackendError:
            on_c = "refused"
        rows.append([f"`{backend}`", what, needs, *cells, on_c])
    return table(header, rows)
