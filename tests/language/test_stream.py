"""The kernels that the host issues on a stream, compiled for sm_90a; what they do: test_nvshmem_ranks.py and tests/gpu."""

from __future__ import annotations

import pytest
import torch

import tscompile.language as tl
from tscompile.language import stream, stream_kernels
from tscompile.language.compile import parse

D = tl.dialect("cuda")


@pytest.mark.parametrize(
    ("name", "form", "has"),
    [
        ("signal", ("uint64", "set"), ["st.release.sys.global.u64"]),
        ("signal", ("int32", "add"), ["red.release.sys.global.add.u32"]),
        ("wait", ("int64", "lt"), ["ld.acquire.sys.global.u64", "%globaltimer"]),
        ("wait", ("uint32", "epoch"), ["ld.acquire.sys.global.u32", "%globaltimer"]),
        ("meet", (), ["st.release.sys.global.u64", "ld.acquire.sys.global.u64", "%globaltimer"]),
    ],
)
def test_kernels(name: str, form: tuple[str, ...], has: list[str]) -> None:
    artifact = tl.compile_cuda(parse(lambda: stream_kernels._WRITERS[name](D, *form)))
    assert all(text in artifact.ptx for text in has)
    assert artifact.spill_bytes == artifact.stack_bytes == 0
    assert "bar.sync" not in artifact.ptx and "barrier.sync" not in artifact.ptx and "nvshmem" not in artifact.ptx


@pytest.mark.parametrize(
    ("dtype", "value", "word"),
    [
        (torch.int32, -1, -1),
        (torch.int32, 2**32 - 2, -2),
        (torch.uint32, -1, 2**32 - 1),
        (torch.int64, -5, -5),
        (torch.uint64, 2**64 - 1, -1),
    ],
)
def test_words_of_flags(dtype: torch.dtype, value: int, word: int) -> None:
    assert stream._word(torch.zeros(1, dtype=dtype), value) == word
