"""Settings in a JSON or TOML file, for commands that take them as flags too."""

from __future__ import annotations

import contextlib
import difflib
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .checks import fail


def read(path: Path, known: Sequence[str], remedies: Mapping[str, str]) -> dict[str, Any]:
    """Read settings by name from a JSON file, or from a TOML file on Python 3.11 and later.

    Args:
        path: of the file; its suffix, .json or .toml, says which.
        known: names of the settings.
        remedies: what to do instead of a name that someone may take for a setting.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not of that format, or has a name that is no setting.
    """
    suffix = path.suffix.lower()
    if suffix not in (".json", ".toml"):
        fail(ValueError, "config", "must be a .json or .toml file", path.name, "Rename it.")
    try:
        text = path.read_text(encoding="utf-8")
        values = (
            _parse_toml(text)
            if suffix == ".toml"
            else json.loads(text, object_pairs_hook=_without_repeats)
        )
    except ValueError as error:  # those of both parsers and of the decoder are
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(
            f"{path} must hold settings by name, got {type(values).__name__}. "
            'Write for example {"depth": 64, "width": 128}.'
        )
    for name in values:
        if name not in known:
            remedy = remedies.get(name) or _closest(name, known)
            raise ValueError(f"{path}: {name} is not a setting. {remedy}")
    return values


@contextlib.contextmanager
def naming(path: Path | None, names: Collection[str]) -> Iterator[None]:
    """Put the name of the file before errors of settings that it gives.

    Args:
        path: of the file, None if there is none.
        names: of its settings, without those that the command line gives too.
    """
    try:
        yield
    except (TypeError, ValueError) as error:
        settings = re.findall(r"\w+", str(error).partition(" must ")[0])
        if path is None or not set(settings) & set(names):
            raise
        raise type(error)(f"{path}: {error}") from error


def _closest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name.replace("-", "_"), known, n=1)
    return f"Did you mean {close[0]}?" if close else f"Known are {', '.join(known)}."


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{repeated} is given twice. Give it once.")
    return values


def _parse_toml(text: str) -> dict[str, Any]:
    try:
        import tomllib
    except ModuleNotFoundError:
        raise ValueError(
            "a TOML file needs Python 3.11 or later. Write the same settings as a JSON file."
        ) from None
    return tomllib.loads(text)
