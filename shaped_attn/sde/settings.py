"""The description of one block that its covariance SDE and its finite networks share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import (
    HeadGain,
    check_head_gain,
    check_kind,
    check_number,
    check_positive,
    check_size,
    fail,
)
from ..settings import check_settings, documented, setting
from .sample import plain

OUT_PROJ = ("none", "orthogonal", "gaussian")


@dataclass(frozen=True)
class Detuning:
    """Mismatches of order 1 / width, which keep a limit and add to its drift.

    In a network of width n:

        identity gain 1 + identity / n,    softmax gain - center gain = softmax / n,
        skip_gain^2 + branch_gain^2 = 1 + variance / n

    covariance-sde.md (35).
    """

    identity: float = 0.0
    softmax: float = 0.0
    variance: float = 0.0


class ZeroLogitAttention(NamedTuple):
    """The attention matrix at zero logits, A0 = diag(mass) P0.

    Attributes:
        rows: (m, m) P0: every row sums to 1, or is zero if its token sees no key.
        mass: (m,) the sums of the rows of A0; 1 without a prior, 0 where the row is zero.
    """

    rows: Tensor
    mass: Tensor


def _check_detuning(name: str, value: Any) -> Detuning:
    remedy = "Use shaped_attn.sde.Detuning(identity=..., softmax=..., variance=...)."
    for part, number in vars(check_kind(name, value, Detuning, remedy)).items():
        check_number(f"{name}.{part}", number)
    return value


def _check_square(name: str, value: Any) -> Tensor:
    rule, remedy = "must be an (m, m) Tensor", "Give one row per token."
    if not isinstance(value, Tensor):
        fail(TypeError, name, rule, type(value).__name__, remedy)
    if value.ndim != 2 or value.shape[0] != value.shape[1]:
        fail(ValueError, name, rule, f"shape {tuple(value.shape)}", remedy)
    return value


def _check_mask(name: str, value: Any) -> Tensor:
    if _check_square(name, value).dtype != torch.bool:
        fail(TypeError, name, "must be bool", value.dtype, "Make it True where a token is seen.")
    return value


def _check_prior(name: str, value: Any) -> Tensor:
    if not (_check_square(name, value).isfinite().all() and (value >= 0).all()):
        rule = "must be finite with no negative entry"
        got = f"entries from {float(value.min()):g} to {float(value.max()):g}"
        remedy = "Give the attention matrix at zero logits itself, not its logarithm."
        fail(ValueError, name, rule, got, remedy)
    return value


@documented
@dataclass(frozen=True, kw_only=True, eq=False)
class BlockSettings:
    """One block: attention, then an MLP, each mixed with its skip path.

    For tokens X (m, n) of covariance V = X X^T / n, with weights W of iid N(0, 1/fan-in) entries:

        Z  = skip_gain X + branch_gain A X W_V [W_O]
        X' = skip_gain Z + branch_gain sqrt(c_n) sigma(Z W_pre) W_post
        A  = identity_gain I + softmax_gain softmax(Y) - center_gain P0
        Y  = X W_Q (X W_K)^T / (tau0 sqrt(n n_k))

    per head, where P0 is softmax at zero logits under the same mask, and sigma has the slopes
    1 + c_plus / sqrt(n) above and 1 + c_minus / sqrt(n) below zero. covariance-sde.md (1)-(6).

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of its range.
    """

    tau0: float = setting(1.0, "Temperature.", check_positive)
    branch_gain: float = setting(
        0.5, "Weight of each branch, from 0 to 1.", partial(check_number, low=0, high=1)
    )
    skip_gain: float | None = setting(
        None,
        "Weight of each skip path.",
        none="so that V keeps its size, sqrt(1 - (identity_gain branch_gain)^2)",
    )
    identity_gain: float = setting(1.0, "Weight of the identity in the attention matrix.")
    softmax_gain: HeadGain = setting(1.0, "Weight of softmax, one number or one for each head.")
    center_gain: HeadGain | None = setting(
        None, "Weight of the mean of the visible values.", none="that of softmax"
    )
    heads: int = setting(1, "Number of heads.", check_size)
    is_causal: bool = setting(False, "Whether token i sees only the tokens up to i.")
    key_start: int | None = setting(None, "First token that is not padding.", none="0")
    key_end: int | None = setting(None, "One past the last token that is not padding.", none="m")
    attn_mask: Tensor | None = setting(
        None,
        "(m, m) bool, True where the token of the row sees that of the column.",
        _check_mask,
        none="no further mask",
    )
    prior: Tensor | None = setting(
        None,
        "(m, m) the attention matrix A0 at zero logits, no entry negative; zero hides a key. The "
        "softmax and the centre of a row are multiplied by the sum of its row of A0.",
        _check_prior,
        none="uniform over the visible keys",
    )
    attention: bool = setting(True, "Whether the block has attention.")
    mlp: bool = setting(True, "Whether the block has an MLP.")
    mlp_ratio: float = setting(1.0, "Hidden width of the MLP over n.", check_positive)
    c_plus: float = setting(0.0, "Shape of the activation above 0.")
    c_minus: float = setting(-1.0, "Shape of the activation below 0.")
    out_proj: str = setting(
        "none",
        'Law of W_O, where "orthogonal" is that of Haar; or "none" for no such factor.',
        choices=OUT_PROJ,
    )
    detuning: Detuning = setting(Detuning(), "Mismatches of order 1/n.", _check_detuning)

    def __post_init__(self) -> None:
        """Check every field and fill in the gains that follow from others."""
        check_settings(self)
        if not (self.attention or self.mlp):
            names, rule = "attention and mlp", "must not both be False"
            fail(ValueError, names, rule, "no sub-layer", "Switch one of them on.")
        self._set("softmax_gain", check_head_gain("softmax_gain", self.softmax_gain, self.heads))
        center_gain = self.softmax_gain if self.center_gain is None else self.center_gain
        self._set("center_gain", check_head_gain("center_gain", center_gain, self.heads))
        if self.skip_gain is None:
            size = (self.identity_gain if self.attention else 1.0) * self.branch_gain
            if abs(size) > 1:
                fail(
                    ValueError,
                    "skip_gain",
                    "must be given where identity_gain * branch_gain is above 1",
                    f"None with identity_gain * branch_gain = {size:g}",
                    "Give skip_gain, or lower one of the two gains.",
                )
            self._set("skip_gain", math.sqrt(1 - size**2))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @property
    def slices(self) -> int:
        """Number of slices of X that differ in covariance: the heads, if no W_O mixes them."""
        return self.heads if self.attention and self.out_proj == "none" else 1

    def head_gains(self, name: str, like: Tensor) -> Tensor:
        """Return ``softmax_gain`` or ``center_gain`` as (heads,)."""
        gain = getattr(self, name)
        gain = gain if isinstance(gain, tuple) else (gain,) * self.heads
        return torch.tensor(gain, dtype=like.dtype, device=like.device)

    def visible_keys(self, tokens: int, device: torch.device | None = None) -> Tensor:
        """Return the (m, m) bool matrix of which token, in columns, each token, in rows, sees."""
        visible = torch.ones(tokens, tokens, dtype=torch.bool, device=device)
        if self.is_causal:
            visible = visible.tril()
        key = torch.arange(tokens, device=device)
        if self.key_start is not None:
            visible = visible & (key >= self.key_start)
        if self.key_end is not None:
            visible = visible & (key < self.key_end)
        for name in ("attn_mask", "prior"):
            matrix = getattr(self, name)
            if matrix is None:
                continue
            if matrix.shape[0] != tokens:
                rule = f"must have a row for each of the {tokens} tokens of V"
                remedy = "Give v0 and it the same number of tokens."
                fail(ValueError, name, rule, f"shape {tuple(matrix.shape)}", remedy)
            visible = visible & (matrix.to(device) > 0)
        return visible

    def zero_logit_attention(self, tokens: int, like: Tensor) -> ZeroLogitAttention:
        """Return the attention matrix at zero logits, of the dtype and device of ``like``."""
        visible = self.visible_keys(tokens, like.device)
        weights = visible.to(torch.float64)
        if self.prior is not None:
            weights = torch.where(visible, self.prior.to(weights), 0)
        mass = weights.sum(-1)
        rows = weights / mass.where(mass > 0, 1)[:, None]
        if self.prior is None:
            mass = (mass > 0).to(mass)
        return ZeroLogitAttention(rows.to(like), mass.to(like))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain data for JSON."""
        return plain(self)


def variance_correction(c_plus: float, c_minus: float, width: float) -> float:
    """Return c_n = 2 / (s_+^2 + s_-^2) with s = 1 + c / sqrt(n), covariance-sde.md (4).

    The factor by which an activation with these slopes keeps the variance of a normal input.
    """
    s_plus, s_minus = (1 + c / math.sqrt(width) for c in (c_plus, c_minus))
    if s_plus == 0 == s_minus:
        got, remedy = f"{c_plus:g} and {c_minus:g}", "Such an activation is zero."
        fail(ValueError, "c_plus and c_minus", "must not both be -sqrt(width)", got, remedy)
    return 2 / (s_plus**2 + s_minus**2)
