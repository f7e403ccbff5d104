"""Single files from where they are published, kept in the cache: fetched once, whole or not at all."""

from __future__ import annotations

import hashlib
import shutil
import urllib.request
from pathlib import Path

import filelock

from diablo_theory.errors import DataUnavailableError
from diablo_theory.files import atomic_path, cache_folder

#: Seconds without a byte after which a server is given up.
TIMEOUT = 30.0


def download(address: str) -> Path:
    """The copy of a file in the cache, fetched if there is none.

    A branch moves and the copy does not: delete ``downloads`` in the cache folder to fetch anew.

    Args:
        address: Of the file, http or https.

    Returns:
        Its path. It holds as many bytes as the server announced.

    Raises:
        DataUnavailableError: If fewer bytes came than were announced.
        OSError: If the server cannot be reached, refuses, or falls silent.
        http.client.HTTPException: If what it says is no HTTP, or ends within a chunk.
    """
    kept = cache_folder() / "downloads" / f"{_key(address)}{Path(address).suffix}"
    kept.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(kept.with_suffix(".lock")):  # processes side by side fetch it once
        if not kept.is_file():
            with atomic_path(kept) as aside:
                _fetch(address, aside)
    return kept


def _key(address: str) -> str:
    return hashlib.sha256(address.encode()).hexdigest()[:24]


def _fetch(address: str, path: Path) -> None:
    with urllib.request.urlopen(address, timeout=TIMEOUT) as response, path.open("wb") as file:
        shutil.copyfileobj(response, file)
        announced = response.headers.get("Content-Length")
    # A connection that breaks ends the file without an error.
    if announced is not None and path.stat().st_size != int(announced):
        raise DataUnavailableError(f"{address} broke off after {path.stat().st_size:,} of {int(announced):,} bytes")
