"""Packages that only training needs."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(name: str) -> ModuleType:
    """Import a package of the extra ``train``, or say how to install it.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != name:
            raise  # the package is there, and lacks something itself
        raise ModuleNotFoundError(
            f'training needs the package {name}, of the extra "train", which is not installed. '
            'Install it with: pip install "shaped-attn[train]"',
            name=name,
        ) from None
