"""Where results go: found out before the work rather than after it."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .checks import fail


def check_folder(folder: Path, argument: str = "output") -> None:
    """Check that a folder can be written, or made and written; nothing is left in it.

    Raises:
        OSError: it cannot; the message names the ``argument``.
    """
    folder = Path(folder)
    existing = next(p for p in (folder, *folder.absolute().parents) if os.path.exists(p))
    with _naming(argument, "a folder that can be written", folder):
        _try_folder(existing)


def check_file(path: Path, argument: str = "output") -> None:
    """Check that a file can be written in a folder that exists; it is not changed.

    Raises:
        OSError: it cannot; the message names the ``argument``.
    """
    with _naming(argument, "a file that can be written", path):
        if path.is_file():
            path.open("ab").close()
        elif not os.path.exists(path):  # what is neither, such as a pipe, may be opened once only
            _try_folder(path.parent)


@contextlib.contextmanager
def when_whole(path: Path) -> Iterator[Path]:
    """Give the path of a file to write, which then takes the place of ``path`` in one step."""
    part = path.with_name(f".{path.name}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _try_folder(folder: Path) -> None:
    # Permissions alone do not tell: a file system may be read-only, or full.
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"\0")


@contextlib.contextmanager
def _naming(argument: str, kind: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        got = f"{path} ({error.strerror or error})"
        fail(type(error), argument, f"must be {kind}", got, "Name another one.")
