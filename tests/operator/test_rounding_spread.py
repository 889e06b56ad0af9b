"""The spread of rounding holds for any draw and any maths library.

The libraries read their settings when they load, so each setting has a process of its own:
``TRITON_INTERPRET=1 OPENBLAS_CORETYPE=Zen python tests/operator/test_rounding_spread.py 20`` prints
the largest ratio of error to budget, for each quantity, over 20 draws.
"""

import dataclasses
import functools
import json
import math
import sys

import pytest
import torch

from shaped_attn import shaped_attention
from shaped_attn.nn import METHODS, ShapedTransformer, ShapedTransformerConfig
from shaped_attn.priors import ESPA
from shaped_attn.testing import (
    SPREADS,
    Case,
    forward_backward,
    make_inputs,
    make_options,
    rounding_spread,
)

SEEDS = 20

# NumPy, which multiplies matrices for Triton's interpreter, has OpenBLAS; torch has its own vector
# loops and, on x86, MKL.
SETTINGS = {
    "haswell": {
        "OPENBLAS_CORETYPE": "Haswell",
        "ATEN_CPU_CAPABILITY": "default",
        "MKL_CBWR": "COMPATIBLE",
    },
    "zen": {
        "OPENBLAS_CORETYPE": "Zen",
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
    "skylake": {"OPENBLAS_CORETYPE": "SkylakeX", "ATEN_CPU_CAPABILITY": "avx512"},
}

WIDE = Case(1, 1, queries=33, head_dim=256, is_causal=True)
GROUPED = Case(2, 2, 1, 37, 60, head_dim=24, value_dim=40, is_causal=True, padding="right")
GAINS = {
    "identity_gain": 0.9,
    "softmax_gain": 1.1,
    "center_gain": 0.8,
    "skip_gain": 0.7,
    "branch_gain": 0.6,
    "scale": 1.0,
}


RATES = {"decay_in": 0.5, "decay_out": 0.1}


class Worst(dict):
    """The largest ratio of error to budget of each quantity."""

    def add(self, prefix, found, golden, spread, labels):
        for name, label in labels.items():
            error = (found[name].double() - golden[name]).norm()
            ratio = (error / (SPREADS * spread[name].norm())).item()
            # NaN is the largest of all.
            self[f"{prefix} {label}"] = max(ratio, self.get(f"{prefix} {label}", 0.0), key=rank)


def rank(ratio):
    return math.inf if math.isnan(ratio) else ratio


def measure_attention(worst, case, dtype, seed, prior=False):
    """All gains, and the rates of a prior, of each head."""
    case = dataclasses.replace(case, dtype=dtype, residual_dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    tensors = make_inputs(case, scale=case.head_dim**-0.5, value_mean=1.0, seed=seed)._asdict()
    scalars = GAINS | {"scale": case.head_dim**-0.5} | (RATES if prior else {})
    for name, value in scalars.items():
        tensors[name] = value * (1 + 0.3 * torch.rand(case.heads, generator=generator))
    rows = (case.batch, case.heads, case.queries)
    d_out = torch.randn(*rows, case.value_dim, generator=generator).to(dtype)
    d_lse = torch.randn(rows, generator=generator)
    options = make_options(case) | {"return_lse": True}

    def call(decay_in=None, decay_out=None, **arguments):
        made = ESPA(decay_in, decay_out) if prior else None
        return shaped_attention(**arguments, **options, prior=made)

    def run(impl, convert):
        arguments = {name: convert(x) for name, x in tensors.items()}
        return forward_backward(call, arguments, d_out, d_lse, impl=impl)

    labels = {f"grad {name}": name for name in scalars}
    exact = rounding_spread(functools.partial(run, "reference", torch.Tensor.double), dtype)
    for impl in ("triton", "torch"):
        found = run(impl, torch.Tensor.clone)
        worst.add(f"{impl} {str(dtype).removeprefix('torch.')}", found, *exact, labels)


def measure_network(worst, method, kind, seed):
    """Loss and every parameter, away from where it starts."""
    torch.manual_seed(seed)
    batch = torch.randint(11, (1, 20))
    config = ShapedTransformerConfig(
        method=method,
        kind=kind,
        head="causal_lm" if kind == "decoder" else "masked_lm",
        vocab_size=11,
        width=32,
        depth=2,
        heads=2,
        impl="reference",
    )
    exact = ShapedTransformer(config)
    for parameter in exact.parameters():
        size = parameter.detach().square().mean().sqrt().clamp(min=0.25)
        parameter.data.add_(0.5 * size * torch.randn_like(parameter))
    state = exact.state_dict()
    exact = exact.double()

    def run(model):
        loss = model(batch, labels=batch).loss
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        names = (name for name, _ in model.named_parameters())
        return {"loss": loss.detach(), **dict(zip(names, gradients, strict=True))}

    golden, spread = rounding_spread(functools.partial(run, exact), torch.float32)
    for impl in ("triton", "torch"):
        model = ShapedTransformer(dataclasses.replace(config, impl=impl))
        model.load_state_dict(state)
        found = run(model)
        labels = {name: "tensor" if x.numel() > 2 else "gain" for name, x in found.items()}
        labels["loss"] = "loss"
        worst.add(f"network {impl}", found, golden, spread, labels)


def main(seeds):
    worst = Worst()
    for seed in range(seeds):
        for dtype in (torch.float32, (torch.float16, torch.bfloat16)[seed % 2]):
            measure_attention(worst, WIDE, dtype, seed)
            measure_attention(worst, GROUPED, dtype, seed, prior=True)
        measure_network(worst, "simplified", "decoder", seed)  # cancels most
        measure_network(worst, METHODS[seed % len(METHODS)], ("encoder", "decoder")[seed % 2], seed)
    print(json.dumps(worst, indent=1))


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_errors_are_within_their_spread(setting):
    from fresh_python import python  # which a script does not find

    capability = torch.backends.cpu.get_cpu_capability()
    if setting == "skylake" and capability != "AVX512":
        pytest.skip(f"needs a processor with AVX512, this one has {capability}")
    variables = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", **SETTINGS[setting]}
    ratios = json.loads(python("-W", "ignore", __file__, SEEDS, timeout=3600, **variables))
    assert len(ratios) == 2 * 3 * len(GAINS | RATES) + 2 * 3
    assert {name: x for name, x in ratios.items() if not x <= 1} == {}


if __name__ == "__main__":
    main(int(sys.argv[1]))
