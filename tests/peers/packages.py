"""Sequence-parallel packages as the package index has them, unmodified, for tests that run their exchange code.

pip fetches exactly the pinned files, without what they depend on, once per machine. Nothing is installed: their modules are imported
from the folder that the files are unpacked in, in the processes that need them. That folder is the user's cache directory; it may be
removed at any time.
"""

from __future__ import annotations

import hashlib
import importlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import types
import zipfile
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from platformdirs import user_cache_path

FETCH_S = 240  # DeepSpeed's archive of sources is asked for its metadata, for which pip runs its setup.py in an environment of its own
WAIT_S = FETCH_S + 30  # for another process that fetches


@dataclass(frozen=True)
class Pinned:
    name: str
    version: str
    sha256: str  # of the one file that is taken: a pure wheel, or the archive of sources where there is no wheel

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


PINNED = (
    Pinned("yunchang", "0.6.4", "cce4295058e9de2c0592d69cfe1e3e679711def5f315fd1b68dbed2d54bc9255"),
    Pinned("deepspeed", "0.19.8", "9e491abd0827ea5c389dd702e15e11e13d83d904bac4a20d6c2a4cb37207a9af"),
    Pinned(
        "einops", "0.8.2", "54058201ac7087911181bfec4af6091bb59380360f069276601256a76af08193"
    ),  # DeepSpeed permutes with it
)
_REQUIREMENTS = "".join(f"{one.name}=={one.version} --hash=sha256:{one.sha256}\n" for one in PINNED)


class NotFetchedError(Exception):
    """The packages are not here and pip could not get them; says why in pip's words."""


def fetch() -> tuple[Path, str]:
    """The folder with the unpacked packages, and where they came from in this call.

    Raises:
        NotFetchedError: there is no pip, or it reached no index that has these versions.
        RuntimeError: an index has other files under these versions.
    """
    root = user_cache_path("tscompile") / "test-packages"
    folder = root / hashlib.sha256(_REQUIREMENTS.encode()).hexdigest()[:16]
    names = ", ".join(map(str, PINNED))
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / "lock", timeout=WAIT_S):
        if folder.exists():
            return folder, f"{names}: from the cache of an earlier run"
        with tempfile.TemporaryDirectory(dir=root) as scratch:
            unpacked = Path(scratch) / "unpacked"
            unpacked.mkdir()
            for file in _download(Path(scratch)):
                _unpack(file, unpacked)
            unpacked.rename(folder)
    return folder, f"{names}: from the package index"


def _download(scratch: Path) -> list[Path]:
    (scratch / "requirements.txt").write_text(_REQUIREMENTS)
    where = ["--dest", str(scratch / "files"), "--requirement", str(scratch / "requirements.txt")]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", *where]
    limits = ["--disable-pip-version-check", "--no-input", "--retries", "1", "--timeout", "20"]
    try:
        done = subprocess.run([*command, *limits], capture_output=True, text=True, timeout=FETCH_S)
    except subprocess.TimeoutExpired as error:
        raise NotFetchedError(f"pip was not done after {FETCH_S} s") from error
    if done.returncode:
        if "DO NOT MATCH THE HASHES" in done.stderr:
            raise RuntimeError(
                f"the package index has other files than those that the tests are pinned to:\n{done.stderr}"
            )
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise NotFetchedError(f"pip download: {said[-1] if said else f'exit status {done.returncode}'}")
    return sorted((scratch / "files").iterdir())


def _unpack(file: Path, into: Path) -> None:
    """The package lies in `into` afterwards, without what else is in its archive (yunchang's wheel has a package `test`)."""
    name, extracted = file.name.partition("-")[0], file.parent
    if file.suffix == ".whl":
        with zipfile.ZipFile(file) as wheel:
            wheel.extractall(extracted)
    else:
        with tarfile.open(file) as sources:
            sources.extractall(extracted, filter="data")
        extracted /= file.name.removesuffix(".tar.gz")
    shutil.move(extracted / name, into / name)


def load_yunchang(folder: Path) -> types.ModuleType:
    """yunchang, whole; it does without its optional kernels."""
    _import_from(folder)
    return importlib.import_module("yunchang")


# Packages of DeepSpeed whose __init__ loads the engine, its ops and inference, with dependencies that no exchange needs. They are
# packages without an __init__ here. Every module that the exchange code imports from them is DeepSpeed's own.
_BARE = ("", ".sequence", ".module_inject", ".utils", ".runtime", ".ops")


def load_deepspeed(folder: Path) -> types.ModuleType:
    """deepspeed.sequence.layer, with deepspeed.comm on the torch process group that exists already.

    It registers the op `deepspeed::dim_zero_all_to_all`, which a process can do once: call it before tests.programs is imported,
    which has a definition of its own for processes without DeepSpeed.
    """
    _import_from(folder)
    for suffix in _BARE:
        package = types.ModuleType(f"deepspeed{suffix}")
        package.__path__ = [str(folder / "deepspeed" / suffix.strip("."))]
        sys.modules[package.__name__] = package
        if suffix:
            setattr(sys.modules["deepspeed"], suffix.strip("."), package)
    utils, ops = sys.modules["deepspeed.utils"], sys.modules["deepspeed.ops"]
    ops.__compatible_ops__ = {}  # type: ignore[attr-defined]  # none of its C++ ops are compiled
    for module, names in (("logging", ("logger", "log_dist")), ("comms_logging", ("get_caller_func",))):
        origin = importlib.import_module(f"deepspeed.utils.{module}")
        for name in names:  # what the __init__ of deepspeed.utils takes from there
            setattr(utils, name, getattr(origin, name))
    layer = importlib.import_module("deepspeed.sequence.layer")
    sys.modules["deepspeed.comm"].init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    return layer


def _import_from(folder: Path) -> None:
    """Before what may be installed: the pinned versions are tested."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
