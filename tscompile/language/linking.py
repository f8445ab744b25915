"""How a kernel with NVSHMEM calls gets NVSHMEM's device code.

    inline   The headers are compiled into the kernel: no separate code, no penalty for matrix instructions. The default.
    rdc      Relocatable device code, linked with libnvshmem_device.a by nvlink. Real calls, for which ptxas drops setmaxnreg and
             serialises wgmma, so kernels that have either are refused.

In either way the cubin holds NVSHMEM's device state, which must be initialised when the module is loaded: modules.py does it for
TileLang's kernels, nvshmem/stream.py for those that are launched through the driver.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from tvm.tirx.stmt_functor import post_order_visit

from ..errors import HeapError
from ..nvshmem import headers
from . import toolchain

Linking = Literal["inline", "rdc"]

MARK = "tsl_nv_ready"
"""Stands in a kernel's source if its prelude has NVSHMEM."""

NO_WARP_SPECIALIZATION = "tl.disable_warp_specialized"
_SERIALISED = re.compile(r"\b(wgmma\.mma_async|setmaxnreg)\b")
_BLOCK_CALL = re.compile(r"tsl_x_(nv|team)_\w+_block$")


def checked(linking: str) -> Linking:
    """`linking`, if it is one.

    Raises:
        ValueError: it is not.
    """
    if linking not in ("inline", "rdc"):
        raise ValueError(f"nvshmem {linking!r}: inline or rdc")
    return "rdc" if linking == "rdc" else "inline"


def options(linking: Linking) -> list[str]:
    """What nvcc needs. They name NVSHMEM's version, so that caches which are keyed by them do not mix versions.

    Raises:
        HeapError: no NVSHMEM is installed, or its folder's name has a blank in it.
    """
    found = headers.find()
    include = found.inlined() if linking == "inline" else found.include
    if any(letter.isspace() for letter in str(include)):
        raise HeapError(
            f"{include}: TileLang splits flags at blanks: install NVSHMEM, and set XDG_CACHE_HOME, without any"
        )
    version = f"-DTSL_NVSHMEM={'.'.join(map(str, found.version))}"
    if linking == "rdc":
        return [f"-I{include}", version, "-rdc=true"]
    inline = [f"-I{include}", version, "-DNVSHMEM_ENABLE_ALL_DEVICE_INLINING"]
    # Older headers define the version that the host library looks for in this case only.
    return inline if found.version >= headers.INLINES else [*inline, "-D__NVSHMEM_NUMBA_SUPPORT__"]


def link(nvcc: Path, ptx: Path, arch: str, cubin: Path) -> str:
    """Assemble relocatable PTX and link it with NVSHMEM's device library; returns what the tools said.

    Raises:
        ToolchainError: the kernel has instructions that this way of linking ruins, or a tool failed.
    """
    ruined = sorted(set(_SERIALISED.findall(ptx.read_text())))
    if ruined:
        raise toolchain.ToolchainError(
            f"nvshmem='rdc' in a kernel with {' and '.join(ruined)}: beside separately compiled code ptxas ignores setmaxnreg "
            "(C7504) and serialises wgmma (C7509). Use nvshmem='inline', or make the communication a kernel of its own"
        )
    part = cubin.with_suffix(".relocatable.cubin")
    log = toolchain.run([str(nvcc), "-cubin", "-rdc=true", "-Xptxas", "-v", f"-arch={arch}", "-o", str(part), str(ptx)])
    library = ["-L", str(headers.find().library), "-lnvshmem_device"]
    nvlink = str(nvcc.with_name("nvlink"))
    return log + toolchain.run([nvlink, f"-arch={arch}", "-o", str(cubin), str(part), *library])


def calls(function: Any) -> set[str]:
    """The entry points of the language that a prim_func calls."""
    found: set[str] = set()

    def visit(node: Any) -> None:
        if type(node).__name__ == "Call" and len(node.args) and type(node.args[0]).__name__ == "StringImm":
            found.add(str(node.args[0].value))

    post_order_visit(function.body, visit)
    return {name for name in found if name.startswith("tsl_x_")}


def pass_configs(function: Any, given: dict[str, Any] | None) -> dict[str, Any] | None:
    """`given`, and without TileLang's warp specialisation if all threads of a block must make a call: it would leave some out.

    Raises:
        ValueError: `given` asks for warp specialisation.
    """
    joint = sorted(name for name in calls(function) if _BLOCK_CALL.match(name))
    if not joint:
        return given
    if given is not None and given.get(NO_WARP_SPECIALIZATION) is False:
        raise ValueError(
            f"{NO_WARP_SPECIALIZATION}=False: {joint[0].removeprefix('tsl_x_')} is called by all threads of a block, and specialised "
            "warps would leave some out: use the forms of a warp"
        )
    return {**(given or {}), NO_WARP_SPECIALIZATION: True}
