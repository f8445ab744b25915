"""The probes of the doctor: each looks at one thing and yields what it found. Changes nothing on the machine."""

from __future__ import annotations

import glob
import mmap
import os
import platform
import re
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any, Literal

from . import switches, versions
from .errors import HeapError, OptionError
from .options import Options, unknown_variables

SHM = "/dev/shm"
SEGMENTS = "tscompile-*"
_ROOM = 256 << 20  # below this the buffers of one large site may not fit; Docker's default is 64 MiB


@dataclass(frozen=True)
class Check:
    """One line. `fallback`: because of it no site of these `ranks` can run fused here."""

    status: Literal["ok", "warn", "fail"]
    what: str
    detail: str
    action: str = ""
    fallback: bool = False
    ranks: Literal["all", "cpu", "gpu"] = "all"

    def __str__(self) -> str:
        line = f"{self.status:<4}  {self.what:<24}  {self.detail}"
        return line + (f"  -> {self.action}" if self.action else "")


@cache
def _torch() -> ModuleType | Exception:
    """torch, or why it cannot be imported: the other probes must still run."""
    try:
        return import_module("torch")
    except Exception as error:
        return error


def _probe_python() -> Iterator[Check]:
    yield Check("ok", "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    if not sys.platform.startswith("linux"):
        yield Check(
            "warn", "platform", "the shared-memory executor needs Linux", "run on Linux for fused ops", fallback=True
        )


def _probe_torch() -> Iterator[Check]:
    found = versions.installed("torch")
    if found is None:
        yield Check("fail", "torch", "not installed", "pip install 'torch>=2.11,<2.16'")
        return
    torch = _torch()
    if isinstance(torch, Exception):
        empty = os.environ.get("TORCH_LOGS") == ""
        action = "unset TORCH_LOGS: an empty value breaks the import" if empty else "reinstall torch"
        yield Check("fail", "torch", f"{found} cannot be imported: {torch!r}", action)
        return
    number = versions.major_minor(found)
    span = (
        f"{versions.TORCH_MIN[0]}.{versions.TORCH_MIN[1]} to before {versions.TORCH_BELOW[0]}.{versions.TORCH_BELOW[1]}"
    )
    if number < versions.TORCH_MIN:
        yield Check("fail", "torch", f"{found}; this release needs {span}", "pip install 'torch>=2.11,<2.16'")
    elif number >= versions.TORCH_BELOW:
        yield Check("warn", "torch", f"{found}; this release was written for {span}", "use a torch of that range")
    else:
        yield Check("ok", "torch", f"{found}, CUDA {torch.version.cuda or 'none'}")
    for problem in versions.known_problems(found):
        yield Check("warn", problem.what, problem.detail, problem.action)
    if os.environ.get("TORCH_LOGS") == "":
        yield Check("warn", "TORCH_LOGS", "set to an empty string, which breaks torch 2.13", "unset TORCH_LOGS")


def _probe_packages() -> Iterator[Check]:
    found = versions.installed("tilelang")
    wanted = f"pip install tilelang=={versions.TILELANG}"
    if found == versions.TILELANG:
        yield Check("ok", "tilelang", found)
    else:
        yield Check("warn", "tilelang", f"{found or 'not installed'}; this release pins {versions.TILELANG}", wanted)
    ffi = versions.installed("apache-tvm-ffi")
    yield Check("ok" if ffi else "warn", "apache-tvm-ffi", ffi or "not installed", "" if ffi else wanted)


def _probe_backend() -> Iterator[Check]:
    try:
        import_module("tscompile.backend")
    except Exception as error:
        yield Check(
            "fail", "tscompile", f"the backend cannot be imported: {error!r}", "pip install --force-reinstall tscompile"
        )
        return
    own = versions.installed("tscompile")
    found = [entry.value for entry in entry_points(group="torch_dynamo_backends", name="tilescale")]
    if found and set(found) == {"tscompile.backend:tilescale"}:
        yield Check("ok", "tscompile", f'{own}, registered as backend="tilescale"')
    elif found:
        yield Check("fail", "tscompile", f'backend="tilescale" belongs to {found}', "uninstall the other package")
    else:
        yield Check(
            "warn",
            "tscompile",
            'not installed, so torch does not know backend="tilescale"',
            "pip install -e . in its folder",
        )


def _probe_options() -> Iterator[Check]:
    try:
        options, _ = Options.parse()
    except OptionError as error:
        yield Check("fail", "options", str(error), "correct or unset the variable")
        return
    changed = [
        f"{row.variable}={getattr(options, row.name)}"
        for row in Options.table()
        if getattr(options, row.name) != row.default
    ]
    yield Check("ok", "options", ", ".join(changed) or "no TSCOMPILE_* variable is set")
    for name in (switches.NVSHMEM, switches.DISTRIBUTED):
        try:
            value = switches.switch(name)
        except OptionError as error:
            yield Check("warn", name, str(error), "unset it: nothing here needs it")
            continue
        if value is not None:
            yield Check("ok", name, f"{'on' if value else 'off'}; TileScale's switch, see docs/tilescale.md")
    for name, nearest in unknown_variables().items():
        yield Check("warn", name, "not an option, has no effect", f"did you mean {nearest}?" if nearest else "unset it")


def _probe_compilers() -> Iterator[Check]:
    eager = 'or use options={"tilescale.inner": "eager"}, which compiles no code'
    cxx = os.environ.get("CXX", "g++")
    if path := shutil.which(cxx):
        yield Check("ok", "C++ compiler", path)
    else:
        yield Check("warn", "C++ compiler", f"{cxx} not found; Inductor needs it on CPU", f"install g++ {eager}")
    candidates = [os.environ.get("CC", ""), "cc", "gcc", "clang"]
    if path := next(filter(None, (shutil.which(name) for name in candidates if name)), None):
        yield Check("ok", "C compiler", path)
    else:
        detail = "none of $CC, cc, gcc, clang found; the signals of the shared heap are built with it once"
        yield Check("warn", "C compiler", detail, "install gcc", fallback=True)
    header = os.path.join(sysconfig.get_path("include"), "Python.h")
    if os.path.exists(header):
        yield Check("ok", "Python.h", header)
    else:
        yield Check("warn", "Python.h", "not found; Inductor needs it on CPU", f"install python3-dev {eager}")


def _probe_nvcc() -> Iterator[Check]:
    wheels = import_module("tscompile.language.toolchain").wheel_home()
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), wheels, "/usr/local/cuda"]
    places = [shutil.which("nvcc"), *(os.path.join(home, "bin", "nvcc") for home in homes if home)]
    found = next((place for place in places if place and os.path.isfile(place)), None)
    torch = _torch()
    if found:
        yield Check("ok", "nvcc", found)
    elif isinstance(torch, Exception) or not torch.cuda.is_available():
        yield Check("ok", "nvcc", "not found, and not needed without a GPU")
    else:
        action = "pip install 'tscompile[nvcc]', or set CUDA_HOME to a CUDA toolkit"
        yield Check(
            "warn", "nvcc", "not found: kernels for GPUs are compiled with it", action, fallback=True, ranks="gpu"
        )


def _probe_gpus() -> Iterator[Check]:
    torch = _torch()
    if isinstance(torch, Exception):
        return
    if not torch.cuda.is_available():
        yield Check("ok", "GPUs", "none visible to torch")
        return
    count = torch.cuda.device_count()
    names = sorted({torch.cuda.get_device_name(i) for i in range(count)})
    pairs = [(i, j) for i in range(count) for j in range(count) if i != j]
    reached = sum(torch.cuda.can_device_access_peer(i, j) for i, j in pairs)
    yield Check(
        "ok", "GPUs", f"{count} x {', '.join(names)}; peer access between {reached} of {len(pairs)} ordered pairs"
    )


def _probe_nvshmem() -> Iterator[Check]:
    wheels = {name: found for name in versions.NVSHMEM_WHEELS if (found := versions.installed(name))}
    if len(wheels) > 1:
        yield Check(
            "warn",
            "NVSHMEM wheels",
            f"{' and '.join(wheels)} are both installed and own the same files",
            "uninstall both, then install the one of torch's CUDA version",
        )
    torch = _torch()
    cuda = None if isinstance(torch, Exception) else torch.version.cuda
    for name in wheels:
        if cuda and not name.endswith("cu" + cuda.split(".")[0]):
            yield Check("warn", "NVSHMEM wheels", f"{name} beside torch of CUDA {cuda}", f"pip uninstall {name}")
    listed = ", ".join(f"{name} {found}" for name, found in wheels.items()) or "no wheel"
    library = _nvshmem_library()
    if isinstance(library, HeapError):
        yield Check("ok", "NVSHMEM", f"{listed}; {library}")
        return
    with open("/proc/self/maps") as maps:
        mapped = sorted({line.split()[-1] for line in maps if "libnvshmem_host" in line})
    yield Check("ok", "NVSHMEM", f"{listed}; {library.version()}, {library.source}: {', '.join(mapped)}")


def _nvshmem_library() -> Any:
    """The library, or the HeapError that says why there is none. Nothing is initialised: that takes all ranks of a program."""
    _torch()  # a CUDA build maps its own copy, which comes first
    try:
        return import_module("tscompile.nvshmem.host").load()
    except HeapError as error:
        return error


def _probe_gpu_memory() -> Iterator[Check]:
    """Where the memory of a group of GPUs would come from; the ranks agree on it when a program runs."""
    torch = _torch()
    if isinstance(torch, Exception) or not torch.cuda.is_available():
        return
    count = torch.cuda.device_count()
    pairs = [(i, j) for i in range(count) for j in range(count) if i != j]
    blind = [pair for pair in pairs if not torch.cuda.can_device_access_peer(*pair)]
    if blind:
        detail = f"GPU {blind[0][0]} cannot address the memory of GPU {blind[0][1]} ({len(blind)} such pairs)"
        yield Check("warn", "GPU memory", detail, "form groups of GPUs that reach each other: nvidia-smi topo -p2p rw")
    library = _nvshmem_library()
    refusal = import_module("tscompile.nvshmem.p2p").backend_refusal()
    if not isinstance(library, HeapError):
        second = f"without the second choice, symm_mem: {refusal}" if refusal else "else symm_mem"
        yield Check("ok", "GPU memory", f"nvshmem, if all ranks of the program can enter it; {second}")
    elif not refusal:
        yield Check("ok", "GPU memory", f"symm_mem, since not nvshmem: {library}")
    else:
        yield Check("warn", "GPU memory", f"neither symm_mem ({refusal}) nor nvshmem", f"mend one of them: {library}")


def _probe_gloo() -> Iterator[Check]:
    torch = _torch()
    if isinstance(torch, Exception):
        return
    dist = torch.distributed
    if not dist.is_available() or not dist.is_gloo_available():
        yield Check("warn", "gloo", "this torch was built without it", "install a torch with gloo", fallback=True)
        return
    try:
        dist.ProcessGroupGloo(dist.HashStore(), 0, 1, timedelta(seconds=10))
    except Exception as error:
        action = "make the host name resolvable, or set GLOO_SOCKET_IFNAME=lo on one host"
        yield Check("warn", "gloo", f"a group of one rank cannot be made: {error}", action, fallback=True)
        return
    yield Check("ok", "gloo", "a group of one rank was made")


def _probe_shared_memory() -> Iterator[Check]:
    try:
        with tempfile.TemporaryFile(dir=SHM) as file:
            file.truncate(mmap.PAGESIZE)
            with mmap.mmap(file.fileno(), mmap.PAGESIZE) as page:
                page[:4] = b"test"
        room = os.statvfs(SHM)
    except OSError as error:
        action = "mount a tmpfs there that this user can write"
        yield Check("warn", SHM, f"cannot be written or mapped: {error}", action, fallback=True)
        return
    free = room.f_bavail * room.f_frsize
    if free < _ROOM:
        yield Check(
            "warn", SHM, f"{free >> 20} MiB free", "remove stale files, or start the container with --shm-size=1g"
        )
    else:
        yield Check("ok", SHM, f"{free >> 20} MiB free")
    if stale := stale_segments():
        size = sum(os.stat(path).st_blocks * 512 for path in stale if os.path.exists(path))
        detail = f"{len(stale)} segments of {size >> 20} MiB in all that no visible process maps"
        action = "if no rank runs in another container: rm " + " ".join(stale)
        yield Check("warn", "stale segments", detail, action)


def stale_segments(folder: str = SHM) -> list[str]:
    """Segments that no process visible to this user maps, left by ranks that were killed."""
    segments = {path for path in glob.glob(os.path.join(folder, SEGMENTS)) if os.stat(path).st_uid == os.getuid()}
    for maps in glob.glob("/proc/[0-9]*/maps") if segments else ():
        try:
            with open(maps) as file:
                segments -= {match[0] for line in file if (match := re.search(r"/\S+", line))}
        except OSError:
            continue  # the process ended, or belongs to someone else
    return sorted(segments)


PROBES: tuple[Callable[[], Iterable[Check]], ...] = (
    _probe_python,
    _probe_torch,
    _probe_packages,
    _probe_backend,
    _probe_options,
    _probe_compilers,
    _probe_nvcc,
    _probe_gpus,
    _probe_nvshmem,
    _probe_gpu_memory,
    _probe_gloo,
    _probe_shared_memory,
)
