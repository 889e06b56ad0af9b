"""Parts that the Hopper kernels share: layouts, barriers, packed weights, places, masks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

from ..primitives import BRANCH, SOFTMAX

# Triton 3.9 renamed these.
barrier = getattr(gl, "barrier", None) or gl.thread_barrier
tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global

# Rows of one warpgroup: of one wgmma.
ROWS = gl.constexpr(64)
# Registers of a thread by the number of consumers: what all warps together have room for.
MOST_REGISTERS = {2: 168, 3: 128}


@dataclass(frozen=True)
class Constants:
    """What a kernel is compiled for: its attributes, and those of `shape`, as constexprs."""

    shape: Any

    def __getattr__(self, name: str) -> gl.constexpr:
        if name.startswith("_"):
            raise AttributeError(name)
        return gl.constexpr(getattr(self.shape, name))


def accumulator(columns: int) -> gl.NVMMADistributedLayout:
    """Layout of the result [64, columns] of a product of one warpgroup."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What every kernel is compiled for.

    Attributes:
        width: columns of all tiles.
        dtype: of q, k and v.
        is_causal: whether queries see different keys.
        group: query heads of a key head.
        gain_is_tensor: which gains are.
    """

    width: int
    dtype: gl.dtype
    is_causal: bool
    group: int
    gain_is_tensor: tuple[bool, ...]

    @property
    def outputs(self) -> gl.NVMMADistributedLayout:
        """Layout of a tile of results, [ROWS, width]."""
        return accumulator(self.width)

    @property
    def weights(self) -> gl.DotOperandLayout:
        """Layout of the left operand, from registers, of products with `width` columns."""
        return gl.DotOperandLayout(0, self.outputs, 2)


class Gains(NamedTuple):
    """Gains by place, numbers or pointers, and their strides from head to head.

    (`values` is a name of Triton's own tuples.)
    """

    entries: tuple
    strides: tuple


@gluon.jit
def gain_of(gains, GAIN: gl.constexpr, head, C: gl.constexpr):
    """One gain of one head as float32."""
    gain = gains.entries[GAIN]
    if C.gain_is_tensor[GAIN]:
        gain = gl.load(gain + head * gains.strides[GAIN])
    return gain.to(gl.float32)


@gluon.jit
def sign_of(gains, head, C: gl.constexpr):
    """g of (17): the sign of `branch_gain * softmax_gain` of one head, 0 if it is too small."""
    weight = gain_of(gains, BRANCH, head, C) * gain_of(gains, SOFTMAX, head, C)
    return gl.where(gl.abs(weight) < 2.0**-100, 0.0, gl.where(weight > 0.0, 1.0, -1.0))


# ------------------------------------------------------------------------------- named barriers
@gluon.jit
def _effect(TEXT: gl.constexpr):
    gl.inline_asm_elementwise(TEXT, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def consumers_meet(CONSUMERS: gl.constexpr):
    """Barrier of all consumer warpgroups."""
    TEXT: gl.constexpr = f"bar.sync 8, {CONSUMERS * 128}; mov.u32 $0, 0;"
    _effect(TEXT)


@gluon.jit
def turn_wait(c: gl.constexpr):
    """Wait until it is consumer c's turn to issue products."""
    TEXT: gl.constexpr = f"bar.sync {c + 8}, 256; mov.u32 $0, 0;"
    _effect(TEXT)


@gluon.jit
def turn_pass(c: gl.constexpr, CONSUMERS: gl.constexpr):
    """Let the next consumer issue its products."""
    TEXT: gl.constexpr = f"bar.arrive {(c + 1) % CONSUMERS + 8}, 256; mov.u32 $0, 0;"
    _effect(TEXT)


# ------------------------------------------------------------------------------- packed weights
@gluon.jit
def pack(x, dtype: gl.constexpr):
    """Round neighbouring columns to `dtype`, two in one int32: [ROWS, N] -> [ROWS, N / 2].

    Weights wait for their product as integers: as halves each would take a register of its own.
    """
    low, high = gl.split(x.reshape([x.shape[0], x.shape[1] // 2, 2]))
    KIND: gl.constexpr = "bf16x2" if dtype == gl.bfloat16 else "f16x2"
    return gl.inline_asm_elementwise(
        f"cvt.rn.{KIND}.f32 $0, $2, $1;",
        "=r,r,r",
        [low, high],
        dtype=gl.int32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def unpack(packed, zero, dtype: gl.constexpr, layout: gl.constexpr):
    """Packed weights as an operand of a product: [ROWS, N / 2] -> [ROWS, N].

    `zero` is 0, but the assembler does not know: it serialises products (C7513) whose operand's
    registers are written while others run, as a plain copy of the last weights would be. Impure, so
    that it stays ahead of the products.
    """
    packed = gl.inline_asm_elementwise(
        "xor.b32 $0, $1, $2;", "=r,r,r", [packed, zero], dtype=gl.int32, is_pure=False, pack=1
    )
    low = packed.to(gl.int16).to(dtype, bitcast=True)
    high = (packed >> 16).to(gl.int16).to(dtype, bitcast=True)
    both = gl.join(low, high).reshape([packed.shape[0], packed.shape[1] * 2])
    return gl.convert_layout(both, layout)


@gluon.jit
def sum_packed(packed, dtype: gl.constexpr):
    """Sum in float32 of the rounded weights of each row."""
    if dtype == gl.bfloat16:
        low = (packed << 16).to(gl.float32, bitcast=True)
        high = (packed & -65536).to(gl.float32, bitcast=True)
    else:
        low = packed.to(gl.int16).to(dtype, bitcast=True).to(gl.float32)
        high = (packed >> 16).to(gl.int16).to(dtype, bitcast=True).to(gl.float32)
    return gl.sum(low + high, 1)


@gluon.jit
def pin(x):
    """x, through an instruction with an effect that depends on it: a barrier never reached.

    It keeps the work that makes x ahead of the next wait, which the assembler would move up. (A
    trap in place of the barrier makes it serialise the products, C7518.)
    """
    return gl.inline_asm_elementwise(
        "{ .reg .pred never; setp.eq.u32 never, $1, 0x7f812345;"
        " @never bar.arrive 15, 128; mov.b32 $0, $1; }",
        "=r,r",
        [x],
        dtype=x.dtype,
        is_pure=False,
        pack=1,
    )


# ------------------------------------------------------------------------- tiles and visibility
@gluon.jit
def uniform(x):
    """x, an int32 that all threads have in common, as the assembler now knows.

    It keeps x, and what follows from it, in uniform registers, which are plenty.
    """
    return gl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, 0, 31, -1;", "=r,r", [x], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def place(tile, tiles, heads_together, CAUSAL: gl.constexpr, LAST_FIRST: gl.constexpr):
    """Head (batch and head in one) and number within it of a tile; a head has `tiles`.

    Under a causal mask the longest go first, within as many heads as share the L2 cache.
    """
    section = tile // (heads_together * tiles)
    rest = tile - section * (heads_together * tiles)
    if CAUSAL:
        head = section * heads_together + rest % heads_together
        number = rest // heads_together
        if LAST_FIRST:
            number = tiles - 1 - number
    else:
        head = section * heads_together + rest // tiles
        number = rest % tiles
    return head, number


@gluon.jit
def before(bound, COLUMNS: gl.constexpr, layout: gl.constexpr):
    """[ROWS, COLUMNS] of bool: columns below the `bound` of their row.

    A thread's columns are 8 i + lane + {0, 1}, lane in {0, 2, 4, 6}. With the lane on the side of
    the bound columns are immediates; as they stand all of them would be kept in registers.
    """
    columns = gl.arange(0, COLUMNS, gl.SliceLayout(0, layout))
    return (columns & -7)[None, :] < bound[:, None] - (columns & 6)[None, :]
