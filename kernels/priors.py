"""Priors A0 as pairs of jit functions that the kernels take as constexpr arguments.

A prior adds a `Prior` here and a test; the kernels stay as they are. Both functions get broadcast
tensors of key positions of the queries and of the keys, so they serve tiles of either orientation:

- `add_log2(scores, positions, keys, head, parameters)` returns `scores + log2 A0`;
- `times(values, positions, keys, head, parameters)` returns `values * A0`.

`parameters` is a pointer of the caller's choice (None if the prior has none).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl  # noqa: F401 - the interpreter wants it beside a jit function


@dataclass(frozen=True)
class Prior:
    """A prior for the kernels; `is_uniform` marks 1/n over the n visible keys of a row.

    For the uniform prior the functions return their first argument: the kernels use weight 1 and
    divide by n. For every other prior `times` gives A0 itself and D is its row sum.
    """

    add_log2: Any
    times: Any
    is_uniform: bool = False


@triton.jit
def _uniform(values, positions, keys, head, parameters):
    return values


UNIFORM = Prior(add_log2=_uniform, times=_uniform, is_uniform=True)
