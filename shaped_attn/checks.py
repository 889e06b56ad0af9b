"""Checks of arguments and settings, in one wording: the argument, the rule, the value, the remedy.

Each returns the value in its normal type. TypeError is for a wrong type, ValueError for a value out
of its range. Imports neither torch, which the commands' help does without, nor any other part of
the package.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Collection, Iterable
from numbers import Integral, Real
from typing import TYPE_CHECKING, NoReturn, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
HeadGain = float | tuple[float, ...]
"""A gain as a setting: one number, or one for each head."""


def fail(error: type[Exception], argument: str, rule: str, got: object, remedy: str) -> NoReturn:
    """Raise ``error`` in the one wording that all checks share."""
    raise error(f"{argument} {rule}, got {got}. {remedy}")


def describe(value: object) -> str:
    """Return how an error shows ``value``: a Tensor by its shape, unread, and others by repr."""
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple):
        return f"a {type(value).__name__} of shape {tuple(shape)}"
    return reprlib.repr(value)


def check_number(name: str, value: object, low: float = -math.inf, high: float = math.inf) -> float:
    """Return ``value`` as a float if it is a finite number from ``low`` to ``high``."""
    if isinstance(value, bool) or not isinstance(value, Real):
        fail(TypeError, name, "must be a number", describe(value), "Pass a float.")
    if not math.isfinite(value):
        fail(ValueError, name, "must be finite", value, "Pass a finite number.")
    _check_bounds(name, value, low, high)
    return float(value)


def check_positive(name: str, value: object, high: float = math.inf) -> float:
    """Return ``value`` as a float if it is finite, greater than 0 and at most ``high``."""
    number = check_number(name, value, high=high)
    if number <= 0.0:
        fail(ValueError, name, "must be greater than 0", value, "Pass a positive number.")
    return number


def check_int(name: str, value: object, low: float = -math.inf, high: float = math.inf) -> int:
    """Return ``value`` as an int if it is a whole number from ``low`` to ``high``."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        fail(TypeError, name, "must be an int", describe(value), "Pass a whole number.")
    _check_bounds(name, value, low, high)
    return int(value)


def check_size(name: str, value: object) -> int:
    """Return ``value`` as an int if it is one of at least 1."""
    return check_int(name, value, low=1)


def check_numbers(
    name: str,
    values: object,
    count: int | None = None,
    low: float = -math.inf,
    high: float = math.inf,
    ascending: bool = False,
) -> tuple[float, ...]:
    """Return ``values`` as floats if they are ``count`` numbers, or at least one if that is None.

    Args:
        name: of the argument.
        values: a sequence, Tensor or array of one dimension.
        count: how many there must be.
        low, high: of each of them, as in `check_number`.
        ascending: whether each must be above the one before.
    """
    if hasattr(values, "tolist"):
        values = values.tolist()
    rule = "must be a sequence of numbers" if count is None else f"must be {count} numbers"
    if isinstance(values, str) or not isinstance(values, Iterable):
        fail(TypeError, name, rule, describe(values), "Pass them as a tuple.")
    numbers = tuple(check_number(name, value, low, high) for value in values)
    if not numbers or count not in (None, len(numbers)):
        fail(ValueError, name, rule, f"{len(numbers)} of them", "Pass as many as that.")
    if ascending and any(a >= b for a, b in zip(numbers, numbers[1:], strict=False)):
        fail(ValueError, name, "must ascend", numbers, "Sort them, and give each one once.")
    return numbers


def check_kind(name: str, value: object, kind: type[T], remedy: str) -> T:
    """Return ``value`` if it is of a class."""
    if not isinstance(value, kind):
        fail(TypeError, name, f"must be a {kind.__name__}", type(value).__name__, remedy)
    return value


def check_not_empty(name: str, values: Collection[T]) -> Collection[T]:
    """Return ``values`` if there is at least one."""
    if not values:
        fail(ValueError, name, "must not be empty", "none", "Give at least one.")
    return values


def check_head_gain(name: str, gain: object, heads: int) -> HeadGain:
    """Return a gain: a finite number as float; one for each head, also a Tensor, as tuple."""
    if hasattr(gain, "tolist"):
        gain = gain.tolist()
    if isinstance(gain, str) or not isinstance(gain, Iterable):
        return check_number(name, gain)
    gains = tuple(check_number(name, value) for value in gain)
    if len(gains) != heads:
        rule = f"must be a number or {heads} numbers, one per head"
        remedy = "Give one number for all heads, or one for each."
        fail(ValueError, name, rule, f"{len(gains)} of them", remedy)
    return gains


def check_flag(name: str, value: object) -> bool:
    """Return ``value`` if it is True or False."""
    if not isinstance(value, bool):
        fail(TypeError, name, "must be True or False", describe(value), "Pass a bool.")
    return value


def check_choice(name: str, value: T, choices: Collection[T]) -> T:
    """Return ``value`` if it is one of ``choices``."""
    if value not in tuple(choices):
        listed = ", ".join(map(repr, choices))
        fail(ValueError, name, f"must be one of {listed}", describe(value), "Choose one of these.")
    return value


def check_choice_or_number(name: str, value: object, choices: Collection[str]) -> str | float:
    """Return ``value`` if it is one of ``choices``, or as a float if it is a finite number."""
    if isinstance(value, str):
        return check_choice(name, value, choices)
    return check_number(name, value)


def check_divides(name: str, value: int, other_name: str, other: int) -> None:
    """Check that ``value`` divides ``other``."""
    if other % value != 0:
        remedy = f"Choose a divisor of {other}, or another {other_name}."
        fail(ValueError, name, f"must divide {other_name}, {other}", value, remedy)


def check_shape(name: str, x: Tensor, shape: tuple[int | str, ...]) -> None:
    """Check the sizes of ``x``; a letter in ``shape`` stands for any size."""
    if x.ndim != len(shape) or any(
        size != wanted and not isinstance(wanted, str)
        for size, wanted in zip(x.shape, shape, strict=True)
    ):
        rule = f"must have shape ({', '.join(map(str, shape))})"
        remedy = "Reshape it, or build the module for these sizes."
        fail(ValueError, name, rule, f"shape {tuple(x.shape)}", remedy)


def _check_bounds(name: str, value: float, low: float, high: float) -> None:
    if low <= value <= high:
        return
    low_text, high_text = (f"{x:g}" if isinstance(x, float) else str(x) for x in (low, high))
    if high == math.inf:
        rule = f"must be at least {low_text}"
    elif low == -math.inf:
        rule = f"must be at most {high_text}"
    else:
        rule = f"must be from {low_text} to {high_text}"
    fail(ValueError, name, rule, value, "Pass a number in that range.")
