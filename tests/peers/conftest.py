"""The packages, once per session, and where they came from at its end."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.peers import packages


@pytest.fixture(scope="session")
def folder(summary: list[str]) -> Path:
    """The folder with the unpacked packages; skips where the package index cannot be reached."""
    try:
        folder, whence = packages.fetch()
    except packages.NotFetchedError as error:
        names = ", ".join(map(str, packages.PINNED))
        summary.append(f"{names}: not fetched, so their tests were skipped")
        pytest.skip(f"{names} are not here and cannot be fetched: {error}")
    summary.append(whence)
    return folder
