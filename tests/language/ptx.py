"""Questions to a compiled kernel's text."""

from __future__ import annotations

import re

import tscompile.language as tl


def before(text: str, *patterns: str) -> None:
    """The patterns occur in this order."""
    at = 0
    for pattern in patterns:
        found = re.compile(pattern).search(text, at)
        assert found, f"{pattern} does not follow in\n{text[at:]}"
        at = found.end()


def read_non_coherently(artifact: tl.CudaArtifact, addresses: str = r"\*") -> set[str]:
    """Parameters through which the kernel makes `ld.global.nc` loads; "a loaded pointer" stands for peers' memory.

    `addresses` is what the declaration of a parameter looks like that may be an address.
    """
    signature = re.findall(r"[(,]([^,()]*?)(\w+)(?=[,)])", artifact.source[: artifact.source.index(";")])
    defined: dict[str, list[tuple[str, str]]] = {}
    for operation, register, rest in re.findall(r"\t([a-z][\w.:]*)\s+(%\w+), ([^;]*);", artifact.ptx):
        defined.setdefault(register, []).append((operation, rest))
    loads = re.findall(r"ld\.global\.nc\S*\s+(?:\{[^}]*\}|[^\s{]+), \[(%\w+)", artifact.ptx)
    assert len(loads) == artifact.ptx.count("ld.global.nc")
    found = set()
    for base in loads:
        todo, seen, pointers = [base], {base}, set()
        while todo:
            for operation, rest in defined[todo.pop()]:
                if parameter := re.search(r"_param_(\d+)", rest):
                    kind, name = signature[int(parameter[1])]
                    pointers |= {name} if re.search(addresses, kind) else set()
                elif not operation.startswith(("ld.", "atom.")):  # what is loaded is no longer the parameter
                    new = {register for register in re.findall(r"%\w+", rest) if register in defined} - seen
                    seen |= new
                    todo += new
        found |= pointers or {"a loaded pointer"}
    return found
