"""Where NVSHMEM's headers come from, and the copy of those that ask for a network card's driver."""

from __future__ import annotations

from pathlib import Path

import pytest

from tscompile.errors import HeapError
from tscompile.nvshmem import headers, host

OPTIONS = "#pragma once\n#define NVSHMEM_IBRC_SUPPORT\n#define NVSHMEM_IBGDA_SUPPORT\n/* #undef OTHER */\n"


def install(folder: Path, version: tuple[int, int, int]) -> Path:
    """A folder like the wheel's."""
    (folder / "lib").mkdir(parents=True)
    (folder / "lib" / host.SONAME).touch()
    (folder / "include" / "non_abi").mkdir(parents=True)
    lines = zip(("MAJOR", "MINOR", "PATCH"), version, strict=True)
    text = "".join(f"#define NVSHMEM_VENDOR_{name}_VERSION {number}\n" for name, number in lines)
    (folder / "include" / "non_abi" / "nvshmem_version.h").write_text(text)
    (folder / "include" / "non_abi" / "nvshmem_build_options.h").write_text(OPTIONS)
    (folder / "include" / "nvshmem.h").write_text("// the whole of it\n")
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tscompile"


def test_old_headers_are_copied_without_ibgda(tmp_path: Path, cache: Path) -> None:
    found = headers.at(install(tmp_path / "nvshmem", (3, 4, 5)))
    assert found.version == (3, 4, 5) and found.library == tmp_path / "nvshmem" / "lib"
    copy = found.inlined()
    assert copy.parent == cache and copy.name.startswith("nvshmem-3.4.5-")
    text = (copy / "non_abi" / "nvshmem_build_options.h").read_text()
    assert text == OPTIONS.replace("#define NVSHMEM_IBGDA_SUPPORT\n", "")
    assert (copy / "nvshmem.h").read_text() == "// the whole of it\n"
    assert (tmp_path / "nvshmem" / "include" / "non_abi" / "nvshmem_build_options.h").read_text() == OPTIONS
    (copy / "nvshmem.h").write_text("// kept")
    assert found.inlined() == copy and (copy / "nvshmem.h").read_text() == "// kept"  # made once


def test_other_headers_are_used_as_they_are(tmp_path: Path, cache: Path) -> None:
    new = headers.at(install(tmp_path / "new", (3, 7, 0)))
    assert new.inlined() == new.include
    without = install(tmp_path / "without", (3, 4, 5))
    (without / "include" / "non_abi" / "nvshmem_build_options.h").write_text("#pragma once\n")
    assert headers.at(without).inlined() == without / "include"
    assert not list(cache.glob("nvshmem-*")) if cache.exists() else True


def test_the_library_that_is_mapped_counts(tmp_path: Path) -> None:
    folder = install(tmp_path / "a b", (3, 4, 5))
    maps = tmp_path / "maps"
    maps.write_text(
        "7f00-7f01 r-xp 00000000 00:00 0\n"
        "7f01-7f02 r-xp 00000000 08:01 12 /usr/lib/libc.so.6\n"
        f"7f02-7f03 r-xp 00000000 08:01 13                         {folder}/lib/{host.SONAME}\n"
    )
    mapped = headers.mapped_library(maps)
    assert mapped == folder / "lib" / host.SONAME
    assert headers.at(mapped.resolve().parents[1]).include == folder / "include"
    maps.write_text("7f01-7f02 r-xp 00000000 08:01 12 /usr/lib/libc.so.6\n")
    assert headers.mapped_library(maps) is None
    assert headers.mapped_library(tmp_path / "nothing") is None


def test_what_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(HeapError, match=r"has no headers .*install nvidia-nvshmem-cu12 or -cu13"):
        headers.at(tmp_path)
    monkeypatch.setattr(headers, "mapped_library", lambda: None)
    monkeypatch.setattr(headers, "wheel_library", lambda: None)
    with pytest.raises(
        HeapError, match="there is no NVSHMEM: install a CUDA build of torch, or the extra cu12 or cu13"
    ):
        headers.find.__wrapped__()
