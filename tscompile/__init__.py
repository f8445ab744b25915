"""torch.compile backend that hides communication behind the matmul or attention next to it.

Importing this package is quick: torch, tilelang and CUDA are loaded by what needs them.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .backend import install as install
    from .explain import explain as explain
    from .options import Options as Options
    from .options import patch as patch
    from .report import Report as Report
    from .report import reports as reports

    __version__: str

_EXPORTS = {
    "Options": "options",
    "Report": "report",
    "explain": "explain",
    "install": "backend",
    "patch": "options",
    "reports": "report",
}

__all__ = ["Options", "Report", "__version__", "explain", "install", "patch", "reports"]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        value = getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
    elif name == "__version__":
        value = _version()
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("tscompile")
    except PackageNotFoundError:
        return "0+unknown"  # run from a source tree that is not installed


class _Package(ModuleType):
    """Keeps `tscompile.explain` a function: importing the submodule of that name would rebind it to the module."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _EXPORTS and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
