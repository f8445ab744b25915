"""NVSHMEM's host library, through ctypes: a typed wrapper of the few calls that this package makes.

Not for agreement between ranks (world.py): the calls marked collective hang unless all ranks of the world make them.

torch's CUDA wheels map the library when torch is imported. A second copy in one process would be a second, independent
runtime, so the mapped one is used if there is one. NVSHMEM is never finalised: torch may use it too, and a finalised NVSHMEM
cannot be initialised again.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

from .. import switches
from ..errors import HeapError

SONAME = "libnvshmem_host.so.3"
UID_BYTES = 128
INITIALIZED = 2  # nvshmemx_init_status from here on
_INIT_WITH_UID = 1 << 3
_MAJOR = 1 << 16  # version words of the structs: major version 1, then the struct's size
_ALIGNMENT = 4096  # of the arena, in bytes


class UniqueIdArgs(ctypes.Structure):
    """nvshmemx_uniqueid_args_t, 24 bytes."""

    _fields_ = (
        ("version", ctypes.c_int),
        ("id", ctypes.c_void_p),
        ("myrank", ctypes.c_int),
        ("nranks", ctypes.c_int),
    )


class InitArgs(ctypes.Structure):
    """nvshmemx_init_args_t, 128 bytes."""

    _fields_ = (("version", ctypes.c_int), ("uid_args", UniqueIdArgs), ("content", ctypes.c_char * 96))


class InitAttr(ctypes.Structure):
    """nvshmemx_init_attr_t, 144 bytes."""

    _fields_ = (("version", ctypes.c_int), ("mpi_comm", ctypes.c_void_p), ("args", InitArgs))


class UniqueId(ctypes.Structure):
    """nvshmemx_uniqueid_t, 128 bytes."""

    _fields_ = (("version", ctypes.c_int), ("internal", ctypes.c_char * 124))


def set_environment() -> None:
    """Settings for one host, where the user has made none. NVSHMEM reads them when it makes the id and when it starts.

    They stay set, since NVSHMEM reads some of them later too. A group of this package never leaves the host, so NVSHMEM need
    not look for network cards; multicast (NVLS) is not used, and its set-up fails on some virtual machines. On a host
    whose only interface is the loopback one, the ranks must be told to meet there.
    """
    os.environ.setdefault("NVSHMEM_REMOTE_TRANSPORT", "none")
    os.environ.setdefault("NVSHMEM_DISABLE_NVLS", "1")
    try:
        interfaces = set(os.listdir("/sys/class/net"))
    except OSError:
        return
    if interfaces <= {"lo"}:
        os.environ.setdefault("NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME", "lo")


class Nvshmem:
    """The library of this process.

    Args:
        library: the ctypes library, or an object with the same functions.
        source: where it came from, for messages.

    Raises:
        HeapError: the library lacks a function.

    Attributes:
        arena: (address, size in bytes) of this process's arena; None before `allocate`.
    """

    def __init__(self, library: Any, source: str) -> None:
        self.source = source
        self.arena: tuple[int, int] | None = None
        self._library = library
        self._kept: list[object] = []  # structs that the library may read after the call that took them
        address, number, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
        signatures: dict[str, tuple[list[Any], Any]] = {
            "nvshmemx_init_status": ([], number),
            "nvshmemx_get_uniqueid": ([address], number),
            "nvshmemx_set_attr_uniqueid_args": ([number, number, address, address], number),
            "nvshmemx_hostlib_init_attr": ([ctypes.c_uint, address], number),
            "nvshmem_my_pe": ([], number),
            "nvshmem_n_pes": ([], number),
            "nvshmem_align": ([size, size], address),
            "nvshmem_ptr": ([address, number], address),
            "nvshmemx_cumodule_init": ([address], number),
            "nvshmemx_vendor_get_version_info": ([address, address, address], None),
        }
        for name, (arguments, result) in signatures.items():
            try:
                function = getattr(library, name)
            except AttributeError as error:
                raise HeapError(f"{source} has no {name}: install the NVSHMEM that torch asks for") from error
            function.argtypes, function.restype = arguments, result

    def version(self) -> str:
        """Such as "3.4.5"."""
        parts = [ctypes.c_int() for _ in range(3)]
        self._library.nvshmemx_vendor_get_version_info(*(ctypes.byref(part) for part in parts))
        return ".".join(str(part.value) for part in parts)

    def initialized(self) -> bool:
        """Whether somebody in this process has initialised NVSHMEM."""
        return int(self._library.nvshmemx_init_status()) >= INITIALIZED

    def position(self) -> tuple[int, int]:
        """(this process's PE, number of PEs); only after the initialisation."""
        return int(self._library.nvshmem_my_pe()), int(self._library.nvshmem_n_pes())

    def unique_id(self) -> bytes:
        """A new id that all ranks of a world pass to `initialize`; 128 bytes. The process that makes it must be rank 0.

        Raises:
            HeapError: NVSHMEM cannot listen on an interface.
        """
        uid = UniqueId(version=_MAJOR + ctypes.sizeof(UniqueId))
        code = self._library.nvshmemx_get_uniqueid(ctypes.byref(uid))
        if code:
            raise HeapError(
                f"nvshmemx_get_uniqueid fails with {code}: name an interface in NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME, "
                "such as lo; NVSHMEM_DEBUG=WARN says more"
            )
        return bytes(uid)

    def initialize(self, uid: bytes, rank: int, size: int) -> None:
        """Join the world; collective. CUDA is initialised on the rank's own device before.

        Raises:
            HeapError: NVSHMEM does not start.
        """
        own = UniqueId.from_buffer_copy(uid)
        attributes = InitAttr(version=_MAJOR + ctypes.sizeof(InitAttr))
        attributes.args.version = _MAJOR + ctypes.sizeof(InitArgs)
        attributes.args.uid_args.version = _MAJOR + ctypes.sizeof(UniqueIdArgs)
        self._kept += [own, attributes]
        code = self._library.nvshmemx_set_attr_uniqueid_args(rank, size, ctypes.byref(own), ctypes.byref(attributes))
        if not code:
            code = self._library.nvshmemx_hostlib_init_attr(_INIT_WITH_UID, ctypes.byref(attributes))
        if code or not self.initialized():
            raise HeapError(f"NVSHMEM does not start (code {code}): NVSHMEM_DEBUG=WARN says why")
        if self.position() != (rank, size):
            raise HeapError(f"NVSHMEM started as PE {self.position()}, not as {(rank, size)}: report this")

    def allocate(self, nbytes: int) -> None:
        """Allocate this process's arena; collective, with the same size on all ranks. Its contents are undefined.

        Raises:
            HeapError: no room on this rank's GPU.
        """
        address = self._library.nvshmem_align(_ALIGNMENT, nbytes)
        if not address:
            mib = nbytes >> 20
            raise HeapError(f"NVSHMEM has no room for {mib} MiB on the GPU: lower tilescale.heap_bytes, or free memory")
        self.arena = (int(address), nbytes)

    def peer_address(self, address: int, pe: int) -> int:
        """Where `address`, in this process's arena, lies in the arena of `pe`, as mapped here; 0 if it is not mapped."""
        return int(self._library.nvshmem_ptr(address, pe) or 0)

    def initialize_module(self, module: int) -> None:
        """Let the kernels of a loaded module use NVSHMEM. `module`: a CUmodule that holds NVSHMEM's device state.

        Raises:
            HeapError: NVSHMEM is not initialised, or refuses the module.
        """
        if not self.initialized():
            raise HeapError(
                "a kernel with NVSHMEM calls is loaded before NVSHMEM has started: make a tl.SymmetricGroup on GPUs first"
            )
        code = self._library.nvshmemx_cumodule_init(module)
        if code:
            raise HeapError(
                f"NVSHMEM {self.version()} refuses a kernel's module (code {code}): compile the kernel anew in this environment, "
                "whose headers must be of the library's version; NVSHMEM_DEBUG=WARN says more"
            )


def wheel_library() -> Path | None:
    """The library of the NVSHMEM wheel, None if there is no wheel."""
    try:
        spec = importlib.util.find_spec("nvidia.nvshmem")
    except (ImportError, ValueError):
        return None
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    return next((path for folder in folders if (path := Path(folder) / "lib" / SONAME).exists()), None)


@lru_cache(maxsize=1)
def load() -> Nvshmem:
    """The library that torch has mapped, else that of the wheel. Does not initialise NVSHMEM.

    Raises:
        HeapError: there is none, it cannot be loaded, or the user does not want it; the message says what to do.
    """
    if switches.switch(switches.NVSHMEM) is False:
        raise HeapError(f"{switches.NVSHMEM} asks to do without it: unset it, or set it to 1")
    try:
        return Nvshmem(ctypes.CDLL(SONAME, mode=os.RTLD_NOLOAD | os.RTLD_NOW), "the library that torch has mapped")
    except OSError:
        path = wheel_library()
    if path is None:
        raise HeapError(
            "there is no NVSHMEM library: install a CUDA build of torch, or the extra cu12 or cu13 of tscompile"
        )
    try:
        return Nvshmem(ctypes.CDLL(str(path)), "the library of the wheel")
    except OSError as error:
        raise HeapError(f"NVSHMEM cannot be loaded ({error}): reinstall the wheel of torch's CUDA version") from error
