"""Checkpoints that are either whole or found to be damaged."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from .processes import on_main_process

if TYPE_CHECKING:
    from accelerate import Accelerator

MANIFEST = "checkpoint.json"

_PREFIX = "step-"
_DAMAGED = "damaged-"


def save(accelerator: Accelerator, folder: Path, step: int, keep: int) -> None:
    """Write the state after ``step`` steps, then remove all but the last ``keep`` checkpoints.

    A checkpoint is a folder ``step-00000100`` with the files of ``accelerator.save_state`` and a
    manifest of their SHA-256. It gets its name only when all is written, so that a run that is
    killed while it writes leaves the previous checkpoint as the last one. Older ones are removed
    once ``keep`` later ones are whole.

    Raises:
        OSError: it cannot be written, or there is one of this step already.
    """
    final = folder / f"{_PREFIX}{step:08d}"
    part = _part(final)

    def begin() -> None:
        if final.exists():
            raise FileExistsError(
                f"checkpoint {final} exists, and this run has not written it. Let one run at a "
                "time write into a folder."
            )
        _remove_parts(folder)
        part.mkdir(parents=True)

    def end() -> None:
        digests = {path.name: _digest(path) for path in sorted(part.iterdir())}
        text = json.dumps({"step": step, "sha256": digests}, indent=1)
        (part / MANIFEST).write_text(text + "\n", encoding="utf-8")
        part.rename(final)
        _prune(folder, final, keep)

    on_main_process(accelerator, begin)
    accelerator.save_state(str(part))
    accelerator.wait_for_everyone()
    on_main_process(accelerator, end)


def load_latest(accelerator: Accelerator, folder: Path, warn: Callable[[str], None]) -> int:
    """Load the last checkpoint that is not damaged; return its step, 0 if there never was one.

    Damaged ones, whose files are missing or are not those of the manifest, are set aside under the
    name ``damaged-step-00000100``.

    Raises:
        OSError: a checkpoint cannot be read, then nothing is changed; or all are damaged.
    """
    path = on_main_process(accelerator, lambda: _find_latest(folder, warn))
    if path is None:
        return 0
    accelerator.load_state(str(path))
    return _step(path)


def find_damage(checkpoint: Path) -> str | None:
    """Say what is wrong with the files of a checkpoint, or None if they are those written.

    Raises:
        OSError: a file is there and cannot be read, which says nothing about what it holds.
    """
    try:
        digests = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["sha256"]
        for name, digest in digests.items():
            if _digest(checkpoint / name) != digest:
                return f"{name} has changed"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (IsADirectoryError, NotADirectoryError) as error:
        return f"{Path(error.filename).name} is not a file"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} is not one of ours: {error}"
    return None


def remove_all(folder: Path) -> None:
    """Remove the checkpoints of a run that has ended; those set aside stay."""
    _remove_parts(folder)
    for path in _all(folder):
        _remove(path)
    if folder.exists() and not any(folder.iterdir()):
        folder.rmdir()


def _find_latest(folder: Path, warn: Callable[[str], None]) -> Path | None:
    """Return the last whole checkpoint, None if there never was one; set damaged ones aside."""
    latest, problems = None, {}
    try:
        # All are read before any is renamed: what cannot be read leaves everything in its place.
        for path in reversed(_all(folder)):
            problem = find_damage(path)
            if problem is None:
                latest = path
                break
            problems[path] = problem
    except OSError as error:
        raise OSError(
            f"{folder} has a checkpoint that cannot be read ({error}), so the run is not resumed; "
            "nothing was changed. Make it readable and give the same command again."
        ) from error
    names = {path: _set_aside(path) for path in problems}
    if latest is None:
        _refuse_damaged(folder, {names[path].name: problems[path] for path in problems})
    for path, problem in problems.items():
        warn(
            f"checkpoint {path} is damaged ({problem}); it is set aside as {names[path].name}, and "
            f"{latest.name} serves"
        )
    return latest


def _refuse_damaged(folder: Path, problems: dict[str, str]) -> None:
    """Stop a run that has no whole checkpoint, but damaged ones, set aside now or before."""
    aside = sorted(path.name for path in _entries(folder, f"{_DAMAGED}.*"))
    if aside:
        listed = ", ".join(
            f"{name} ({problems[name]})" if name in problems else name for name in aside
        )
        raise OSError(
            f"{folder} has no checkpoint that is whole, so the run is not resumed. Set aside as "
            f"damaged: {listed}. Put back a whole copy of one under its name {_PREFIX}..., or name "
            "another output to train from step 0."
        )


def _set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint to a name that is free and not that of a checkpoint."""
    for number in count(1):
        suffix = "" if number == 1 else f"-{number}"
        target = path.with_name(f"{_DAMAGED}{path.name}{suffix}")
        if not target.exists():
            return path.rename(target)


def _prune(folder: Path, newest: Path, keep: int) -> None:
    """Remove checkpoints older than the last ``keep`` that are whole; ``newest`` is."""
    whole = 0
    for path in reversed(_all(folder)):
        if whole == keep:
            _remove(path)
        elif path == newest or _is_whole(path):
            whole += 1


def _is_whole(path: Path) -> bool:
    try:
        return find_damage(path) is None
    except OSError:  # it may be; an older one is then kept besides
        return False


def _remove(path: Path) -> None:
    # Under this name what is left of it, if the run is killed here, is no damaged checkpoint.
    shutil.rmtree(path.rename(_part(path)))


def _remove_parts(folder: Path) -> None:
    """Remove what runs have left that were killed while they wrote or removed a checkpoint."""
    for path in _entries(folder, rf"\.{_PREFIX}\d+\.part"):
        shutil.rmtree(path)


def _part(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


def _all(folder: Path) -> list[Path]:
    """The checkpoints, in the order of their steps."""
    return sorted(_entries(folder, rf"{_PREFIX}\d+"), key=_step)


def _entries(folder: Path, pattern: str) -> list[Path]:
    """What the folder has under names of this pattern; nothing if it is not there."""
    try:
        # Not glob, which shows a folder that cannot be read as an empty one.
        return [path for path in folder.iterdir() if re.fullmatch(pattern, path.name)]
    except FileNotFoundError:
        return []


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(_PREFIX))


def _digest(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            found.update(chunk)
    return found.hexdigest()
