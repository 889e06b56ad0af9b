"""A block and a training step of `ShapedTransformer`, beside torch's own layer of the same sizes.

Both are causal, with MLPs of 4 times the width. torch's layer normalises, and computes plain
attention. An entry's time is relative to it, both eager or both compiled; tokens/s are in
`extra_info`.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable

import pytest
import timing
import torch
import torch.nn.functional as F
from cases import CPU_MODEL_CASES, GPU_MODEL_CASES, ModelCase
from timing import Step
from torch import Tensor, nn

from shaped_attn.nn import (
    ShapedBlock,
    ShapedTransformer,
    ShapedTransformerConfig,
    parameter_groups,
)
from shaped_attn.testing import assert_within_spread, rounding_spread

CASES = GPU_MODEL_CASES if torch.cuda.is_available() else CPU_MODEL_CASES
CHECKED_TOKENS = 64
BLOCK = {"mlp_ratio": 4.0, "gain_scheme": "learn"}


class TorchBlocks(nn.Module):
    """torch's layers with the mask that makes them causal."""

    def __init__(self, case: ModelCase, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                case.width, case.heads, 4 * case.width, 0.0, batch_first=True, norm_first=True
            )
            for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(
            x.shape[1], device=x.device, dtype=x.dtype
        )
        for layer in self.layers:
            x = layer(x, src_mask=mask, is_causal=True)
        return x


class TorchModel(nn.Module):
    """A decoder of torch's layers, embeddings and head as in `ShapedTransformer`."""

    def __init__(self, case: ModelCase) -> None:
        super().__init__()
        self.embedding = nn.Embedding(case.vocab_size, case.width)
        self.blocks = TorchBlocks(case, case.depth)
        self.head = nn.Linear(case.width, case.vocab_size, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.blocks(self.embedding(tokens)))


def block_step(block: nn.Module, x: Tensor) -> Step:
    """Forward and backward of a block."""
    leaves = [x.requires_grad_(), *block.parameters()]
    return Step(lambda _: torch.autograd.grad(block(x).square().mean(), leaves))


def training_step(model: nn.Module, logits: Callable[[Tensor], Tensor], tokens: Tensor) -> Step:
    """A step of AdamW on the next token."""
    optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay=0.1), lr=1e-4)

    def step(_: None) -> None:
        found = logits(tokens[:, :-1])
        F.cross_entropy(found.flatten(0, 1).float(), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return Step(step)


def check(model: nn.Module, function: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Compare with the same weights in float64 and the reference, on a few tokens.

    Raises:
        AssertionError: the error is beyond the spread that roundings give the result.
    """
    exact = copy.deepcopy(model).double()
    for module in exact.modules():
        if hasattr(module, "impl"):
            module.impl = "reference"
    few = x[:1, :CHECKED_TOKENS]
    wide = few.double() if few.is_floating_point() else few
    with torch.no_grad():
        golden, spread = rounding_spread(lambda: {"out": output(exact(wide))}, dtype_of(model))
        assert_within_spread(output(function(few)), golden["out"], spread["out"], name="out")


def output(found: object) -> Tensor:
    """Logits of a model, or the stream of a block."""
    return found if isinstance(found, Tensor) else found.logits


def dtype_of(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


def measure(benchmark, stopwatch, case: ModelCase, name: str, ours: Step, peer: Step) -> None:
    seconds = timing.race(benchmark, "models", stopwatch, ours, {"torch": peer}, ["torch"])
    if benchmark.enabled:
        tokens = case.batch * case.length
        benchmark.extra_info |= {
            "case": f"{name}-{case.id}",
            "times": {name: timing.summary(times) for name, times in seconds.items()},
            "tokens_per_second": {
                name: round(tokens / statistics.median(times)) for name, times in seconds.items()
            },
        }


@pytest.fixture(params=("eager", "compiled"))
def mode(request, is_compile_only):
    torch.compiler.reset()
    if is_compile_only:
        pytest.skip("only cases of attention are compiled beforehand")
    return request.param


def as_mode(function: nn.Module, mode: str) -> Callable:
    """The module, or a compiled one that shares its weights and may not turn to eager code."""
    return (
        torch.compile(function, fullgraph=True, dynamic=False) if mode == "compiled" else function
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
@pytest.mark.benchmark(timer=timing.clock)
def test_block(case, mode, benchmark, device, stopwatch):
    options = {"device": device, "dtype": case.dtype}
    block = ShapedBlock(case.width, case.heads, is_causal=True, **BLOCK, **options)
    x = torch.randn(case.batch, case.length, case.width, **options)
    check(block, block, x)
    ours, peer = (as_mode(m, mode) for m in (block, TorchBlocks(case, 1).to(**options)))
    measure(benchmark, stopwatch, case, f"block-{mode}", block_step(ours, x), block_step(peer, x))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
@pytest.mark.benchmark(timer=timing.clock)
def test_training_step(case, mode, benchmark, device, stopwatch):
    config = ShapedTransformerConfig(
        vocab_size=case.vocab_size,
        width=case.width,
        depth=case.depth,
        heads=case.heads,
        **BLOCK,
    )
    model = ShapedTransformer(config).to(device, case.dtype)
    tokens = torch.randint(case.vocab_size, (case.batch, case.length + 1), device=device)
    check(model, model, tokens)
    ours = as_mode(model, mode)
    torch_model = TorchModel(case).to(device, case.dtype)
    peer = as_mode(torch_model, mode)
    measure(
        benchmark,
        stopwatch,
        case,
        f"training-{mode}",
        training_step(model, lambda tokens: output(ours(tokens)), tokens),
        training_step(torch_model, peer, tokens),
    )
