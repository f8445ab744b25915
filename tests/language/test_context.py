"""context.py, cuda.h and cpu.h describe the same struct."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch

from tscompile.language import context

HERE = Path(context.__file__).parent
FIELDS = [
    "rank",
    "size",
    "timeout_ns",
    "epoch_cell",
    "abort_word",
    "abort_offset",
    "record",
    "team",
    "data",
    "flags",
    "control",
]


@pytest.mark.parametrize("header", ["cuda.h", "cpu.h"])
def test_offsets_are_those_of_the_struct(header: str, tmp_path: Path) -> None:
    text = (HERE / header).read_text()
    struct = re.search(r"struct TslContext \{.*?\n\};|typedef struct \{.*?\n\} TslContext;", text, re.DOTALL)
    ranks = re.search(r"TSL_MAX_RANKS\s*=?\s*(\d+)", text)
    assert struct and ranks
    lines = [f'printf("%zu\\n", offsetof(TslContext, {field}));' for field in FIELDS]
    source = tmp_path / "main.cpp"
    source.write_text(
        "#include <cstddef>\n#include <cstdint>\n#include <cstdio>\n"
        f"constexpr int TSL_MAX_RANKS = {ranks[1]};\n{struct[0]}\n"
        f'int main() {{ {" ".join(lines)} printf("%zu\\n", sizeof(TslContext)); }}\n'
    )
    subprocess.run(["g++", "-std=c++17", "-o", str(tmp_path / "main"), str(source)], check=True, timeout=60)
    printed = subprocess.run([str(tmp_path / "main")], check=True, timeout=60, capture_output=True, text=True).stdout
    assert [int(line) for line in printed.split()] == [
        *(8 * getattr(context, field.upper()) for field in FIELDS),
        8 * context.WORDS,
    ]
    assert int(ranks[1]) == context.MAX_RANKS
    assert len(re.findall(r"^  uint64_t \w+", struct[0], re.MULTILINE)) == len(FIELDS)


def arguments(**changes: object) -> dict:
    chosen = {"rank": 1, "size": 2, "timeout_ns": 5, "epoch_cell": 6, "abort_word": (1 << 63) + 7, "abort_offset": 8}
    return {**chosen, "record": 9, "data": [10, 11], "flags": [12, 13], "control": [14, 15], **changes}


def test_fill() -> None:
    words = context.fill(torch.full((context.WORDS,), -1), **arguments()).tolist()
    assert words[:8] == [1, 2, 5, 6, 7 - (1 << 63), 8, 9, 0]
    assert words[8:] == [10, 11, *[0] * 6, 12, 13, *[0] * 6, 14, 15, *[0] * 6]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 2}, "rank 2 of 2"),
        ({"size": 9}, "a group has 1 to 8 ranks"),
        ({"timeout_ns": 0}, "positive bound"),
        ({"flags": [1]}, "1 addresses for 2 ranks"),
    ],
)
def test_numbers_that_do_not_fit(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        context.fill(torch.empty(context.WORDS, dtype=torch.int64), **arguments(**changes))


def test_another_tensor() -> None:
    with pytest.raises(ValueError, match="int64 tensor of 32 words"):
        context.fill(torch.empty(context.WORDS), **arguments())
