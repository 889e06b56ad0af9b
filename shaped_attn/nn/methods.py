"""What each method is at initialisation, and stacks of blocks built from that.

"shaped" is `ShapedBlock`, whose arguments describe it. The other methods are described here, with
the values of their papers; papers.md, sections 1, 3 and 4, has them and how sure each is.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..checks import check_choice, check_flag
from ..priors import ESPA, USPA
from .activations import TailoredLeakyReLU, correlation_map, tat_slope
from .attention import ShapedAttention
from .block import NORMS, TransformerBlock, make_norm
from .gains import GAIN_NAMES
from .mlp import MLP

NORMALIZED_SKIP_GAIN = 0.98
"""alpha of the normalised skips, alpha^2 + beta^2 = 1, of 2302.10322 (unconfirmed)."""

SIMPLIFIED_MLP_GAIN = 0.1 * math.sqrt(18)
"""Start of the MLP's weight in 2311.01906 times sqrt(depth): the paper has 0.1 for 18 blocks."""

TAT_CORRELATION = 0.9
"""To which the MLPs of a network without skips take the correlation of tokens that have none."""

Wiring = tuple[bool, bool]
"""Whether there are skips, and whether there is normalisation."""

USUALLY_WITH: tuple[Wiring, ...] = ((True, True), (False, True), (True, False), (False, False))
USUALLY_WITHOUT = USUALLY_WITH[::-1]
SHAPED_WIRINGS: tuple[Wiring, ...] = ((True, False), (True, True), (False, False), (False, True))


@dataclass(frozen=True, kw_only=True)
class Method:
    """What a method other than "shaped" is at initialisation.

    Attributes:
        gains: start values of the gains of `ShapedAttention`, in the order of `GAIN_NAMES`.
        learned_gains: those that are trained, one per head.
        schedule: gives the prior of every layer for a depth. Default None: the uniform prior.
        has_zero_queries: whether W_Q = 0. Default True.
        law: of W_V, W_O and the MLP, "orthogonal" or "gpt2". "gpt2" is the law of W_Q and W_K too,
            otherwise it is "gaussian".
        law_without_norm: takes the place of ``law`` without normalisation. Default None: ``law``.
        has_values: whether there are W_V and W_O. Without them the weights of the two halves are
            trained, and the only W_V is that of the first layer. Default True.
        is_parallel: as in `TransformerBlock`. Default False.
        norm: usual kind of normalisation, "layer" or "rms".
        wirings: those that it can have, the usual one first.
    """

    gains: tuple[float, float, float]
    learned_gains: tuple[str, ...] = ()
    schedule: Callable[[int], list[ESPA] | list[USPA]] | None = None
    has_zero_queries: bool = True
    law: str
    law_without_norm: str | None = None
    has_values: bool = True
    is_parallel: bool = False
    norm: str = "layer"
    wirings: tuple[Wiring, ...]


_SOFTMAX = {"gains": (0.0, 1.0, 0.0)}
_WITHOUT_SHORTCUTS = {"law": "orthogonal", "wirings": USUALLY_WITHOUT}
_SIMPLIFIED = {
    "gains": (1.0, 1.0, 1.0),
    "learned_gains": GAIN_NAMES,
    "law": "gpt2",
    "has_values": False,
    "norm": "rms",
}

_METHODS = {
    "simplified": Method(**_SIMPLIFIED, wirings=((False, True),)),
    "simplified_parallel": Method(
        **_SIMPLIFIED, is_parallel=True, wirings=((False, True), (False, False))
    ),
    "value_skipinit": Method(
        gains=(1.0, 0.0, 0.0),
        learned_gains=("identity_gain", "softmax_gain"),
        **_WITHOUT_SHORTCUTS,
    ),
    "u_spa": Method(**_SOFTMAX, schedule=USPA.schedule, **_WITHOUT_SHORTCUTS),
    "e_spa": Method(**_SOFTMAX, schedule=ESPA.schedule, **_WITHOUT_SHORTCUTS),
    "pre_ln": Method(
        **_SOFTMAX,
        has_zero_queries=False,
        law="gpt2",
        law_without_norm="gaussian",
        wirings=USUALLY_WITH,
    ),
}

METHODS = ("shaped", *_METHODS)
"""Names of the methods, for `ShapedTransformerConfig`."""


def resolve_wiring(
    method: str, has_skip: bool | None, has_normalization: bool | None, norm: str | None
) -> tuple[bool, str | None]:
    """Return whether there are skips, and the kind of normalisation or None.

    What is None is filled in: the wiring that is usual for the method among those that fit, with
    normalisation if a ``norm`` is named; and the norm that its paper has.

    Raises:
        TypeError: a flag is neither None nor a bool.
        ValueError: an unknown method or norm; a wiring that the method does not have; a ``norm``
            beside ``has_normalization=False``.
    """
    check_choice("method", method, METHODS)
    check_choice("norm", norm, NORMS)
    for name, flag in (("has_skip", has_skip), ("has_normalization", has_normalization)):
        if flag is not None:
            check_flag(name, flag)
    if norm is not None and has_normalization is False:
        raise ValueError(
            f"norm must be None for has_normalization=False, got {norm!r}. "
            "Leave one of the two out."
        )
    if norm is not None:
        has_normalization = True
    wirings = SHAPED_WIRINGS if method == "shaped" else _METHODS[method].wirings
    fitting = [
        (skip, normalization)
        for skip, normalization in wirings
        if has_skip in (None, skip) and has_normalization in (None, normalization)
    ]
    if not fitting:
        raise ValueError(
            f"has_skip, has_normalization must be one of {', '.join(map(str, wirings))} for "
            f'method="{method}", got ({has_skip}, {has_normalization}). '
            "Leave them out for those of its paper, or choose another method."
        )
    has_skip, has_normalization = fitting[0]
    if has_normalization and norm is None:
        norm = "layer" if method == "shaped" else _METHODS[method].norm
    return has_skip, norm


def final_norm(method: str, norm: str | None) -> str | None:
    """Return the kind of normalisation before the head, for blocks with ``norm``.

    Methods other than "shaped" end with that of their blocks. Simplified blocks without any keep a
    LayerNorm, as in the code of their authors.
    """
    if method == "shaped":
        return None
    return norm or ("layer" if not _METHODS[method].has_values else None)


def build_blocks(
    method: str,
    depth: int,
    *,
    has_skip: bool,
    norm: str | None,
    width: int,
    mlp_ratio: float,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **attention_arguments: Any,
) -> Iterator[TransformerBlock]:
    """Make the blocks of a method other than "shaped", the first layer first.

    ``has_skip`` and ``norm`` are those of `resolve_wiring`; the other arguments are those of
    `ShapedAttention` and `MLP`. See `ShapedTransformer` for what the methods are.
    """
    described = _METHODS[method]
    law = described.law if norm else described.law_without_norm or described.law
    key_law = "gpt2" if law == "gpt2" else "gaussian"
    factory = {"device": device, "dtype": dtype}
    priors = described.schedule(depth) if described.schedule else [None] * depth
    for layer, prior in enumerate(priors):
        value_law = law
        if not described.has_values:
            value_law = "none" if layer else "identity"
        attention = ShapedAttention(
            width,
            query_proj="zero" if described.has_zero_queries else key_law,
            key_proj=key_law,
            value_proj=value_law,
            out_proj=law if described.has_values else "none",
            prior=prior,
            scale="standard",
            **dict(zip(GAIN_NAMES, described.gains, strict=True)),
            gain_scheme="learn" if described.learned_gains else "fixed",
            learned_gains=described.learned_gains,
            **attention_arguments,
            **factory,
        )
        activation = _activation(law, has_skip, depth)
        mlp = MLP(width, mlp_ratio, activation=activation, law=law, **factory)
        # Something has to bring the embeddings to variance 1, as in the code of the authors.
        first_norm = norm or ("layer" if not described.has_values and layer == 0 else None)
        yield TransformerBlock(
            attention,
            mlp,
            attention_norm=make_norm(first_norm, width, **factory),
            mlp_norm=None if described.is_parallel else make_norm(norm, width, **factory),
            is_parallel=described.is_parallel,
            **_block_gains(described, law, has_skip, depth),
        )


def _block_gains(described: Method, law: str, has_skip: bool, depth: int) -> dict:
    """Return the weights of skips and branches, as `TransformerBlock` takes them."""
    if not described.has_values:
        return {
            "attention_skip_gain": None,
            "mlp_skip_gain": None if described.is_parallel else 1.0,
            "mlp_branch_gain": SIMPLIFIED_MLP_GAIN / math.sqrt(depth),
            "learns_branch_gains": True,
        }
    skip, branch = None, 1.0
    if has_skip and law == "gpt2":
        skip = 1.0
    elif has_skip:
        skip, branch = NORMALIZED_SKIP_GAIN, math.sqrt(1 - NORMALIZED_SKIP_GAIN**2)
    return {
        "attention_skip_gain": skip,
        "attention_branch_gain": branch,
        "mlp_skip_gain": skip,
        "mlp_branch_gain": branch,
    }


def _activation(law: str, has_skip: bool, depth: int) -> nn.Module:
    """Return ReLU for "gpt2" weights, and for the others what keeps the mean square as they do."""
    if law == "gpt2":
        return nn.ReLU()
    return TailoredLeakyReLU(0.0 if has_skip else _skipless_slope(depth))


@functools.cache
def _skipless_slope(layers: int) -> float:
    """Return the slope of TAT; 0, ReLU, for layers too few to correlate tokens that much."""
    relu, correlation = TailoredLeakyReLU(0.0), 0.0
    for _ in range(layers):
        correlation = correlation_map(relu, correlation)
    return tat_slope(layers, TAT_CORRELATION) if correlation > TAT_CORRELATION else 0.0
