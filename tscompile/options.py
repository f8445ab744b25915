"""The options of the backend: one table, read from torch.compile(options=...), `patch` and the environment.

Not for decisions: the planner and the runtime read an `Options` and decide. No torch here.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from .errors import OptionError
from .observe import once

PREFIX = "tilescale."
VARIABLE_PREFIX = "TSCOMPILE_"

KINDS = (
    "all_gather_matmul",
    "matmul_reduce_scatter",
    "matmul_all_reduce",
    "matmul_all_gather",
    "mesh_matmul",
    "all_to_all_matmul",
    "all_to_all_permute",
    "all_to_all_attention",
    "matmul_all_to_all",
    "all_reduce_matmul",
    "reduce_scatter_matmul",
    "all_gather_attention",
    "attention_reduce_scatter",
)

BOOLEANS = {"1": True, "true": True, "on": True, "yes": True, "0": False, "false": False, "off": False, "no": False}
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


class _Refused(Exception):
    """A parser's answer to a value that it does not accept; the message says what would be."""


def _one_of(*allowed: str) -> Callable[[object], str]:
    def parse(value: object) -> str:
        if isinstance(value, str) and value in allowed:
            return value
        raise _Refused("allowed: " + ", ".join(f'"{name}"' for name in allowed) + _nearest(value, allowed))

    return parse


def _boolean(value: object) -> bool:
    if isinstance(value, bool):
        return value
    known = BOOLEANS.get(str(value).strip().lower())
    if known is None:
        raise _Refused("allowed: True, False; in the environment: " + ", ".join(BOOLEANS))
    return known


def _seconds(value: object) -> float | None:
    if value is None or value == "none":
        return None
    try:
        seconds = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else 0.0
    except ValueError:
        seconds = 0.0
    if not 0.0 < seconds < float("inf"):
        raise _Refused("a positive number of seconds, or none")
    return seconds


def _byte_count(value: object) -> int | None:
    if value is None or value == "none":
        return None
    match = None
    if isinstance(value, int | str) and not isinstance(value, bool):
        match = re.fullmatch(r"(\d+)\s*([KMG]?)(?:i?B)?", str(value).strip(), re.IGNORECASE)
    count = int(match[1]) * _UNITS[match[2].upper()] if match else 0
    if count <= 0:
        raise _Refused('a positive number of bytes, such as 268435456 or "256M" (K, M, G are powers of 1024), or none')
    return count


def _kinds(value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        names = [name.strip() for name in value.split(",") if name.strip()]
    elif isinstance(value, list | tuple | set | frozenset):
        names = [str(name) for name in value]
    else:
        raise _Refused("a list of kinds, or a string with commas between them; kinds: " + ", ".join(KINDS))
    for name in names:
        if name not in KINDS:
            raise _Refused(f"{name!r} is not a kind; kinds: " + ", ".join(KINDS) + _nearest(name, KINDS))
    return tuple(sorted(set(names)))


def _nearest(value: object, allowed: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(value), list(allowed), n=1)
    return f' (did you mean "{close[0]}"?)' if close else ""


def _option(default: object, parse: Callable[[object], object], takes: str, doc: str) -> Any:
    """A dataclass field that carries its parser and its text for docs/options.md."""
    return field(default=default, metadata={"parse": parse, "takes": takes, "doc": doc})


@dataclass(frozen=True)
class OptionRow:
    """One line of the table of options, for documentation and the doctor."""

    name: str
    key: str
    variable: str
    takes: str
    default: object
    doc: str


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a compilation was asked to do. Values are checked and normalised on construction.

    Precedence, highest first: `torch.compile(options={"tilescale.<name>": ...})`, `tscompile.patch(<name>=...)`,
    the environment variable `TSCOMPILE_<NAME>`, the default.
    """

    inner: Literal["inductor", "eager"] = _option(
        "inductor",
        _one_of("inductor", "eager"),
        '"inductor", "eager"',
        "What compiles the rest of the graph. eager: no code generation, so compiling is quick.",
    )
    fuse: Literal["auto", "always"] = _option(
        "auto",
        _one_of("auto", "always"),
        '"auto", "always"',
        "auto: fuse where the cost model predicts a gain. always: fuse every supported match, for tests and debugging.",
    )
    on_kept: Literal["ignore", "warn", "error"] = _option(
        "ignore",
        _one_of("ignore", "warn", "error"),
        '"ignore", "warn", "error"',
        "What to do about a match that is not fused, beyond its row in the report.",
    )
    dry_run: bool = _option(False, _boolean, "bool", "Plan and report, and keep the original ops.")
    verify: bool = _option(
        False,
        _boolean,
        "bool",
        "Run the original ops beside each fused op, compare the results and raise if they differ.",
    )
    disable: tuple[str, ...] = _option(
        (), _kinds, "list of kinds", "Kinds that are never fused: " + ", ".join(f"`{kind}`" for kind in KINDS) + "."
    )
    timeout_s: float | None = _option(
        None,
        _seconds,
        "seconds, none",
        "How long a rank waits for its peers inside a fused op before it raises PeerError. none: as the process group.",
    )
    heap_bytes: int | None = _option(
        None,
        _byte_count,
        'bytes, "256M", none',
        "Upper limit of each rank's buffers for one process group; a site that needs more runs the original ops. On GPUs also the "
        "size of each rank's NVSHMEM arena, which all groups share. none: as much as the largest site needs, arena 1 GiB.",
    )

    def __post_init__(self) -> None:
        for spec in fields(self):
            object.__setattr__(self, spec.name, _convert(spec.name, getattr(self, spec.name), PREFIX + spec.name))

    @classmethod
    def parse(cls, mapping: Mapping[str, object] | None = None) -> tuple[Options, dict[str, object]]:
        """Split the options of torch.compile into ours, completed from `patch` and the environment, and Inductor's."""
        values: dict[str, object] = {**_from_environment(), **_patched.get()}
        rest: dict[str, object] = {}
        for key, value in (mapping or {}).items():
            if key.startswith(PREFIX):
                name = _known_name(key.removeprefix(PREFIX).replace("-", "_"), key)
                values[name] = _convert(name, value, key)
            else:
                _check_prefix(key)
                rest[key] = value
        return cls(**values), rest  # type: ignore[arg-type]

    @classmethod
    def table(cls) -> list[OptionRow]:
        """Every option in order of declaration."""
        return [
            OptionRow(
                spec.name,
                PREFIX + spec.name,
                VARIABLE_PREFIX + spec.name.upper(),
                spec.metadata["takes"],
                spec.default,
                spec.metadata["doc"],
            )
            for spec in fields(cls)
        ]

    def digest(self) -> str:
        """A hash of all values, for cache keys: on_kept too, since a cache hit must not swallow its warning."""
        values = {spec.name: getattr(self, spec.name) for spec in fields(self)}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


@contextmanager
def patch(**options: object) -> Iterator[None]:
    """Override the defaults of options for compilations that start within the block, in this thread.

    >>> with tscompile.patch(verify=True):
    ...     compiled(x)

    Code that is compiled already is not compiled again: call `torch.compiler.reset()` first if that is wanted.
    """
    values = {name: _convert(_known_name(name, name), value, f"patch({name}=...)") for name, value in options.items()}
    token = _patched.set({**_patched.get(), **values})
    try:
        yield
    finally:
        _patched.reset(token)


_patched: ContextVar[Mapping[str, object]] = ContextVar("tscompile.patch", default={})  # noqa: B039 (never mutated)
_SPECS = {spec.name: spec for spec in fields(Options)}


def unknown_variables() -> dict[str, str]:
    """Variables in the environment that look like ours and are not: name -> nearest option's variable, or ""."""
    known = [VARIABLE_PREFIX + name.upper() for name in _SPECS]
    unknown = [name for name in os.environ if name.startswith(VARIABLE_PREFIX) and name not in known]
    return {name: next(iter(difflib.get_close_matches(name, known, n=1, cutoff=0.8)), "") for name in unknown}


def _from_environment() -> dict[str, object]:
    for name, nearest in unknown_variables().items():
        if nearest:
            once(
                f"variable {name}",
                "%s is not an option of tscompile and has no effect: did you mean %s?",
                name,
                nearest,
            )
    found: dict[str, object] = {}
    for name in _SPECS:
        variable = VARIABLE_PREFIX + name.upper()
        text = os.environ.get(variable, "").strip()
        if text:  # an empty variable counts as unset, as with most tools
            found[name] = _convert(name, text, variable)
    return found


def _convert(name: str, value: object, source: str) -> object:
    try:
        return _SPECS[name].metadata["parse"](value)
    except _Refused as refused:
        raise OptionError(f"{source} = {value!r} is not valid: {refused}") from None


def _known_name(name: str, written: str) -> str:
    if name in _SPECS:
        return name
    close = difflib.get_close_matches(name, list(_SPECS), n=1, cutoff=0.5)
    hint = f'did you mean "{PREFIX}{close[0]}"? ' if close else ""
    raise OptionError(f'unknown option "{written}": {hint}Options: ' + ", ".join(PREFIX + known for known in _SPECS))


def _check_prefix(key: str) -> None:
    """Refuse a misspelt prefix here, where the fix can be named, and not deep inside Inductor."""
    prefix, dot, name = key.partition(".")
    if dot and (prefix == "tscompile" or difflib.get_close_matches(prefix, ["tilescale"], cutoff=0.8)):
        raise OptionError(
            f'unknown option "{key}": options of this backend start with "{PREFIX}", as in "{PREFIX}{name}"'
        )
