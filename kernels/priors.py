"""Priors A0 as jit functions that the kernels take as constexpr arguments.

A new prior is a `Prior` here and a test; the kernels stay as they are. The functions get broadcast
tensors of key positions of the queries and of the keys; the first two serve tiles of either
orientation, the third, which a prior that can be learned has, rows of queries:

- `add_log2(scores, positions, keys, first_key, head, parameters)` returns `scores + log2 A0`;
- `times(values, positions, keys, first_key, head, parameters)` returns `values * A0`;
- `accumulate(sums, d_logs, positions, keys, first_key)` adds the gradient (19) of a tile to
  that of the table, a tuple with a number per query for each of its `entries`.

`first_key` is the key position of the first token, `parameters` a tuple of the prior's own (None if
it has none), which `prior_parameters` makes. The forms are those of `shaped_attn.priors`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from .primitives import LOG2_E


@dataclass(frozen=True, eq=False)
class Prior:
    """A prior for the kernels; `is_uniform` marks 1/n over the n visible keys of a row.

    For the uniform prior the functions return their first argument: the kernels use weight 1 and
    divide by n. For every other prior `times` gives A0 itself and D is its row sum.
    """

    add_log2: Any
    times: Any
    accumulate: Any = None
    entries: int = 0
    is_uniform: bool = False


@triton.jit
def _uniform(values, positions, keys, first_key, head, parameters):
    return values


@triton.jit
def _geometric_log2(positions, keys, first_key, head, parameters):
    base = parameters[0] + head * parameters[1]
    corner = tl.load(base)
    diagonal = tl.load(base + 1)
    first = tl.load(base + 2)
    other = tl.load(base + 3)
    fall = tl.load(base + 4)
    steps = tl.abs(positions - keys) - 1
    is_first = keys == first_key
    on = tl.where(is_first, corner, diagonal)
    off = tl.where(is_first, first, other) - fall * steps.to(tl.float32)
    return tl.where(steps < 0, on, off)


@triton.jit
def _geometric_add_log2(scores, positions, keys, first_key, head, parameters):
    return scores + _geometric_log2(positions, keys, first_key, head, parameters)


@triton.jit
def _geometric_times(values, positions, keys, first_key, head, parameters):
    return values * tl.math.exp2(_geometric_log2(positions, keys, first_key, head, parameters))


@triton.jit
def _geometric_accumulate(sums, d_logs, positions, keys, first_key):
    corner, diagonal, first, other, fall = sums
    steps = tl.abs(positions - keys) - 1
    is_first = keys == first_key
    on = tl.where(steps < 0, d_logs, 0.0)
    off = d_logs - on
    corner += tl.sum(tl.where(is_first, on, 0.0), 1)
    diagonal += tl.sum(tl.where(is_first, 0.0, on), 1)
    first += tl.sum(tl.where(is_first, off, 0.0), 1)
    other += tl.sum(tl.where(is_first, 0.0, off), 1)
    fall -= tl.sum(off * steps.to(tl.float32), 1)
    return corner, diagonal, first, other, fall


@triton.jit
def _column_entries(positions, keys, first_key, head, parameters):
    tokens = parameters[2]
    base = parameters[0] + tl.cast(head, tl.int64) * parameters[1]
    i = tl.minimum(tl.maximum(positions - first_key, 0), tokens - 1)
    j = tl.minimum(tl.maximum(keys - first_key, 0), tokens - 1)
    row = tl.load(base + i)
    above = tl.load(base + tokens + i)
    column = tl.load(base + 2 * tokens + j)
    diagonal = tl.load(base + 3 * tokens + i)
    # In this order no term is negative, and nothing cancels.
    entries = tl.where(positions == keys, diagonal, row + (column - above))
    return tl.where(positions >= keys, entries, 0.0)


@triton.jit
def _column_add_log2(scores, positions, keys, first_key, head, parameters):
    return scores + tl.math.log2(_column_entries(positions, keys, first_key, head, parameters))


@triton.jit
def _column_times(values, positions, keys, first_key, head, parameters):
    return values * _column_entries(positions, keys, first_key, head, parameters)


@triton.jit
def _dense_log2(positions, keys, first_key, head, parameters):
    # Triton 3.6.0 loses constants in a tuple within a tuple, so the strides are in this one.
    pointer, head_stride, row_stride, key_stride, first_position, T, S = parameters
    rows = tl.cast(positions - first_position, tl.int64)
    columns = tl.cast(keys, tl.int64)
    inside = (rows >= 0) & (rows < T) & (columns < S)
    offsets = tl.cast(head, tl.int64) * head_stride + rows * row_stride + columns * key_stride
    logs = tl.load(pointer + offsets, mask=inside, other=-float("inf"))
    return logs.to(tl.float32) * LOG2_E


@triton.jit
def _dense_add_log2(scores, positions, keys, first_key, head, parameters):
    return scores + _dense_log2(positions, keys, first_key, head, parameters)


@triton.jit
def _dense_times(values, positions, keys, first_key, head, parameters):
    return values * tl.math.exp2(_dense_log2(positions, keys, first_key, head, parameters))


UNIFORM = Prior(_uniform, _uniform, is_uniform=True)

PRIORS = {
    "geometric": Prior(_geometric_add_log2, _geometric_times, _geometric_accumulate, entries=5),
    "column": Prior(_column_add_log2, _column_times),
    "dense": Prior(_dense_add_log2, _dense_times),
}
"""Priors by the form of their table."""


def prior_parameters(form: str, values: torch.Tensor, H: int, T: int, S: int, q_offset: int):
    """Kernel arguments of a table of `shaped_attn.priors`: (H or 1, ...), or broadcast if dense."""
    if form == "dense":
        values = values.expand(H, T, S)
        return values, *values.stride(), q_offset, T, S
    values = values.to(torch.float32).contiguous()
    head_stride = 0 if values.shape[0] == 1 else values.stride(0)
    return (values, head_stride) if form == "geometric" else (values, head_stride, values.shape[2])
