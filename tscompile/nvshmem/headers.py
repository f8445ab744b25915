"""NVSHMEM's headers and device library: those of the host library that this process uses.

A kernel whose module was built with the headers of another version is refused when its state is initialised, so they are looked for
beside the library that torch has mapped, then in the wheel.
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

from filelock import FileLock

from ..errors import HeapError
from .host import SONAME, wheel_library
from .native import cache_dir

INLINES = (3, 7, 0)
"""From this version on the headers can be compiled into a kernel as they are."""

_OPTIONS = Path("non_abi/nvshmem_build_options.h")
_IBGDA = "#define NVSHMEM_IBGDA_SUPPORT\n"


@dataclass(frozen=True)
class Headers:
    """An installed NVSHMEM.

    Attributes:
        include: folder of nvshmem.h.
        library: folder of libnvshmem_device.a.
        version: such as (3, 4, 5).
    """

    include: Path
    library: Path
    version: tuple[int, int, int]

    def inlined(self) -> Path:
        """Folder of headers that can be compiled into a kernel without a device library.

        Before 3.7 they then ask for the headers of a network card's driver, unless the direct way to it (IBGDA) is switched off in a
        copy of them, in the user's cache directory. A group never leaves its host, so nothing is lost.

        Raises:
            HeapError: the copy cannot be made.
        """
        if self.version >= INLINES:
            return self.include
        options = (self.include / _OPTIONS).read_text()
        if _IBGDA not in options:
            return self.include
        tag = sha256(f"{self.include} {options}".encode()).hexdigest()[:16]
        target = cache_dir() / f"nvshmem-{'.'.join(map(str, self.version))}-{tag}"
        try:
            with FileLock(f"{target}.lock"):
                if not target.exists():
                    scratch = target.with_name(f"{target.name}.{os.getpid()}")
                    shutil.copytree(self.include, scratch)
                    (scratch / _OPTIONS).write_text(options.replace(_IBGDA, ""))
                    scratch.rename(target)
        except OSError as error:
            raise HeapError(
                f"no copy of NVSHMEM's headers in {target} ({error}): make room, or set XDG_CACHE_HOME"
            ) from error
        return target


def mapped_library(maps: Path = Path("/proc/self/maps")) -> Path | None:
    """The file of the host library that this process has mapped, None if there is none."""
    try:
        lines = maps.read_text().splitlines()
    except OSError:
        return None
    paths = (line.split(maxsplit=5)[-1] for line in lines if SONAME in line)
    return next((Path(path) for path in paths if Path(path).name.startswith(SONAME)), None)


@lru_cache(maxsize=1)
def find() -> Headers:
    """The headers that go with this process's NVSHMEM, or those of the wheel where no library is mapped.

    Raises:
        HeapError: there are none; the message says what to install.
    """
    library = mapped_library() or wheel_library()
    if library is None:
        raise HeapError(
            "there is no NVSHMEM: install a CUDA build of torch, or the extra cu12 or cu13 of tscompile (the CUDA version of torch)"
        )
    return at(library.resolve().parents[1])


def at(folder: Path) -> Headers:
    """The NVSHMEM in `folder`, which holds `include` and `lib`.

    Raises:
        HeapError: it has no headers.
    """
    version = folder / "include" / "non_abi" / "nvshmem_version.h"
    try:
        found = re.findall(r"NVSHMEM_VENDOR_(?:MAJOR|MINOR|PATCH)_VERSION (\d+)", version.read_text())
    except OSError as error:
        raise HeapError(
            f"NVSHMEM in {folder} has no headers ({error}): install nvidia-nvshmem-cu12 or -cu13 of the version of the library"
        ) from error
    major, minor, patch = (int(number) for number in found[:3])
    return Headers(folder / "include", folder / "lib", (major, minor, patch))
