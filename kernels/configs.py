"""Launch configurations: a pure function of kernel, head dimension, element size and architecture.

No Triton and no GPU here. The tables name only configurations that `compile_gate` compiles for
every architecture; sequence length is never a key, so no length causes a recompilation.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial

MAX_HEAD_DIM = 256
"""Largest head dimension (D of q and k, Dv of v) that the Triton kernels take."""

KERNELS = ("forward", "preprocess", "dkdv", "dq")
"""Kernels with a configuration: one forward, three backward."""


@dataclass(frozen=True)
class TileConfig:
    """Tile sizes and launch options of one kernel.

    Attributes:
        block_t, block_s: query rows and keys of one tile of scores.
        num_warps, num_stages: of a program, and of its pipeline of loads.
        sum_block: rows of v in one entry of its sums; a power of two.
        row_sums: of the forward: "packed" sums the rounded weights of a row as they are rounded,
            "product" multiplies them by ones on the tensor cores.
        use_descriptors: load tiles by tensor descriptors where hardware and tensor allow.
        masked_stages: `num_stages` of the loop over blocks that need a mask where there is another
            over those that need none; None for the same.
        max_registers: per thread; None for as many as the compiler takes.
        measured_on: the GPU on which these tiles were the fastest of a sweep. Only then may they
            spill registers or serialise products.
    """

    block_t: int
    block_s: int
    num_warps: int
    num_stages: int
    sum_block: int = 64
    row_sums: str = "packed"
    use_descriptors: bool = True
    masked_stages: int | None = None
    max_registers: int | None = None
    measured_on: str = ""


def padded_width(width: int) -> int:
    """Columns that a matrix of `width` columns has in memory: a multiple of 8.

    Rows of 16-bit elements then start at multiples of 16 bytes, what one load takes at most.
    """
    return -(-width // 8) * 8


def block_width(width: int) -> int:
    """Columns of a tile: a power of two that holds `width`, at least the 16 of a product."""
    return max(16, 1 << (width - 1).bit_length())


ARCHITECTURES: tuple[int | str, ...] = (80, 90, 100, "gfx942")
"""Architectures with a table of their own; `_table_of` says which one serves the others."""

_override: ContextVar[TileConfig | None] = ContextVar("tile_config", default=None)


def overriding_config() -> TileConfig | None:
    """The configuration of the `override_config` around, if any."""
    return _override.get()


@contextmanager
def override_config(config: TileConfig) -> Iterator[None]:
    """Make every kernel launched inside take `config`, for tests and tuning."""
    token = _override.set(config)
    try:
        yield
    finally:
        _override.reset(token)


_INTERPRETER = TileConfig(32, 32, 1, 1, sum_block=16, use_descriptors=False)

# TileConfigs, or their first fields, by kernel and by the largest padded head dimension that an
# entry serves; "weighed" for calls with a mask or a prior, "prior" for calls with a prior where
# that needs smaller tiles, "plain" for calls without a centre. Unless it says on what it was
# measured, an entry is the largest tile tried that compiles without a spill, and without serialised
# wgmma, in every variant of the gate; its speed is not measured.
_Tiles = dict[str, dict[int, TileConfig | tuple[int, ...]]]

_ONE_STAGE = partial(TileConfig, masked_stages=1)
_POINTERS = partial(TileConfig, use_descriptors=False)
_H100 = partial(_ONE_STAGE, measured_on="H100")
_H200 = partial(TileConfig, measured_on="H200")

_SM80_16BIT: _Tiles = {
    "forward": {64: _ONE_STAGE(128, 64, 8, 3), 128: (64, 64, 8, 2), 256: (32, 32, 8, 1)},
    "forward weighed": {64: (64, 32, 8, 2), 128: (64, 32, 8, 2), 256: (32, 32, 8, 1)},
    "forward prior": {64: (64, 16, 8, 2), 128: (32, 32, 8, 2), 256: (16, 32, 8, 1)},
    "preprocess": {64: (128, 64, 8, 1), 128: (64, 64, 8, 1), 256: (32, 64, 8, 1)},
    "dkdv": {64: (32, 64, 4, 1), 128: (32, 64, 8, 2), 256: (16, 32, 8, 1)},
    "dkdv weighed": {64: (32, 32, 4, 2), 128: (32, 64, 8, 2), 256: (16, 32, 8, 1)},
    "dq": {64: (128, 64, 8, 3), 128: (64, 64, 8, 2), 256: (32, 32, 8, 1)},
    "dq prior": {128: (16, 64, 8, 1)},
    "dq weighed": {64: (64, 32, 4, 2), 128: (64, 64, 8, 2), 256: (32, 32, 8, 1)},
}
_SM90_16BIT: _Tiles = {
    "forward": {
        64: _H100(128, 64, 8, 3, row_sums="product", max_registers=128),
        128: _H100(64, 64, 4, 3),
        256: _ONE_STAGE(64, 64, 8, 2),
    },
    "forward plain": {128: _H100(128, 64, 8, 3, row_sums="product")},
    "forward weighed": {64: (64, 32, 8, 1), 128: (64, 32, 8, 1), 256: (32, 32, 8, 1)},
    "forward prior": {64: (64, 32, 8, 1), 128: (32, 32, 8, 1), 256: (32, 16, 8, 1)},
    "preprocess": {
        64: _H200(64, 64, 4, 1, max_registers=128),
        128: _H200(64, 64, 8, 1, max_registers=128),
        256: (32, 64, 8, 1),
    },
    "dkdv": {
        64: _H100(64, 64, 4, 2, max_registers=168),
        128: _H100(64, 64, 4, 2),
        256: _POINTERS(32, 32, 8, 1),
    },
    "dkdv weighed": {64: (32, 64, 8, 1), 128: (32, 64, 8, 1), 256: (32, 32, 8, 1)},
    "dkdv prior": {64: (32, 64, 8, 2), 128: (16, 64, 8, 2)},
    "dq": {
        64: _H100(128, 64, 8, 3, max_registers=128),
        128: _H100(128, 64, 8, 3, masked_stages=None),
        256: (64, 32, 8, 2),
    },
    "dq weighed": {64: (128, 64, 8, 3), 128: (128, 32, 8, 1), 256: (32, 32, 8, 1)},
    "dq prior": {64: (64, 32, 8, 2), 128: (128, 32, 8, 2)},
}
_SM100_16BIT: _Tiles = {
    "forward": {64: _ONE_STAGE(64, 64, 4, 3), 128: (128, 64, 8, 3), 256: (64, 32, 8, 1)},
    "forward weighed": {64: (64, 64, 8, 2), 128: (64, 32, 8, 2), 256: (32, 32, 8, 1)},
    "forward prior": {64: (64, 32, 8, 1), 256: (16, 32, 8, 1)},
    # Tiles of 64 rows here make Triton 3.6 stop in TritonNvidiaGPUOptimizeTMemLayoutsPass.
    "preprocess": {64: (32, 64, 4, 1), 128: (32, 64, 4, 1), 256: (32, 64, 8, 1)},
    "preprocess prior": {64: (32, 64, 8, 1)},
    "dkdv": {64: _ONE_STAGE(32, 64, 4, 2), 128: (32, 64, 8, 2), 256: _POINTERS(32, 32, 8, 1)},
    "dkdv weighed": {64: (32, 64, 8, 2), 128: (32, 64, 8, 2), 256: (16, 64, 8, 1)},
    "dq": {64: (64, 64, 8, 2), 128: (64, 64, 8, 2), 256: (64, 16, 8, 1)},
    "dq prior": {64: (64, 64, 8, 2), 128: (64, 32, 8, 1)},
    "dq weighed": {64: (128, 64, 8, 3), 128: (64, 64, 8, 2), 256: (64, 16, 8, 2)},
}
_GFX942_16BIT: _Tiles = {
    "forward": {64: (128, 32, 4, 1), 128: (64, 32, 4, 1), 256: (32, 32, 4, 1)},
    "forward weighed": {64: (64, 32, 4, 1), 128: (32, 32, 4, 1), 256: (32, 32, 8, 1)},
    "forward prior": {256: (32, 16, 8, 1)},
    "preprocess": {64: (64, 64, 4, 1), 128: (32, 64, 4, 1), 256: (32, 64, 8, 1)},
    "dkdv": {64: (32, 64, 4, 1), 128: (32, 32, 4, 1), 256: (16, 32, 8, 1)},
    "dkdv weighed": {64: (32, 32, 4, 1), 128: (32, 32, 4, 1), 256: (16, 32, 8, 1)},
    "dq": {64: (64, 64, 4, 1), 128: (64, 32, 4, 1), 256: (16, 32, 8, 1)},
    "dq weighed": {64: (64, 32, 4, 1), 128: (32, 32, 4, 1), 256: (16, 16, 8, 1)},
}
_CUDA_32BIT: _Tiles = {
    "forward": {64: (32, 32, 8, 2), 128: (16, 16, 8, 1), 256: (16, 16, 8, 1, 16)},
    "forward weighed": {64: (32, 32, 8, 2), 128: (16, 16, 4, 1), 256: (16, 16, 8, 1)},
    "preprocess": {64: (32, 64, 8, 1), 128: (16, 64, 8, 1), 256: (16, 64, 8, 1, 16)},
    "dkdv": {64: (16, 32, 4, 2), 128: (16, 16, 8, 1), 256: (16, 16, 8, 2)},
    "dkdv weighed": {64: (16, 32, 4, 2), 128: (16, 16, 8, 1), 256: (16, 16, 8, 1)},
    "dq": {64: (16, 32, 4, 2), 128: (16, 16, 8, 1), 256: (16, 16, 8, 2)},
    "dq weighed": {64: (16, 32, 4, 1), 128: (16, 16, 8, 1), 256: (16, 16, 8, 2)},
}
# These keep the kernels free of spills there.
_SM90_32BIT: _Tiles = _CUDA_32BIT | {
    "dq": _CUDA_32BIT["dq"] | {256: (16, 16, 8, 3)},
    "dq weighed": _CUDA_32BIT["dq weighed"] | {256: (16, 16, 8, 3)},
    "forward weighed": _CUDA_32BIT["forward weighed"] | {256: (16, 16, 8, 2)},
    "dkdv prior": {64: (16, 32, 8, 2)},
}
_SM100_32BIT: _Tiles = _CUDA_32BIT | {"dq prior": {256: (16, 16, 8, 3)}}
_GFX942_32BIT: _Tiles = {
    "forward": {64: (32, 32, 4, 1), 128: (32, 16, 4, 1), 256: (16, 16, 4, 1)},
    "forward weighed": {64: (32, 32, 4, 1), 128: (16, 16, 4, 1), 256: (16, 16, 4, 1)},
    "preprocess": {64: (32, 64, 4, 1), 128: (16, 64, 4, 1), 256: (16, 64, 8, 1)},
    "dkdv": {64: (32, 32, 4, 1), 128: (16, 16, 4, 1), 256: (16, 16, 4, 1)},
    "dkdv weighed": {64: (16, 32, 4, 1), 128: (16, 16, 4, 1), 256: (16, 16, 4, 1)},
    "dq": {64: (32, 32, 4, 1), 128: (16, 16, 4, 1), 256: (16, 16, 4, 1)},
}
_TABLES: dict[tuple[int | str, int], _Tiles] = {
    (80, 2): _SM80_16BIT,
    (90, 2): _SM90_16BIT,
    (100, 2): _SM100_16BIT,
    ("gfx942", 2): _GFX942_16BIT,
    (80, 4): _CUDA_32BIT,
    (90, 4): _SM90_32BIT,
    (100, 4): _SM100_32BIT,
    ("gfx942", 4): _GFX942_32BIT,
}


def _table_of(arch: int | str) -> int | str:
    """Architecture whose table serves `arch`."""
    if isinstance(arch, str):
        return "gfx942"
    if 90 <= arch < 100:
        return 90
    # Consumer cards (86, 89, 120) have the instructions of sm_80 and 99 KB of shared memory.
    return 100 if 100 <= arch < 120 else 80


def pick_config(
    kernel: str,
    head_dim: int,
    value_dim: int,
    itemsize: int,
    arch: int | str,
    *,
    weighed_by: str | None,
    is_centered: bool = True,
) -> TileConfig:
    """Launch configuration of one kernel.

    kernel: one of KERNELS. itemsize: bytes per element of q, k, v (2 or 4). arch: compute
    capability as an integer (90), a gfx name, or "interpreter". weighed_by: "mask" or "prior"
    (other than the uniform one) where it weighs the keys one by one, which takes more registers.
    is_centered: False for plain attention, which takes fewer.
    """
    override = _override.get()
    if override is not None:
        return override
    if arch == "interpreter":
        return _INTERPRETER
    table = _TABLES[_table_of(arch), itemsize]
    width = max(64, block_width(max(head_dim, value_dim)))
    unweighed = ("",) if is_centered else (" plain", "")
    suffixes = {None: unweighed, "mask": (" weighed", ""), "prior": (" prior", " weighed", "")}
    for suffix in suffixes[weighed_by]:
        entry = table.get(kernel + suffix, {}).get(width)
        if entry is not None:
            return entry if isinstance(entry, TileConfig) else TileConfig(*entry)
    raise KeyError((kernel, width, arch))
