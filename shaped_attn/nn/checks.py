"""Checks of the arguments of modules, in the wording of `shaped_attn.validation`."""

from __future__ import annotations

import math
from numbers import Integral, Real

from torch import Tensor

from ..validation import fail


def check_size(name: str, value: int) -> int:
    """Return ``value`` if it is an int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        fail(TypeError, name, "must be an int", repr(value), "Pass a whole number.")
    if value < 1:
        fail(ValueError, name, "must be at least 1", value, "Pass a positive number.")
    return int(value)


def check_number(name: str, value: float, low: float = -math.inf, high: float = math.inf) -> float:
    """Return ``value`` as a float if it is a finite number from ``low`` to ``high``."""
    if isinstance(value, bool) or not isinstance(value, Real):
        fail(TypeError, name, "must be a number", repr(value), "Pass a float.")
    value = float(value)
    if not math.isfinite(value):
        fail(ValueError, name, "must be finite", value, "Pass a finite number.")
    if not low <= value <= high:
        bounds = f"must be at least {low:g}"
        if high < math.inf:
            bounds = f"must be from {low:g} to {high:g}"
        fail(ValueError, name, bounds, value, "Pass a number in that range.")
    return value


def check_positive(name: str, value: float) -> float:
    """Return ``value`` as a float if it is finite and greater than 0."""
    value = check_number(name, value, low=0.0)
    if value == 0.0:
        fail(ValueError, name, "must be greater than 0", value, "Pass a positive number.")
    return value


def check_choice(name: str, value: object, choices: tuple) -> None:
    """Check that ``value`` is one of ``choices``."""
    if value not in choices:
        listed = ", ".join(map(repr, choices))
        fail(ValueError, name, f"must be one of {listed}", repr(value), "Choose one of these.")


def check_divides(name: str, value: int, other_name: str, other: int) -> None:
    """Check that ``value`` divides ``other``."""
    if other % value != 0:
        fail(
            ValueError,
            name,
            f"must divide {other_name}, {other}",
            value,
            f"Choose a divisor of {other}, or another {other_name}.",
        )


def check_shape(name: str, x: Tensor, shape: tuple[int | str, ...]) -> None:
    """Check the sizes of ``x``; a letter in ``shape`` stands for any size."""
    fits = x.ndim == len(shape)
    if fits:
        for size, wanted in zip(x.shape, shape, strict=True):
            if not isinstance(wanted, str) and size != wanted:
                fits = False
    if not fits:
        fail(
            ValueError,
            name,
            f"must have shape ({', '.join(map(str, shape))})",
            f"shape {tuple(x.shape)}",
            "Reshape it, or build the module for these sizes.",
        )
