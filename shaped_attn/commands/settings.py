"""Settings of a command: options built from the fields of a dataclass, and files."""

from __future__ import annotations

import contextlib
import difflib
import json
import re
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import Field
from pathlib import Path
from typing import Any

import click

from ..checks import fail
from ..settings import Setting, kinds, names_in_files, settings_of
from .common import READABLE

config_option = click.option(
    "--config",
    type=READABLE,
    help="Read settings from this .json or .toml file, such as that of `predict --output`; flags "
    "win over it. Keys are the flags with underscores; on/off flags have the first name, as in "
    "skip = false.",
)


class List(click.ParamType):
    """Values between commas, as a tuple; with ``or_one`` a single one stays what it is."""

    def __init__(self, kind: type, or_one: bool = False) -> None:
        self.kind, self.or_one, self.name = kind, or_one, "LIST"

    def convert(self, value: Any, param: Any, context: Any) -> Any:
        """Return the values."""
        try:
            found = tuple(self.kind(part.strip()) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is not a list of {self.kind.__name__} between commas")
        return found[0] if self.or_one and len(found) == 1 else found


def setting_options(
    owner: type, *left_out: str, **changes: Mapping[str, Any]
) -> Callable[[Callable], Callable]:
    """Add an option for each setting of a dataclass, which is None if it is not given.

    Args:
        owner: the dataclass.
        left_out: names of settings that get none.
        changes: by the name of a setting, arguments of its `click.option`.
    """

    def decorate(command: Callable) -> Callable:
        for name, (f, described) in reversed(settings_of(owner).items()):
            if name not in left_out:
                kind = kinds(owner)[name]
                command = _option(f, described, kind, changes.get(name, {}))(command)
        return command

    return decorate


def _option(f: Field, described: Setting, kind: Any, changes: Mapping[str, Any]) -> Callable:
    flags = _flags(f.name, described, kind)
    default = described.none
    if default is None and kind is bool:
        default = flags[0].split("/")[0 if f.default else 1].removeprefix("--")
    elif default is None and f.default is not None:
        default = f"{f.default:g}" if isinstance(f.default, float) else str(f.default)
    shown = described.help if default is None else f"{described.help}  [default: {default}]"
    options = {"type": _type(kind, described), "help": shown, **changes}
    return click.option(f.name, *flags, default=None, **options)


def _flags(name: str, described: Setting, kind: Any) -> tuple[str, ...]:
    dashed = name.replace("_", "-")
    return described.flags or (f"--{dashed}" + f"/--no-{dashed}" * (kind is bool),)


def _type(kind: Any, described: Setting) -> Any:
    if described.choices:
        return click.Choice(described.choices)
    if kind in (bool, int, float, str):
        return kind
    # A pair, or one number or several.
    return typing.get_args(kind) if typing.get_origin(kind) is tuple else List(float, or_one=True)


def read(path: Path, flags: Collection[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a JSON file, or on Python 3.11 and later a TOML file, of settings by name.

    It may be the result of `predict` or `compare`. Of a model that it has and one that it
    recommends the latter is taken; what that changes is said on stderr, but for what flags change.

    Args:
        path: of the file; its suffix, .json or .toml, says which.
        flags: names of the settings that the command line gives too.

    Returns:
        The settings, those of the model alone if it is a result; and then those of its prediction.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not of that format.
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
    asked, predicted = values.get("model"), values.get("settings")
    if not isinstance(asked, dict) or not isinstance(predicted, dict):
        return values, {}
    recommended = values.get("recommended")
    if not isinstance(recommended, dict):
        if values.get("tuning") is not None:
            _say(f"{path}: predict recommends no gains; those that were asked for are taken.")
        return asked, predicted
    for name, value in recommended.items():
        if value is not None and value != asked.get(name) and name not in flags:
            _say(f"{path}: {name} {value}, as predict recommends (asked: {asked.get(name)})")
    return recommended, predicted


def by_field(path: Path, values: Mapping[str, Any], owner: type) -> dict[str, Any]:
    """Return the settings of a file by the names of the fields of a dataclass.

    Raises:
        ValueError: a name is no setting, or there twice.
    """
    names, found = names_in_files(owner), {}
    for key, value in values.items():
        if key not in names:
            raise ValueError(f"{path}: {key} is not a setting. {_remedy(key, owner)}")
        if names[key] in found:
            raise ValueError(f"{path}: {key} is given twice, by both of its names. Give it once.")
        found[names[key]] = value
    return found


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


def _remedy(key: str, owner: type) -> str:
    """Say what to do instead of a name that someone may take for a setting."""
    for name, (_, described) in settings_of(owner).items():
        first, *others = _flags(name, described, kinds(owner)[name])
        _, _, off = first.partition("/")
        written = first.partition("/")[0].removeprefix("--").replace("-", "_")
        if f"--{key.replace('_', '-')}" in others:
            return f"Write {written}."
        if f"--{key.replace('_', '-')}" == off:
            return f"Write {written} = false."
    for parameter in click.get_current_context().command.params:
        is_setting = parameter.name in settings_of(owner)
        if not is_setting and f"--{key.replace('_', '-')}" in parameter.opts:
            return f"Give {parameter.opts[0]} on the command line."
    known = names_in_files(owner)
    close = difflib.get_close_matches(key.replace("-", "_"), known, n=1)
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


def _say(text: str) -> None:
    click.echo(text, err=True)
