"""The two forms of the forward: a maximum fixed after a row's first and last blocks, or running."""

import contextlib
import math

import pytest
import torch
from attention_calls import DTYPES

from shaped_attn import shaped_attention
from shaped_attn.kernels import attention_fwd, launch
from shaped_attn.kernels.configs import TileConfig, override_config
from shaped_attn.testing import Case, make_inputs, relative_error

pytestmark = pytest.mark.usefixtures("poison")

ERROR = {torch.float32: 3e-5, torch.float16: 5e-4, torch.bfloat16: 3e-3}
CENTERED = {"identity_gain": 0.0}
PLAIN = {"identity_gain": 0.0, "center_gain": 0.0}
TILES = TileConfig(block_t=32, block_s=32, num_warps=4, num_stages=1, sum_block=32)
KEYS = 256


@contextlib.contextmanager
def recorded_tiles(monkeypatch, fewest_blocks: int = 4):
    """Yield a list that receives, for each forward, which tiles needed the running maximum."""
    found = []
    run = launch.Launch.__call__

    def record(self, *varying):
        run(self, *varying)
        if self.constants.get("BOUNDED"):
            names = getattr(self.kernel, "arg_names", None) or self.kernel.fn.__code__.co_varnames
            found.append(varying[list(names).index("overflow_ptr")].clone())

    with monkeypatch.context() as patch, override_config(TILES):
        patch.setattr(launch.Launch, "__call__", record)
        patch.setattr(attention_fwd, "_FEWEST_BLOCKS", fewest_blocks)
        launch.forget_plans()
        yield found
    launch.forget_plans()


def call(inputs, impl="triton", **options):
    # A residual of zeros in float32, so that the result is not rounded.
    q, k, v = inputs
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    residual = torch.zeros(*q.shape[:3], v.shape[3], dtype=dtype, device=q.device)
    out, lse = shaped_attention(
        q, k, v, residual, scale=0.125, impl=impl, return_lse=True, **options
    )
    return out, lse


def rising_keys(dtype, device, rise: float, from_key: int, to_key: int = KEYS):
    """Inputs whose logits are about 1, and `rise` higher for `from_key` up to `to_key`."""
    case = Case(1, 2, queries=KEYS, head_dim=64, dtype=dtype)
    q, k, v, _ = make_inputs(case, logit_std=1.0, scale=0.125, device=device)
    q[..., 0] = 8.0
    k[..., 0] = 0.0
    k[:, :, from_key:to_key, 0] = rise
    return q, k, v


@pytest.mark.parametrize("gains", [CENTERED, PLAIN], ids=["centered", "plain"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("logit_std", [0.03, 1.0, 5.0])
def test_both_forms_agree_to_float32_rounding(logit_std, is_causal, gains, device, monkeypatch):
    case = Case(1, 2, 1, queries=KEYS - 5, head_dim=64, is_causal=is_causal)
    inputs = make_inputs(case, logit_std=logit_std, scale=0.125, device=device)[:3]
    options = {"is_causal": is_causal, **gains}
    with recorded_tiles(monkeypatch) as tiles:
        fixed, fixed_lse = call(inputs, **options)
    assert [bool(x.any()) for x in tiles] == [False]
    with recorded_tiles(monkeypatch, fewest_blocks=KEYS) as tiles:
        running, running_lse = call(inputs, **options)
    assert tiles == []
    # A weight has the error of its score, a float32 sum of D products, twice.
    scores = 0.125 * inputs[0].abs() @ inputs[1].abs().repeat_interleave(2, 1).mT
    eps = torch.finfo(torch.float32).eps
    bound = 2 * (case.head_dim + 2) * eps * scores.max() * inputs[2].abs().max()
    assert (fixed - running).abs().max() <= bound
    assert (fixed_lse - running_lse).abs().max() <= bound


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gains", [CENTERED, PLAIN], ids=["centered", "plain"])
# About the largest rise that fits, and past what float32, or float16, weights hold.
@pytest.mark.parametrize("rise", [2.0, 9.0, 16.0, 60.0, 200.0])
def test_rising_logits_cross_the_bound(rise, gains, dtype, device, monkeypatch):
    inputs = rising_keys(dtype, device, rise, from_key=KEYS // 2)
    with recorded_tiles(monkeypatch) as tiles:
        out, lse = call(inputs, **gains)
    weight = rise / math.log(2)  # in powers of 2
    if weight < 8:
        assert not tiles[0].any()
    if weight > (20 if dtype == torch.float16 else 36):
        assert tiles[0].all()
    golden, golden_lse = call([x.double() for x in inputs], impl="reference", **gains)
    # A score is a float32 sum of D products.
    score_error = (64 + 2) * torch.finfo(torch.float32).eps * rise
    assert relative_error(out, golden) <= ERROR[dtype] + score_error
    # Weights are summed as rounded, each off by half a unit in its last place at most.
    unit = torch.finfo(dtype).eps
    assert (lse - golden_lse).abs().max() <= unit + score_error + 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_only_tiles_that_overflow_run_again(dtype, device, monkeypatch):
    """A row's first and last block set its maximum: only keys in between can pass it."""
    high = (KEYS // 2, KEYS // 2 + TILES.block_s)
    inputs = rising_keys(dtype, device, 60.0, *high)
    options = {"is_causal": True, **CENTERED}
    with recorded_tiles(monkeypatch) as tiles:
        out, _ = call(inputs, **options)
    by_row = tiles[0].view(2, -1).flip(1)  # last rows first
    rows = torch.arange(by_row.shape[1], device=device) * TILES.block_t
    assert torch.equal(by_row.bool(), (rows >= high[1]).expand(2, -1))
    golden, _ = call([x.double() for x in inputs], impl="reference", **options)
    score_error = (64 + 2) * torch.finfo(torch.float32).eps * 60.0
    assert relative_error(out, golden) <= ERROR[dtype] + score_error


def test_nan_reaches_the_result(device, monkeypatch):
    q, k, v = rising_keys(torch.bfloat16, device, 0.0, from_key=0)
    k[:, :, KEYS // 2] = math.nan
    with recorded_tiles(monkeypatch) as tiles:
        out, _ = call((q, k, v), **CENTERED)
    assert tiles[0].all() and out.isnan().all()
