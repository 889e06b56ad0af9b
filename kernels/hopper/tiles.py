"""Tiles of the Hopper kernels by release of Triton: the fastest on an H200, or on an H100 once.

The assembler that comes with Triton 3.9 needs more registers: tiles that spill there are others.
"""

from __future__ import annotations

from typing import NamedTuple

from ..configs import TileConfig
from ..families import triton_release

WIDTHS = (64, 128, 256)
"""Columns of a tile: head dimensions up to the larger run, in the next width that holds them."""

MOST_COLUMNS_AT_ONCE = 128
"""Width up to which shared memory holds results of a forward too, and registers dk with dv."""


class ForwardTile(NamedTuple):
    """Tile of the forward; fields as in `ForwardShape`."""

    consumers: int
    block_s: int
    stages: int
    row_sums: str
    takes_turns: bool


_FORWARD = {
    64: ForwardTile(3, 128, 3, "product", True),
    128: ForwardTile(2, 128, 2, "product", True),
    256: ForwardTile(2, 64, 2, "packed", True),  # not measured
}
_FORWARD_3_9 = _FORWARD | {
    64: ForwardTile(3, 64, 4, "product", True),
    128: ForwardTile(2, 128, 2, "packed", True),
}


class DkdvTile(NamedTuple):
    """Tile of the gradients of k and v; fields as in `DkdvShape`."""

    consumers: int
    block_t: int
    stages: int


class DqTile(NamedTuple):
    """Tile of the gradient of q; fields as in `DqShape`."""

    consumers: int
    block_s: int
    stages: int
    is_pinned: bool


# By width, and whether there is a causal mask. No tile of width 256 has been measured.
_DKDV = {
    (64, False): DkdvTile(2, 128, 2),
    (64, True): DkdvTile(3, 64, 3),
    (128, False): DkdvTile(2, 64, 2),
    (128, True): DkdvTile(2, 64, 2),
    (256, False): DkdvTile(2, 32, 3),
    (256, True): DkdvTile(2, 32, 3),
}
# By width: where dv has a launch of its own.
_DV = {256: DkdvTile(2, 64, 2)}
_DQ = {
    (64, False): DqTile(3, 64, 3, True),
    (64, True): DqTile(3, 64, 3, True),
    (128, False): DqTile(3, 64, 2, True),
    (128, True): DqTile(2, 128, 2, False),
    (256, False): DqTile(2, 32, 3, True),
    (256, True): DqTile(2, 32, 3, True),
}
# By width, and whether there is a causal mask: dk, dv and dq in one kernel.
_FUSED = {
    (64, False): DkdvTile(2, 128, 2),
    (64, True): DkdvTile(2, 128, 2),
    (128, False): DkdvTile(2, 64, 2),
    (128, True): DkdvTile(2, 64, 2),
}
_FUSED_3_9 = {(128, True): DkdvTile(2, 64, 2)}
_DQ_3_9 = _DQ | {(128, False): DqTile(2, 128, 2, False)}


def width_of(head_dim: int, value_dim: int) -> int:
    """Columns of the tiles of a call: the smallest width that holds both head dimensions."""
    return next(width for width in WIDTHS if width >= max(head_dim, value_dim))


# For width 64 and, by whether there is a causal mask, up to so many keys: tiles are short then, and
# the instruction cache holds all code of two consumers.
_FORWARD_OF_TWO = ForwardTile(2, 128, 3, "product", True)
_MOST_KEYS_OF_TWO = {True: 4096, False: 1024}


def forward_tile(width: int, is_causal: bool, keys: int) -> ForwardTile:
    """Tile of the forward for one width."""
    if width == 64 and keys <= _MOST_KEYS_OF_TWO[is_causal]:
        return _FORWARD_OF_TWO
    return (_FORWARD if triton_release() < (3, 9) else _FORWARD_3_9)[width]


def marked_tile(width: int) -> TileConfig:
    """Tile of the portable forward for the queries that the forward has marked, 64 at a time."""
    num_warps = 4 if width <= MOST_COLUMNS_AT_ONCE else 8
    return TileConfig(64, 64, num_warps, 2, masked_stages=1, use_descriptors=False)


def dkdv_tile(width: int, is_causal: bool) -> DkdvTile:
    """Tile of the gradients of k and v for one width; of k where `dv_tile` has one."""
    return _DKDV[width, is_causal]


def dv_tile(width: int) -> DkdvTile:
    """Tile of the gradient of v for one width above `MOST_COLUMNS_AT_ONCE`."""
    return _DV[width]


def fused_tile(width: int, is_causal: bool) -> DkdvTile | None:
    """Tile of all three gradients in one kernel for one width; None where two kernels do better."""
    return (_FUSED if triton_release() < (3, 9) else _FUSED_3_9).get((width, is_causal))


def dq_tile(width: int, is_causal: bool) -> DqTile:
    """Tile of the gradient of q for one width."""
    return (_DQ if triton_release() < (3, 9) else _DQ_3_9)[width, is_causal]


_L2_BYTES = 32 * 2**20
_MULTIPROCESSORS = 132


def heads_together(
    heads: int, group: int, tiles: int, bytes_of_key_head: int, is_causal: bool
) -> int:
    """Query heads whose tiles are mixed, the longest first: a divisor of `heads`.

    Their keys and values stay in the L2 cache, but there are at least as many tiles as
    multiprocessors. Without a causal mask tiles are of one length, and heads follow one another.
    """
    if not is_causal:
        return 1
    fit = max(1, _L2_BYTES // bytes_of_key_head) * group
    fit = max(fit, -(-_MULTIPROCESSORS // tiles))
    return max(n for n in range(1, heads + 1) if heads % n == 0 and n <= fit)
