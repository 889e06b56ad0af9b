"""Modules of `shaped_attn.nn` under test: models, inputs, comparisons and counts of operators."""

import itertools
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from shaped_attn.nn import METHODS, Projection, ShapedTransformer, ShapedTransformerConfig
from shaped_attn.testing import relative_error, rounding_error

WIDTH, HEADS, VOCABULARY = 16, 2, 11
KINDS = {"decoder": "causal_lm", "encoder": "masked_lm"}

ALL = set(itertools.product((False, True), repeat=2))
WIRINGS = {method: ALL for method in METHODS} | {
    "simplified": {(False, True)},
    "simplified_parallel": {(False, True), (False, False)},
}
ALLOWED = [(method, *wiring) for method in METHODS for wiring in sorted(WIRINGS[method])]

# Between them every kind of parameter and buffer.
MODELS = [
    *(dict(zip(("method", "has_skip", "has_normalization"), x, strict=True)) for x in ALLOWED),
    {
        "positions": "learned",
        "out_proj": "orthogonal",
        "norm": "layer",
        "final_norm": "rms",
        "gain_scheme": "learn",
        "softmax_gain": (0.5, 1.5),
        "trainable_slopes": True,
        "max_length": 32,
    },
    {"gain_scheme": "recover", "final_norm": "layer", "norm": "rms", "tie_embeddings": True},
]


def config(method="shaped", has_skip=None, has_normalization=None, **options):
    sizes = {"vocab_size": VOCABULARY, "width": WIDTH, "depth": 2, "heads": HEADS, "mlp_ratio": 1}
    return ShapedTransformerConfig(
        method=method,
        has_skip=has_skip,
        has_normalization=has_normalization,
        **sizes | options,
    )


def build(
    device, method="shaped", has_skip=None, has_normalization=None, dtype=torch.float64, **options
):
    """In float64 by the composite, also on a GPU, whose kernels have no float64."""
    impl = "torch" if dtype == torch.float64 else "auto"
    made = config(method, has_skip, has_normalization, **{"impl": impl, **options})
    return ShapedTransformer(made, dtype=dtype).to(device)


def scatter(module):
    """Move every parameter away from its special start, keeping its size."""
    for parameter in module.parameters():
        size = parameter.detach().square().mean().sqrt().clamp(min=0.25)
        parameter.data.add_(0.5 * size * torch.randn(parameter.shape).to(parameter))
    return module


def tokens(device, batch=2, length=6):
    return torch.randint(VOCABULARY, (batch, length)).to(device)


def double(device, *shape):
    return torch.randn(shape, dtype=torch.float64).to(device)


def make_stack(module, networks):
    """Replace the weight of every projection by a stack, and draw it."""
    for part in module.modules():
        if isinstance(part, Projection):
            part.weight = torch.nn.Parameter(part.weight.new_empty(networks, *part.weight.shape))
    module.reset_parameters(torch.Generator().manual_seed(0))
    return module


def assert_equal(actual, expected, *, sums):
    """Up to the rounding of the sums of that many terms behind one element."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    assert relative_error(actual, expected) <= sums * rounding_error(actual.dtype)


class _Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and "view" not in func.name():
            self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def count(call):
    """Count the operators that a call runs, views left out."""
    with _Operators() as operators, torch.no_grad():
        call()
    return operators.counts
