"""Checkpoints that are either whole or found to be damaged."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from accelerate import Accelerator

MANIFEST = "checkpoint.json"

_PREFIX = "step-"


def save(accelerator: Accelerator, folder: Path, step: int, keep: int) -> None:
    """Write the state after ``step`` steps, then remove all but the last ``keep`` checkpoints.

    A checkpoint is a folder ``step-00000100`` with the files of ``accelerator.save_state`` and a
    manifest of their SHA-256. It gets its name only when all is written, so that a run that is
    killed while it writes leaves the previous checkpoint as the last one.
    """
    final = folder / f"{_PREFIX}{step:08d}"
    part = folder / f".{final.name}.part"
    if accelerator.is_main_process:
        shutil.rmtree(part, ignore_errors=True)  # of a run that was killed
        part.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(part))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        digests = {path.name: _digest(path) for path in sorted(part.iterdir())}
        text = json.dumps({"step": step, "sha256": digests}, indent=1)
        (part / MANIFEST).write_text(text + "\n", encoding="utf-8")
        shutil.rmtree(final, ignore_errors=True)
        part.rename(final)
        for old in _all(folder)[:-keep]:
            shutil.rmtree(old)


def load_latest(accelerator: Accelerator, folder: Path, warn: Callable[[str], None]) -> int:
    """Load the last checkpoint that is not damaged; return its step, 0 if there is none.

    Damaged ones, whose files are missing or are not those of the manifest, are removed.
    """
    from accelerate.utils import broadcast_object_list

    chosen: list[str | int | None] = [None, 0]
    if accelerator.is_main_process:
        for path in reversed(_all(folder)):
            problem = find_damage(path)
            if problem is None:
                chosen = [str(path), int(path.name.removeprefix(_PREFIX))]
                break
            warn(f"checkpoint {path} is damaged ({problem}); it is removed, an earlier one serves")
            shutil.rmtree(path)
    path, step = broadcast_object_list(chosen)
    if path is not None:
        accelerator.load_state(path)
    return step


def find_damage(checkpoint: Path) -> str | None:
    """Say what is wrong with the files of a checkpoint, or None if they are those written."""
    try:
        digests = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["sha256"]
        for name, digest in digests.items():
            if _digest(checkpoint / name) != digest:
                return f"{name} has changed"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} or a file in it cannot be read: {error}"
    return None


def _all(folder: Path) -> list[Path]:
    """The checkpoints, in the order of their steps."""
    return sorted(folder.glob(f"{_PREFIX}*"))


def _digest(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            found.update(chunk)
    return found.hexdigest()
