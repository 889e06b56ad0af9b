"""The tools that the other tests rely on can fail."""

import functools
import math

import pytest
import torch

from shaped_attn import shaped_attention
from shaped_attn.testing import (
    Case,
    assert_within_budget,
    assert_within_spread,
    eager_attention,
    forward_backward,
    largest_error,
    make_inputs,
    make_options,
    poison_empty,
    relative_error,
    rounding_error,
    rounding_spread,
)

LARGE = Case(2, 4, 2, 200, 300, 64, 32, torch.float32)


def logits(case, **options):
    q, k, _, _ = make_inputs(case, **options)
    q, k = q.double(), k.double().repeat_interleave(case.heads // case.kv_heads, 1)
    return options.get("scale", case.scale) * q @ k.transpose(-1, -2)


@pytest.mark.parametrize("logit_std", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("scale", [None, -0.125], ids=["default", "given"])
def test_inputs_have_the_logit_std(logit_std, scale):
    options = {} if scale is None else {"scale": scale}
    std = logits(LARGE, logit_std=logit_std, **options).std().item()
    assert std == pytest.approx(logit_std, rel=0.02)


def test_inputs_have_the_means():
    q, k, v, _ = make_inputs(LARGE, value_mean=3.0, key_mean=4.0)
    assert v.mean().item() == pytest.approx(3.0, abs=0.02)
    assert k.mean().item() == pytest.approx(4.0, abs=0.02)
    found = logits(LARGE, logit_std=0.1, key_mean=4.0)
    assert found.mean().item() == pytest.approx(0.1 * 4 * math.sqrt(64 / 2), rel=0.05)
    assert found.std(-1).square().mean().sqrt().item() == pytest.approx(0.1, rel=0.02)


@pytest.mark.parametrize("logit_std", [0.01, 1.0])
def test_inputs_have_a_sink(logit_std):
    found = logits(LARGE, logit_std=logit_std, sink=True)
    assert found[..., 0].mean().item() == pytest.approx(8.0, rel=0.05)
    assert found[..., 0].min() > 0
    assert found[..., 1:].std().item() == pytest.approx(logit_std, rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_inputs_are_finite_and_reproducible(dtype):
    case = Case(dtype=dtype, residual_dtype=torch.float64)
    for sink in (False, True):
        first, second, other = (
            make_inputs(case, logit_std=30.0, key_mean=4.0, sink=sink, seed=seed)
            for seed in (0, 0, 1)
        )
        for a, b, c in zip(first, second, other, strict=True):
            assert a.isfinite().all()
            assert torch.equal(a, b) and not torch.equal(a, c)
        assert [x.dtype for x in first] == [dtype] * 3 + [torch.float64]


def test_inputs_are_equal_on_every_device(device):
    case = Case(dtype=torch.bfloat16, residual_dtype=torch.float32)
    for drawn, found in zip(make_inputs(case), make_inputs(case, device=device), strict=True):
        assert found.device == device and torch.equal(found.cpu(), drawn)
    assert make_inputs(Case(), device=device).residual is None


def test_case_id():
    case = Case(2, 4, 2, 111, 130, 64, 32, torch.bfloat16, is_causal=True)
    assert case.id == "B2-T111-S130-H4-HKV2-D64-DV32-bf16-causal"
    assert Case().id == "B2-T64-H4-D32-fp32"
    case = Case(q_offset=3, padding="left", mask="keys", residual_dtype=torch.float64)
    assert case.id == "B2-T64-H4-D32-fp32-offset3-pad_left-mask_keys-res_fp64"
    with pytest.raises(ValueError, match="padding must be one of .*, got 'middle'"):
        Case(padding="middle")


def test_options():
    case = Case(3, queries=4, keys=6, padding="both", mask="rows", is_causal=True, q_offset=1)
    options = make_options(case)
    assert options["is_causal"] is True and options["q_offset"] == 1
    assert options["key_start"].tolist() == [0, 2, 4]
    assert options["key_end"].tolist() == [6, 4, 2]  # nothing is left of the last entry
    assert options["attn_mask"].shape == (4, 6) and not options["attn_mask"][0].any()
    assert make_options(Case()) == {"is_causal": False, "q_offset": None}


def test_errors():
    golden = torch.tensor([3.0, 4.0])
    assert relative_error(golden + torch.tensor([0.0, 0.5]), golden) == 0.1
    assert largest_error(golden + torch.tensor([0.0, 0.5]), golden) == 0.125
    for error in (relative_error, largest_error):
        assert error(golden, golden) == 0.0
        assert error(0 * golden, 0 * golden) == 0.0
        assert error(golden, 0 * golden) == math.inf
        assert error(golden[:0], golden[:0]) == 0.0
        assert math.isnan(error(golden * math.nan, golden))


def test_rounding_error_is_reached_and_not_exceeded():
    x = 1 + torch.arange(2**12, dtype=torch.float64) / 2**12
    for dtype in (torch.float16, torch.bfloat16):
        error = ((x.to(dtype).double() - x) / x).abs().max().item()
        assert 0.9 * rounding_error(dtype) < error <= rounding_error(dtype)


class TestBudget:
    golden = torch.linspace(1, 2, 1000, dtype=torch.float64)

    def check(self, actual, eager=None, **options):
        eager = self.golden if eager is None else eager
        options = {"factor": 2, "name": "x", "rounding": 1e-6} | options
        assert_within_budget(actual, self.golden, eager, **options)

    def test_holds(self):
        self.check(self.golden)
        self.check(self.golden * (1 + 9e-7))
        self.check(self.golden * (1 + 1.9e-3), eager=self.golden * (1 + 1e-3))

    @pytest.mark.parametrize("error", [1.1e-6, 1.0, math.nan, math.inf])
    def test_fails_on_all_elements(self, error):
        with pytest.raises(
            AssertionError, match="x: relative error .* over the budget 1e-06 = 2 x"
        ):
            self.check(self.golden * (1 + error))

    def test_fails_on_one_element(self):
        actual = self.golden.clone()
        actual[7] += 1e-5
        with pytest.raises(AssertionError, match="x: largest error .* over the budget"):
            self.check(actual)

    def test_fails_beyond_the_eager_error(self):
        with pytest.raises(AssertionError, match="2 x 0.001 .eager"):
            self.check(self.golden * (1 + 2.1e-3), eager=self.golden * (1 + 1e-3))

    def test_fails_on_shape(self):
        with pytest.raises(AssertionError, match=r"x: shape \(500,\) is not \(1000,\)"):
            self.check(self.golden[:500])

    def test_infinite_elements_have_to_agree(self):
        golden = torch.tensor([1.0, -math.inf], dtype=torch.float64)
        options = {"factor": 1, "name": "lse"}
        assert_within_budget(golden.float(), golden, golden, **options)
        for wrong in (math.inf, math.nan, 0.0):
            with pytest.raises(AssertionError, match="lse: infinite elements differ"):
                assert_within_budget(torch.tensor([1.0, wrong]), golden, golden, **options)

    def test_default_rounding_is_that_of_the_result(self):
        for dtype in (torch.bfloat16, torch.float32):
            error = 2 * torch.finfo(dtype).eps
            self.check(self.golden.to(dtype), rounding=None)
            if dtype == torch.bfloat16:
                with pytest.raises(AssertionError):
                    self.check((self.golden * (1 + error)).to(dtype), rounding=None)
            else:
                with pytest.raises(AssertionError):
                    self.check((self.golden * (1 + 5 * error)).to(dtype), rounding=None)


def test_forward_backward():
    def function(x, y, factor):
        return factor * x * y, torch.stack([x.sum().log(), y.sum().log()])

    x, y = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 0.0])
    found = forward_backward(
        function, {"x": x, "y": y}, torch.tensor([1.0, 10.0]), torch.tensor([1.0, 1.0]), factor=2
    )
    assert found.keys() == {"out", "lse", "grad x", "grad y"}
    assert found["out"].tolist() == [0.0, 0.0]
    assert found["lse"][1] == -math.inf
    torch.testing.assert_close(found["grad x"], torch.full((2,), 1 / 3))  # y is 0: lse alone
    assert not x.requires_grad


def test_eager_attention_is_the_reference_in_the_input_dtype():
    case = Case(kv_heads=2, queries=20, keys=30, padding="left", mask="keys", is_causal=True)
    case = Case(**{**vars(case), "dtype": torch.float64, "residual_dtype": torch.float64})
    inputs, options = make_inputs(case), make_options(case) | {"return_lse": True}
    options |= {"softmax_gain": torch.rand(4), "skip_gain": 0.5}
    for actual, expected in zip(
        eager_attention(*inputs, **options),
        shaped_attention(*inputs, **options, impl="reference"),
        strict=True,
    ):
        assert torch.equal(actual, expected)


def gain_gradients(case, seed, *, value_mean=0.0):
    """A function that returns the gradients of all gains, for a function and a dtype."""
    tensors = make_inputs(case, value_mean=value_mean, seed=seed)._asdict()
    names = ("identity_gain", "softmax_gain", "center_gain", "skip_gain", "branch_gain", "scale")
    values = (0.9, 1.1, 0.8, 0.7, 0.6, case.scale)
    tensors |= {name: torch.tensor([x, 1.5 * x]) for name, x in zip(names, values, strict=True)}
    generator = torch.Generator().manual_seed(seed)
    d_out = torch.randn(1, 2, 40, 16, generator=generator)

    def run(function, dtype, rows=slice(None)):
        arguments = {name: x.to(dtype) for name, x in tensors.items()}
        some = torch.zeros_like(d_out)
        some[:, :, rows] = d_out[:, :, rows]
        found = forward_backward(function, arguments, some, is_causal=True)
        return {name: found[f"grad {name}"] for name in names}

    return run


class TestSpread:
    case = Case(1, 2, queries=40, head_dim=16, residual_dtype=torch.float32)

    def test_of_one_rounding(self):
        x = torch.linspace(1, 2, 50, dtype=torch.float64)
        for dtype in (torch.float32, torch.bfloat16):  # elementwise, all is float32
            golden, spread = rounding_spread(lambda: {"x": 3 * x, "same": x.flip(0)}, dtype)
            assert torch.equal(golden["x"], 3 * x)
            torch.testing.assert_close(spread["x"], 3 * x * rounding_error(torch.float32))
            assert not spread["same"].any()

    def test_of_a_product_of_matrices(self):
        """n roundings of partial sums of n terms, and of the result to 16 bits."""
        a, b = torch.randn(2, 64, 100, dtype=torch.float64)
        total, squares = a @ b.T, a**2 @ b.T**2
        for dtype in (torch.float32, torch.bfloat16):
            _, spread = rounding_spread(lambda: {"x": a @ b.T}, dtype)
            sums = rounding_error(torch.float32) * (50 * (squares + total**2)).sqrt()
            expected = torch.hypot(sums, rounding_error(dtype) * total)
            torch.testing.assert_close(spread["x"], expected)

    def test_holds_what_cancels(self):
        x = torch.tensor(2.0, dtype=torch.float64)
        _, spread = rounding_spread(lambda: {"x": (1e6 + x) - 1e6}, torch.float32)
        assert spread["x"] == pytest.approx(1e6 * rounding_error(torch.float32), rel=1e-4)

    def test_leaves_the_random_state_and_the_first_call_alone(self):
        state = torch.get_rng_state()
        calls = []

        def function():
            calls.append(torch.ones(3, dtype=torch.float64) / 3)
            return {"x": calls[-1]}

        golden, _ = rounding_spread(function, torch.float32, draws=2)
        assert torch.equal(torch.get_rng_state(), state)
        assert len(calls) == 3 and golden["x"] is calls[0]

    @pytest.mark.parametrize("value_mean", [0.0, 100.0])
    def test_holds_the_error_of_eager_torch(self, value_mean):
        """Of every gain, without being far above it; with large values delta cancels in dS."""
        ratios = {}
        for seed in range(10):
            run = gain_gradients(self.case, seed, value_mean=value_mean)
            golden, spread = rounding_spread(
                functools.partial(run, eager_attention, torch.float64), torch.float32
            )
            eager = run(eager_attention, torch.float32)
            for name, x in eager.items():
                ratio = (x - golden[name]).norm() / spread[name].norm()
                ratios.setdefault(name, []).append(ratio.item())
        for name, found in ratios.items():
            mean_square = sum(ratio**2 for ratio in found) / len(found)
            assert 0.02 < math.sqrt(mean_square) < 1, name

    def test_a_wrong_gradient_is_outside(self):
        run = gain_gradients(self.case, 0)
        exact = functools.partial(run, eager_attention, torch.float64)
        golden, spread = rounding_spread(exact, torch.float32)
        without_a_row = run(eager_attention, torch.float64, slice(39))
        for name, x in golden.items():
            assert_within_spread(x.float(), x, spread[name], name=name)
            for wrong in (1.01 * x, without_a_row[name], x * math.nan):
                with pytest.raises(AssertionError, match=f"{name}: error .* over the budget"):
                    assert_within_spread(wrong, x, spread[name], name=name)
            with pytest.raises(AssertionError, match=rf"{name}: shape \(1,\) is not \(2,\)"):
                assert_within_spread(x[:1], x, spread[name], name=name)


def test_poison_empty():
    x = torch.ones(2, dtype=torch.bfloat16)
    with poison_empty():
        for made in (
            torch.empty(3),
            torch.empty_like(x),
            torch.empty_strided((2, 2), (1, 2)),
            x.new_empty(4, dtype=torch.float32),
        ):
            assert made.isnan().all()
        assert torch.empty(2, dtype=torch.int32).tolist() == [2**31 - 1] * 2
        assert torch.empty(2, dtype=torch.bool).shape == (2,)
        assert torch.empty(0).shape == (0,)
    with pytest.raises(KeyError), poison_empty():
        raise KeyError
    for function in (torch.empty, torch.empty_like, torch.empty_strided):
        assert function.__name__ != "wrapper"
    assert "new_empty" not in vars(torch.Tensor)
