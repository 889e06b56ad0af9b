"""Which family of kernels runs a call: a pure function of what the call is, and of a choice."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import triton

CHOICES = ("auto", "portable", "hopper")
"""What `use_family` and the environment variable SHAPED_ATTN_FAMILY take."""

_ENVIRONMENT = "SHAPED_ATTN_FAMILY"
_HOPPER = 90
_HOPPER_DTYPES = (torch.bfloat16, torch.float16)
_MOST_COLUMNS = 256
# Releases of Triton whose Gluon the Hopper kernels compile with.
_HOPPER_RELEASES = ((3, 6), (3, 9))
# What "auto" takes the Hopper kernels for: head dimension and release. Measured on an H200 in
# bfloat16 with a key head for each query head; see bench/NOTES.md.
_MEASURED = {(64, (3, 6)), (128, (3, 6))}
# Query rows, of all heads: a tile for each multiprocessor of an H100. Estimated.
_FEWEST_ROWS = 128 * 132


def _checked(choice: str, name: str) -> str:
    if choice not in CHOICES:
        raise ValueError(f"{name} must be one of {', '.join(CHOICES)}, got {choice!r}")
    return choice


# Of the whole process: autograd runs the backward passes of a GPU in threads of its own.
_choice = _checked(os.environ.get(_ENVIRONMENT, "auto"), _ENVIRONMENT)


def chosen_family() -> str:
    """The choice in force: that of the `use_family` around, or of the environment."""
    return _choice


@contextmanager
def use_family(family: str) -> Iterator[None]:
    """Choose the family of kernels for the calls inside, in all threads, backward passes included.

    "portable" takes every call. "hopper" takes whatever its kernels can, measured or not, and
    leaves the rest (masks, priors, float32, head dimensions above 256, tensors that TMA cannot
    read) to "portable". "auto", the default, takes "hopper" where it was measured to be faster.
    The environment variable SHAPED_ATTN_FAMILY, read at import, sets the default.

    Args:
        family: one of `CHOICES`.

    Raises:
        ValueError: `family` is none of these; from calls, "hopper" on a GPU other than sm_90.
    """
    global _choice
    before, _choice = _choice, _checked(family, "family")
    try:
        yield
    finally:
        _choice = before


def triton_release() -> tuple[int, int]:
    """Major and minor version of the installed Triton."""
    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


@functools.lru_cache
def _warn_unknown_release(release: tuple[int, int]) -> None:
    known = " and ".join(".".join(map(str, known)) for known in _HOPPER_RELEASES)
    warnings.warn(
        f"shaped_attn's Hopper kernels are for Triton {known}, this is {release[0]}.{release[1]}: "
        f"the portable kernels are used, which are slower. Install one of these releases, or set "
        f"{_ENVIRONMENT}=portable to silence this.",
        stacklevel=2,
    )


def pick_family(
    arch: int | str,
    dtype: torch.dtype,
    head_dim: int,
    value_dim: int,
    *,
    weighed_by: str | None,
    rows: int,
    group: int,
    fits_tma: bool,
    release: tuple[int, int],
    choice: str = "auto",
) -> str:
    """Name of the family that runs a call.

    Args:
        arch: compute capability as an integer (90), a gfx name, or "interpreter".
        dtype: of q, k and v.
        head_dim: columns of q and k.
        value_dim: columns of v.
        weighed_by: as in `Call`.
        rows: of queries, in all heads and batch entries.
        group: query heads of a key head.
        fits_tma: whether TMA can read q, k and v.
        release: of Triton.
        choice: one of `CHOICES`.

    Raises:
        ValueError: the choice is "hopper", and the GPU is none.
    """
    if choice == "hopper" and arch != _HOPPER:
        raise ValueError(
            f"the family of kernels 'hopper' needs a GPU of compute capability 9.0, this is "
            f"{arch}: choose 'auto' or 'portable' ({_ENVIRONMENT} or use_family)"
        )
    runs = (
        arch == _HOPPER
        and dtype in _HOPPER_DTYPES
        and max(head_dim, value_dim) <= _MOST_COLUMNS
        and weighed_by is None
        and fits_tma
    )
    if choice == "portable" or not runs:
        return "portable"
    if release not in _HOPPER_RELEASES:
        _warn_unknown_release(release)
        return "portable"
    is_measured = (
        dtype == torch.bfloat16
        and head_dim == value_dim
        and (head_dim, release) in _MEASURED
        and group == 1
        and rows >= _FEWEST_ROWS
    )
    return "hopper" if choice == "hopper" or is_measured else "portable"
