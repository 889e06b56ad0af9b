"""Which keys each query sees: one object, from the public function to the kernels."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Visibility(NamedTuple):
    """Which of the S keys each of the T queries sees.

    Query i sits at key position p(i) = q_offset + i. In batch entry b and head h it sees key j if
    key_start[b] <= j < key_end[b], and j <= p(i) if is_causal, and attn_mask[b, h, i, j].

    Attributes:
        is_causal: whether queries see no key after their own position.
        q_offset: key position of query 0; None, which is S - T, only before `validation.complete`.
        key_start, key_end: (B,) integers, the range of keys per batch entry; None for no limit.
        attn_mask: bool, (B, H, T, S) after `validation.complete`; None for no further limit.
    """

    is_causal: bool = False
    q_offset: int | None = None
    key_start: Tensor | None = None
    key_end: Tensor | None = None
    attn_mask: Tensor | None = None
