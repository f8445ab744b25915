"""Errors that a user of tscompile can see. Each message says what to do next."""

from __future__ import annotations


class TscompileError(RuntimeError):
    """Base of every error that tscompile raises on purpose."""


class OptionError(ValueError, TscompileError):
    """An option or environment variable that tscompile does not know or cannot parse."""


class KeptError(TscompileError):
    """A match was not fused and `tilescale.on_kept` is "error"."""


class HeapError(TscompileError):
    """Symmetric memory could not be allocated or mapped."""


class BackendError(ValueError, TscompileError):
    """A TileLang execution backend that cannot run a kernel, or cannot do so on this machine.

    Attributes:
        backend: its name.
    """

    def __init__(self, backend: str, message: str) -> None:
        super().__init__(message)
        self.backend = backend


class PeerError(TscompileError):
    """A peer died, aborted, or did not answer in time.

    Attributes:
        rank: global rank of the peer that is at fault.
        site: name of the fused site that was waiting.
    """

    def __init__(self, rank: int, site: str, message: str) -> None:
        super().__init__(message)
        self.rank = rank
        self.site = site
