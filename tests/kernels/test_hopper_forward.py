"""The Hopper forward against float64: on a Hopper GPU, or in the emulator of Gluon kernels."""

import contextlib
from unittest import mock

import pytest
import torch
from attention_calls import of_dtype

from shaped_attn import shaped_attention
from shaped_attn.kernels import attention, launch
from shaped_attn.kernels.hopper import tiles
from shaped_attn.testing import (
    Case,
    assert_within_budget,
    eager_attention,
    make_inputs,
    make_options,
    relative_error,
)
from shaped_attn.visibility import Visibility

pytestmark = pytest.mark.usefixtures("poison")

BF16, FP16 = torch.bfloat16, torch.float16
OUT_FACTOR = 2
ERROR = {FP16: 5e-4, BF16: 3e-3}  # of the centred term, in every regime

# From 512 keys on the first launch keeps the maximum of the first block.
CASES = {
    "one_query_one_key": Case(1, 1, queries=1, head_dim=64),
    "short": Case(1, 2, queries=100, head_dim=64, is_causal=True, residual_dtype=...),
    "exact_tiles": Case(1, 1, queries=768, head_dim=64, is_causal=True),
    "ragged_causal": Case(2, 1, queries=533, head_dim=128, is_causal=True, residual_dtype=...),
    "ragged_full": Case(1, 2, queries=201, keys=659, head_dim=128, residual_dtype=...),
    "grouped_heads_and_cache": Case(
        1, 4, 2, 333, 700, 64, 40, is_causal=True, residual_dtype=torch.float32
    ),
    "three_heads_of_one": Case(1, 3, 1, 130, 530, 128, is_causal=True),
    "more_queries_than_keys": Case(1, 1, queries=700, keys=530, head_dim=64, is_causal=True),
    "offset_in_cache": Case(1, 1, queries=150, keys=650, head_dim=64, is_causal=True, q_offset=301),
    "offset_before_keys": Case(1, 1, queries=600, head_dim=64, is_causal=True, q_offset=-99),
    "offset_past_keys": Case(1, 1, queries=9, keys=600, head_dim=64, is_causal=True, q_offset=999),
    "left_padding": Case(2, 1, queries=540, head_dim=64, is_causal=True, padding="left"),
    "both_paddings": Case(3, 1, queries=200, keys=770, head_dim=128, padding="both"),
    "causal_paddings": Case(3, 1, queries=520, head_dim=128, is_causal=True, padding="both"),
    "clipped_head_dims": Case(1, 1, queries=530, head_dim=40, value_dim=96, is_causal=True),
    "odd_head_dims": Case(1, 2, 1, 140, 530, 17, 5, is_causal=True, residual_dtype=torch.float32),
    "one_query": Case(2, 2, 1, 1, 600, 128, is_causal=True, residual_dtype=...),
    "one_key": Case(1, 1, queries=130, keys=1, head_dim=64),
    # Wider heads: results, own rows of v and sums of v by key directly.
    "widest_causal": Case(
        2, 2, 1, 150, 533, 256, is_causal=True, residual_dtype=..., padding="both"
    ),
    "widest_full": Case(1, 1, queries=70, keys=530, head_dim=192, residual_dtype=torch.float32),
    "widest_short": Case(1, 1, queries=130, keys=90, head_dim=136, value_dim=256, is_causal=True),
    "widest_values": Case(1, 1, queries=140, head_dim=64, value_dim=192, is_causal=True),
}


def attend(*args, **kwargs):
    return shaped_attention(*args, **kwargs, impl="triton", return_lse=True)


def gains_of(case: Case, kind: str, device) -> dict:
    """Gains of a kind; an identity term only where it is legal."""
    if kind == "plain":
        gains = {"identity_gain": 0.0, "center_gain": 0.0}
    elif kind == "fixed":
        gains = {"identity_gain": 0.7, "softmax_gain": 1.1, "center_gain": 0.9}
        gains |= {"skip_gain": 0.8, "branch_gain": -0.6}
    else:
        names = ("identity_gain", "softmax_gain", "center_gain", "skip_gain", "branch_gain")
        gains = {name: torch.randn(case.heads, device=device) for name in names}
        gains["scale"] = torch.randn(case.heads, device=device) / case.head_dim**0.5
        gains["skip_gain"] = gains["skip_gain"][0]
    if not case.has_own_keys:
        gains["identity_gain"] = 0.0
    if case.residual_dtype is None:
        gains.pop("skip_gain", None)
    return {"scale": 1 / case.head_dim**0.5} | gains


def compare(hopper, device, case: Case, kind: str, **schedule) -> dict[str, torch.Tensor]:
    inputs = make_inputs(case, scale=1 / case.head_dim**0.5, device=device)
    options = make_options(case, device=device) | gains_of(case, kind, device)
    with hopper(**schedule) as launches:
        actual = attend(*inputs, **options)
    assert launches is None or len(launches) == (2 if case.keys >= 512 else 1)
    eager = eager_attention(*inputs, **options, return_lse=True)

    def double(x):
        return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    golden = shaped_attention(
        *(double(x) for x in inputs),
        **{name: double(x) for name, x in options.items()},
        impl="reference",
        return_lse=True,
    )
    for name, *values in zip(("out", "lse"), actual, golden, eager, strict=True):
        assert_within_budget(*values, factor=OUT_FACTOR, name=name)
    return dict(zip(("out", "lse"), actual, strict=True))


@pytest.mark.parametrize("kind", ["fixed", "plain", "learned"])
@pytest.mark.parametrize("name", CASES)
def test_forward(name, kind, hopper, device):
    compare(hopper, device, of_dtype(CASES[name], BF16), kind)


@pytest.mark.parametrize(
    "name", ["short", "ragged_causal", "ragged_full", "odd_head_dims", "widest_causal"]
)
def test_forward_in_float16(name, hopper, device):
    compare(hopper, device, of_dtype(CASES[name], FP16), "learned")


@contextlib.contextmanager
def shared_by(programs: int, most_keys_of_two: int = 4096):
    """So many programs take the tiles; up to so many keys width 64 has two consumers."""
    most_keys = dict.fromkeys((True, False), most_keys_of_two)
    with (
        mock.patch.object(launch, "multiprocessors", lambda tensor: programs),
        mock.patch.object(tiles, "_MOST_KEYS_OF_TWO", most_keys),
    ):
        yield


@pytest.mark.parametrize("kind", ["fixed", "plain"])
@pytest.mark.parametrize("name", ["ragged_causal", "left_padding", "ragged_full", "widest_full"])
def test_bits_do_not_depend_on_who_takes_a_tile(name, kind, hopper, device):
    case = of_dtype(CASES[name], BF16)
    for most_keys_of_two in (0, 4096):
        found = []
        for seed, programs in enumerate((1, 3)):
            with shared_by(programs, most_keys_of_two):
                found.append(compare(hopper, device, case, kind, seed=seed, interleave=1 + seed))
        first, second = found
        assert all(torch.equal(x, second[name]) for name, x in first.items())


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("logit_std", [0.001, 0.03, 1.0, 8.0, 300.0])
def test_centred_term(logit_std, dtype, head_dim, hopper, device):
    """Its error is one rounding to the dtype, whatever the temperature: large logits overflow the
    weights relative to the first maximum, which the second launch puts right."""
    case = Case(1, 1, queries=540, head_dim=head_dim, is_causal=True, dtype=dtype)
    q, k, v, _ = make_inputs(case, logit_std=logit_std, scale=0.125, device=device)
    zeros = torch.zeros(1, 1, 540, head_dim, device=device)
    options = {"is_causal": True, "identity_gain": 0.0, "scale": 0.125}
    with hopper():
        out, lse = attend(q, k, v, zeros, **options)
    golden, golden_lse = shaped_attention(
        *(x.double() for x in (q, k, v, zeros)), **options, impl="reference", return_lse=True
    )
    assert relative_error(out, golden) <= ERROR[dtype]
    # lse has the rounding of the weights, relative to the largest.
    assert (lse - golden_lse).abs().max() <= 2 * torch.finfo(dtype).eps


def test_zero_logits_return_the_values(hopper, device):
    q = torch.zeros(1, 2, 540, 64, dtype=BF16, device=device)
    k, v = torch.randn(2, 1, 2, 540, 64, device=device).to(BF16)
    with hopper():
        out, _ = attend(q, k, v, is_causal=True)
    assert torch.equal(out, v)


def test_a_row_with_one_key_returns_its_value(hopper, device):
    q, k, v = torch.randn(3, 1, 2, 540, 64, device=device).to(BF16)
    key_end = torch.ones(1, dtype=torch.int32, device=device)
    with hopper():
        out, _ = attend(q, k, v, identity_gain=0.0, center_gain=0.0, key_end=key_end)
    assert torch.equal(out, v[:, :, :1].expand_as(out))


@pytest.mark.parametrize("head_dim", [128, 256])
@pytest.mark.parametrize("is_centered", [True, False])
def test_what_is_saved(is_centered, head_dim, hopper, device):
    """The backward's tensors, of rows without keys too."""
    q, k, v = torch.randn(3, 2, 2, 530, head_dim, device=device).to(BF16)
    key_start = torch.tensor([0, 260], dtype=torch.int32, device=device)
    visibility = Visibility(True, 0, key_start, None)
    gains = (0.0, 1.0, float(is_centered), 1.0, 1.0, 0.1)
    arguments = (q, k, v, None, gains, visibility)
    with hopper():
        result = attention.attention_fwd(*arguments, save_for_backward=True)
        without = attention.attention_fwd(*arguments, save_for_backward=False)
    assert torch.equal(result.out, without.out) and torch.equal(result.lse, without.lse)
    options = {"is_causal": True, "key_start": key_start, "scale": 0.1, "identity_gain": 0.0}
    golden, lse = shaped_attention(
        *(x.double() for x in (q, k, v)),
        **options,
        center_gain=gains[2],
        impl="reference",
        return_lse=True,
    )
    assert relative_error(result.excess, golden) <= ERROR[BF16]
    log2_normalizer, count = result.row_stats
    rows = torch.arange(530, device=device)
    assert torch.equal(count[:, 0], (rows + 1 - key_start[:, None]).clamp(min=0).float())
    assert torch.equal(log2_normalizer.isinf(), count == 0)
    torch.testing.assert_close(log2_normalizer * 0.6931471805599453, result.lse, rtol=1e-6, atol=0)
    seen = count > 0
    assert (result.lse - lse)[seen].abs().max() <= 2 * torch.finfo(BF16).eps


def test_strided_tensors(hopper, device):
    """Views of one projection (B, T, 3, H, D), and outputs of their own."""
    qkv = torch.randn(2, 300, 3, 2, 64, device=device).to(BF16)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    options = {"is_causal": True, "scale": 0.125}
    with hopper() as launches:
        out, _ = attend(q, k, v, q, **options)
        dense, _ = attend(*(x.contiguous() for x in (q, k, v, q)), **options)
    assert launches is None or len(launches) == 2
    assert torch.equal(out, dense)


# Mutants of the kernel that do no harm, and why.
HARMLESS = {
    "attention_fwd_kernel: barrier() left out #1": "the start of the partitions is a barrier",
    "_effect: gl.inline_asm_elementwise(TEXT, '=r', [], dtype=gl.int32, is_pure=False, pack=1) "
    "left out #1": "turns are for speed",
    "_write: barrier() left out #1": "it is for the warps of one partition, which the emulator "
    "runs as one",
}


@pytest.mark.interpreter
def test_no_synchronisation_can_be_left_out(hopper):
    """Each bug put into the kernel is an error of the emulator, or gives other bits."""
    from gluon_mutants import mutants
    from gluon_schedule import EmulationError

    from shaped_attn.kernels.hopper.attention_fwd import attention_fwd_kernel

    def results(
        head_dim: int, residual_dtype: torch.dtype, keys: int = 560, most_keys=0, **draw
    ) -> list[torch.Tensor]:
        case = Case(
            *(1, 2, 1, 530, keys, head_dim),
            dtype=BF16,
            residual_dtype=residual_dtype,
            is_causal=True,
        )
        inputs = make_inputs(case, scale=0.125, device="cpu", **draw)
        gains = (0.7, 1.1, 0.9, 0.8, 0.6, 0.125)
        with shared_by(3, most_keys), hopper():
            return list(
                attention.attention_fwd(
                    *inputs, gains, Visibility(True, keys - 530), save_for_backward=True
                )
            )

    calls = [
        {"head_dim": 128, "residual_dtype": BF16},
        {"head_dim": 64, "residual_dtype": torch.float32, "most_keys": 4096},
        {"head_dim": 64, "residual_dtype": BF16, "logit_std": 300.0},
        {"head_dim": 64, "residual_dtype": BF16, "keys": 60},
        {"head_dim": 256, "residual_dtype": BF16, "keys": 60},
    ]
    calls = [(call, results(**call)) for call in calls]

    def is_caught(mutant) -> bool:
        for call, right in calls:
            try:
                with mutant.active():
                    found = results(**call)
            except EmulationError:
                return True
            if not all(torch.equal(x, y) for x, y in zip(found, right, strict=True)):
                return True
        return False

    survivors = {mutant.name for mutant in mutants(attention_fwd_kernel) if not is_caught(mutant)}
    assert survivors == set(HARMLESS)
