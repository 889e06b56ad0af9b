"""Where results go: found out before the work rather than after it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from .validation import fail


def check_folder(folder: Path, argument: str = "output") -> None:
    """Check that a folder can be written, or made and written; nothing is left in it.

    Raises:
        OSError: it cannot; the message names the ``argument``.
    """
    folder = Path(folder)
    existing = next(p for p in (folder, *folder.absolute().parents) if os.path.exists(p))
    try:
        # Permissions alone do not tell: a file system may be read-only, or full.
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"\0")
    except OSError as error:
        reason = error.strerror or error
        fail(
            type(error),
            argument,
            "must be a folder that can be written",
            f"{folder}, but {existing} cannot be: {reason}",
            "Name another folder.",
        )
