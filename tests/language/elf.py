"""The symbols of a cubin."""

from __future__ import annotations

import struct
from dataclasses import dataclass

_SYMTAB = 2


@dataclass(frozen=True)
class Symbol:
    """`defined`: it has a section; `size` in bytes."""

    name: str
    defined: bool
    size: int


def symbols(cubin: bytes) -> list[Symbol]:
    """All symbols of a 64-bit ELF image that have a name.

    Raises:
        ValueError: it is no such image, or has no symbol table.
    """
    if cubin[:5] != b"\x7fELF\x02":
        raise ValueError("no 64-bit ELF image")
    at, size, count = (
        struct.unpack_from("<Q", cubin, 0x28)[0],
        *struct.unpack_from("<HH", cubin, 0x3A),
    )
    sections = [struct.unpack_from("<IIQQQQIIQQ", cubin, at + i * size) for i in range(count)]
    tables = [section for section in sections if section[1] == _SYMTAB]
    if not tables:
        raise ValueError("no symbol table")
    found = []
    for _, _, _, _, offset, length, link, _, _, entry in tables:
        names = sections[link][4]
        for place in range(offset, offset + length, entry):
            name, _, _, section, _, extent = struct.unpack_from("<IBBHQQ", cubin, place)
            text = cubin[names + name : cubin.index(b"\0", names + name)].decode()
            if text:
                found.append(Symbol(text, section != 0, extent))
    return found


def undefined(cubin: bytes) -> set[str]:
    """What is left for the loader, but for what it provides by itself."""
    return {symbol.name for symbol in symbols(cubin) if not symbol.defined and not symbol.name.startswith(".nv.")}
