"""Launch configurations are data: complete, bounded, and the same for every length."""

import inspect
import itertools

import pytest

from shaped_attn.kernels import configs
from shaped_attn.kernels.configs import TileConfig, override_config, pick_config
from shaped_attn.kernels.primitives import ROW_ALIGNMENT


@pytest.mark.parametrize("arch", [*configs.ARCHITECTURES, 75, 86, 89, 103, 120, "gfx950"])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_every_supported_call_has_a_configuration(arch, itemsize):
    dims = (*range(1, configs.MAX_HEAD_DIM, 5), 8, 16, 64, 128, configs.MAX_HEAD_DIM)
    weighings = (None, "mask", "prior")
    for kernel, D, DV, weighed_by in itertools.product(configs.KERNELS, dims, dims, weighings):
        tiles = pick_config(kernel, D, DV, itemsize, arch, weighed_by=weighed_by)
        assert ROW_ALIGNMENT.value % tiles.block_t == 0
        # A product takes at least 16 of each, and tiles are powers of two.
        for size in (tiles.block_t, tiles.block_s, tiles.sum_block):
            assert size >= 16 and size & (size - 1) == 0
        assert tiles.num_warps in (4, 8)


def test_consumer_cards_take_the_small_memory_table():
    for kernel in configs.KERNELS:
        base = pick_config(kernel, 128, 128, 2, 80, weighed_by=None)
        for arch in (86, 89, 120):
            assert pick_config(kernel, 128, 128, 2, arch, weighed_by=None) == base


def test_value_dim_counts_as_much_as_head_dim():
    wide = pick_config("forward", 256, 16, 2, 90, weighed_by=None)
    assert pick_config("forward", 16, 256, 2, 90, weighed_by=None) == wide
    assert pick_config("forward", 16, 16, 2, 90, weighed_by=None) != wide


def test_length_is_not_a_key():
    assert list(inspect.signature(pick_config).parameters) == [
        "kernel",
        "head_dim",
        "value_dim",
        "itemsize",
        "arch",
        "weighed_by",
        "is_centered",
    ]


def test_override_ends_with_its_scope():
    mine = TileConfig(16, 16, 4, 1)
    with override_config(mine):
        assert pick_config("dq", 64, 64, 2, 90, weighed_by=None) is mine
    assert pick_config("dq", 64, 64, 2, 90, weighed_by=None) is not mine
