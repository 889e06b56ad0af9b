"""Settings stated once, as fields of a dataclass: what they mean, and which values they take.

`shaped_attn.commands.settings` builds the options of a command from the fields, and `documented`
the docstring. Imports neither torch nor click.
"""

from __future__ import annotations

import functools
import inspect
import textwrap
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, TypeVar

from .checks import check_choice, check_flag, check_int, check_number, describe, fail

Check = Callable[[str, Any], Any]
"""Takes name and value, and returns the value in its normal type or raises."""

T = TypeVar("T", bound=type)

_KEY = "setting"  # of the metadata of a field


@dataclass(frozen=True)
class Setting:
    """What a field of a dataclass says about itself.

    Attributes:
        help: what it means, in sentences.
        check: of a value. Default None: that of its choices or of its type.
        choices: the values that it may have; empty if it has other rules.
        none: in words, what the default None stands for. Default None: there is no such default.
        flags: as they are spelled on the command line. Default: --name, and --name/--no-name for
            one that is on or off.
    """

    help: str
    check: Check | None = None
    choices: Sequence[Any] = ()
    none: str | None = None
    flags: tuple[str, ...] = ()


def setting(default: Any, help: str, check: Check | None = None, **others: Any) -> Any:
    """Return a field of a dataclass with a `Setting`; ``MISSING`` is no default."""
    return field(default=default, metadata={_KEY: Setting(help, check, **others)})


def setting_of(owner: type, name: str) -> Any:
    """Return a field that is the same as one of another dataclass."""
    (found,) = (f for f in fields(owner) if f.name == name)
    return field(default=found.default, metadata=found.metadata)


def settings_of(owner: type) -> dict[str, tuple[Field, Setting]]:
    """Return the fields of a dataclass that are settings, by name."""
    return {f.name: (f, f.metadata[_KEY]) for f in fields(owner) if _KEY in f.metadata}


def names_in_files(owner: type) -> dict[str, str]:
    """Return the fields by the names that they have in files: their own, or that of the flag."""
    found = {}
    for name, (_, described) in settings_of(owner).items():
        flag = described.flags[0].partition("/")[0].removeprefix("--") if described.flags else name
        found |= {name: name, flag.replace("-", "_"): name}
    return found


@functools.cache
def kinds(owner: type) -> dict[str, Any]:
    """Return the annotated types of a dataclass by name of the field, without the None of some."""
    return {name: _without_none(kind) for name, kind in typing.get_type_hints(owner).items()}


def check_settings(instance: Any) -> None:
    """Check every setting of a dataclass, and bring it into the normal type of its check.

    Raises:
        TypeError, ValueError: a value is of the wrong type or out of its range.
    """
    owner = type(instance)
    for name, (f, described) in settings_of(owner).items():
        value = getattr(instance, name)
        if value is None and f.default is None:
            continue
        check = described.check or _CHECKS.get(kinds(owner)[name])
        if described.choices:
            check_choice(name, value, described.choices)
        elif check is not None:
            object.__setattr__(instance, name, check(name, value))


def documented(owner: T) -> T:
    """Add what the settings of a dataclass mean to its docstring."""
    lines = [inspect.cleandoc(owner.__doc__ or ""), "", "Attributes:"]
    for name, (f, described) in settings_of(owner).items():
        text = f"{name}: {described.help}"
        if described.choices:
            text += f" One of {', '.join(map(_quoted, described.choices))}."
        if described.none is not None:
            text += f" Default None: {described.none}."
        elif f.default is not MISSING:
            text += f" Default {_quoted(f.default)}."
        lines += textwrap.wrap(text, 96, initial_indent=" " * 4, subsequent_indent=" " * 8)
    owner.__doc__ = "\n".join(lines)
    return owner


def check_text(name: str, value: object) -> str:
    """Return ``value`` if it is a str."""
    if not isinstance(value, str):
        fail(TypeError, name, "must be text", describe(value), "Write it in quotes.")
    return value


_CHECKS: dict[Any, Check] = {
    bool: check_flag,
    int: check_int,
    float: check_number,
    str: check_text,
}


def _without_none(kind: Any) -> Any:
    members = [member for member in typing.get_args(kind) if member is not types.NoneType]
    is_optional = isinstance(kind, types.UnionType) and len(members) < len(typing.get_args(kind))
    return functools.reduce(lambda a, b: a | b, members) if is_optional else kind


def _quoted(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)
