"""What the benchmark of the operator runs: data alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch

from shaped_attn.testing import Case

TOKENS, WIDTH = 16384, 2048  # B T, unless T alone is more, and H D
PASSES = ("forward", "backward", "forward+backward")

# Arguments of `shaped_attention` by form, beside sizes and mask. "learnable" draws its five gains
# per head; priors and plain attention have the standard scale 1 / sqrt(D).
FORMS = {
    "fixed": {"skip_gain": 0.9, "branch_gain": 0.436},
    "learnable": {},
    "plain": {"identity_gain": 0.0, "center_gain": 0.0},
    "e_spa": {"identity_gain": 0.0, "center_gain": 0.0},
    "u_spa": {"identity_gain": 0.0, "center_gain": 0.0},
}

# Up to this length a case is also timed as a CUDA graph, which costs the host nothing.
GRAPH_LENGTH = 1024

# Names of `peers.PEERS` by device; those that a machine or a case rules out are left out.
GPU_PEERS = ("cudnn", "flash", "flash_attention_4")
ALL_GPU_PEERS = (*GPU_PEERS, "flex", "eager")
CPU_PEERS = ("sdpa", "eager")


class AttentionCase(NamedTuple):
    """One case: sizes, a row of `FORMS`, the peers beside it and the set it belongs to.

    `peers.FAMILIES` are beside every case that the Hopper kernels take.

    The set is "gates" (what `make gpu` runs, and gates are asked of), "default" or "extended"
    (which only runs when it is asked for).
    """

    sizes: Case
    form: str = "fixed"
    peers: tuple[str, ...] = GPU_PEERS
    set: str = "default"

    @property
    def id(self) -> str:
        """Name of the case, such as ``fixed-B4-T4096-H16-D128-bf16-causal-res_bf16``."""
        return f"{self.form}-{self.sizes.id}"


def _sizes(length: int, head_dim: int, is_causal: bool, form: str = "fixed", **changes) -> Case:
    dtype = changes.setdefault("dtype", torch.bfloat16)
    return Case(
        batch=max(1, TOKENS // length),
        heads=WIDTH // head_dim,
        queries=length,
        head_dim=head_dim,
        is_causal=is_causal,
        residual_dtype=dtype if form in ("fixed", "learnable") else None,
        **changes,
    )


def _gpu_cases() -> Iterator[AttentionCase]:
    # The gates, the most telling first.
    for length, head_dim, is_causal in itertools.product(
        (4096, 16384, 1024, 512), (128, 64), (True, False)
    ):
        yield AttentionCase(_sizes(length, head_dim, is_causal), set="gates")

    def case(length: int, head_dim: int, is_causal: bool, form: str, **changes) -> AttentionCase:
        peers = changes.pop("peers", GPU_PEERS)
        return AttentionCase(_sizes(length, head_dim, is_causal, form, **changes), form, peers)

    for form in ("learnable", "plain"):
        yield case(4096, 128, True, form)
        yield case(4096, 64, False, form)
        yield case(1024, 64, True, form)
    yield case(4096, 128, True, "e_spa")
    yield case(4096, 64, True, "u_spa")
    yield case(4096, 128, True, "fixed", kv_heads=4)
    yield case(4096, 128, True, "fixed", dtype=torch.float16)
    yield case(4096, 256, True, "fixed")
    yield case(32768, 128, True, "fixed")
    small = Case(1, 8, queries=128, head_dim=64, dtype=torch.bfloat16, is_causal=True)
    yield AttentionCase(small, "plain")  # bound by the host
    yield case(2048, 128, True, "fixed", peers=ALL_GPU_PEERS)
    yield case(2048, 64, False, "fixed", peers=ALL_GPU_PEERS)

    for length, head_dim, is_causal, form, dtype, has_groups in itertools.product(
        (512, 1024, 2048, 4096, 8192, 16384, 32768),
        (64, 128, 256),
        (True, False),
        ("fixed", "learnable", "plain"),
        (torch.bfloat16, torch.float16),
        (False, True),
    ):
        kv_heads = WIDTH // head_dim // 4 if has_groups else None
        sizes = _sizes(length, head_dim, is_causal, form, dtype=dtype, kv_heads=kv_heads)
        yield AttentionCase(sizes, form, set="extended")


def _cpu_cases() -> Iterator[AttentionCase]:
    for is_causal, form, kv_heads in (
        (True, "fixed", 2),
        (False, "fixed", 4),
        (True, "learnable", 4),
        (False, "plain", 4),
        (True, "e_spa", 4),
    ):
        residual_dtype = torch.float32 if form in ("fixed", "learnable") else None
        sizes = Case(
            1, 4, kv_heads, 256, head_dim=32, is_causal=is_causal, residual_dtype=residual_dtype
        )
        yield AttentionCase(sizes, form, CPU_PEERS)
    for length in (1024, 2048, 4096):
        for is_causal in (True, False):
            sizes = Case(
                1,
                8,
                queries=length,
                head_dim=64,
                is_causal=is_causal,
                residual_dtype=torch.float32,
            )
            yield AttentionCase(sizes, "fixed", CPU_PEERS, "extended")


def _by_id(cases: Iterator[AttentionCase]) -> dict[str, AttentionCase]:
    found: dict[str, AttentionCase] = {}
    for case in cases:
        found.setdefault(case.id, case)  # the first set that has a case keeps it
    return found


GPU_CASES = _by_id(_gpu_cases())
CPU_CASES = _by_id(_cpu_cases())


class ModelCase(NamedTuple):
    """Sizes of a `ShapedBlock`, or of the `ShapedTransformer` that a training step is taken of."""

    batch: int
    length: int
    width: int
    heads: int
    depth: int
    dtype: torch.dtype
    vocab_size: int = 256

    @property
    def id(self) -> str:
        """Name of the case, such as ``B4-T2048-N1024-H16-L12``."""
        return f"B{self.batch}-T{self.length}-N{self.width}-H{self.heads}-L{self.depth}"


GPU_MODEL_CASES = (
    ModelCase(8, 2048, 1024, 16, 12, torch.bfloat16, 50_257),
    ModelCase(4, 4096, 2048, 16, 8, torch.bfloat16, 50_257),
)
CPU_MODEL_CASES = (ModelCase(2, 128, 64, 4, 1, torch.float32),)

SDE_BLOCKS = {
    "attention-full": {"mlp": False},
    "attention-causal": {"mlp": False, "is_causal": True},
    "block-full": {},
}
SDE_TOKENS, SDE_PATHS, SDE_STEPS = (4, 8), 512, 2
