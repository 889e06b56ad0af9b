"""Exact Markov chains of the token covariance of a network of finite width.

They sample the law of V after each layer without forming anything as wide as the network, the
hidden layer of the MLP excepted. Equation numbers are those of covariance-sde.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .settings import ZeroLogitAttention, variance_correction

if TYPE_CHECKING:
    from .network import FiniteNetwork

_HIDDEN_BYTES = 2**27  # of hidden activations at a time


def normal(sizes: Sequence[int], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw iid N(0, 1) in the dtype and on the device of ``like``."""
    options = {"dtype": like.dtype, "device": like.device, "generator": generator}
    if like.device.type != "cpu" or like.dtype != torch.float64:
        return torch.randn(*sizes, **options)
    # On a CPU torch draws float64 one by one; Box-Muller on whole tensors is twice as fast.
    count = math.prod(sizes)
    uniform = torch.rand(2, -(-count // 2), **options)
    radius = uniform[0].neg_().log1p_().mul_(-2).sqrt_()
    angle = uniform[1].mul_(2 * math.pi)
    drawn = torch.empty_like(uniform)
    torch.mul(angle.cos(), radius, out=drawn[0])
    torch.mul(angle.sin_(), radius, out=drawn[1])
    return drawn.view(-1)[:count].view(*sizes)


def wishart_factor(
    sizes: Sequence[int],
    degrees: float,
    like: Tensor,
    generator: torch.Generator | None,
    *,
    columns: int = 0,
) -> Tensor:
    """Draw lower triangular T with T T^T ~ Wishart_m(degrees), by Bartlett's decomposition.

    ``sizes`` is (..., m, m); ``degrees`` is at least m and need not be whole. Below the diagonal
    are N(0, 1), on it the root of chi^2 with degrees, degrees - 1, ... degrees of freedom. With
    ``columns`` it is preceded by as many columns of iid N(0, 1): [G | T].
    """
    *batch, tokens, _ = sizes
    width = columns + tokens
    row = torch.arange(tokens, device=like.device)
    is_normal = torch.arange(width, device=like.device) < row[:, None] + columns
    is_normal[:, :columns] = True
    index = is_normal.flatten().nonzero().squeeze(1)
    factor = torch.zeros(*batch, tokens * width, dtype=like.dtype, device=like.device)
    factor.index_copy_(-1, index, normal((*batch, len(index)), like, generator))
    factor = factor.view(*batch, tokens, width)
    freedom = (degrees - row.to(like)) / 2
    # torch.distributions takes no generator.
    chi2 = 2 * torch._standard_gamma(freedom.expand(*batch, tokens).contiguous(), generator)
    factor[..., columns:].diagonal(dim1=-2, dim2=-1).copy_(chi2.sqrt())
    return factor


def gaussian_factor(
    sizes: Sequence[int], columns: int, like: Tensor, generator: torch.Generator | None
) -> Tensor:
    """Draw F, (..., m, m or fewer), with F F^T like G G^T for normal G (m, columns)."""
    if columns < sizes[-1]:
        return normal((*sizes[:-1], columns), like, generator)
    return wishart_factor(sizes, columns, like, generator)


def lower_factor(wide: Tensor) -> Tensor:
    """Return a square lower triangular L with L L^T = F F^T, for F (..., m, r), r >= m.

    Through the Gram matrix, which is fast; where that is too close to singular for it, by QR.
    """
    shape = (*wide.shape[:-1], wide.shape[-2])
    wide = wide.flatten(0, -3)
    gram = wide @ wide.mT
    factor, info = torch.linalg.cholesky_ex(gram)
    pivots = factor.diagonal(dim1=-2, dim2=-1)
    # Forming the Gram matrix loses the square of the ratio of the pivots.
    least = torch.finfo(gram.dtype).eps ** 0.25
    is_bad = (info != 0) | ~(pivots.amin(-1) > least * pivots.amax(-1))
    if is_bad.any():
        is_finite = gram[is_bad].isfinite().flatten(1).all(1)[:, None, None]
        usable = torch.where(is_finite, wide[is_bad], 0)
        precise = torch.linalg.qr(usable.mT, mode="r").R.mT
        factor[is_bad] = torch.where(is_finite, precise, torch.nan)
    return factor.view(shape)


class ShapedMatrix:
    """Turns logits into A = identity I + mass (softmax_gain softmax(Y + log P0) - center_gain P0).

    covariance-sde.md (5), for a prior A0 = diag(mass) P0. Gains are numbers or (H,).
    """

    def __init__(
        self,
        zero_logit: ZeroLogitAttention,
        identity_gain: float,
        softmax_gain: Tensor,
        center_gain: Tensor,
    ) -> None:
        rows, mass = zero_logit
        is_seen = rows > 0
        # A row that sees nothing has the mass 0; any weights do, if they are finite.
        self.bias = rows.log().masked_fill(~is_seen.any(-1, keepdim=True), 0)  # (m, m)
        identity = identity_gain * torch.eye(len(mass)).to(rows)
        self.gain = softmax_gain[:, None, None] * mass[:, None]  # (H, m, 1)
        self.offset = identity - center_gain[:, None, None] * mass[:, None] * rows  # (H, m, m)

    def __call__(self, logits: Tensor) -> Tensor:
        """Return A (..., H, m, m) for Y (..., H, m, m)."""
        weights = logits + self.bias
        # torch.softmax is several times slower on rows as short as these.
        weights = weights.sub_(weights.amax(-1, keepdim=True)).exp_()
        return weights.mul_(self.gain / weights.sum(-1, keepdim=True)).add_(self.offset)


def branch_step(
    skip: Tensor,
    root: Tensor,
    skip_gain: float,
    branch_gain: float,
    width: float,
    generator: torch.Generator | None,
    *,
    is_rotation: bool = False,
) -> Tensor:
    """Return a factor of the covariance after skip and branch are added, (42).

    The skip input has the covariance L L^T. The branch output is R W / sqrt(n) for a matrix W
    (m, n) of iid N(0, 1) entries; with ``is_rotation`` W has orthogonal rows instead, of length
    sqrt(n), in a direction drawn from the Haar measure.

    Args:
        skip: (..., m, m) L.
        root: (..., m, m) R, any root of the branch's covariance.
        skip_gain, branch_gain: weights.
        width: n, at least 2m; need not be whole.
        generator: of the draws.
        is_rotation: whether the branch ends in an orthogonal matrix.
    """
    tokens = skip.shape[-1]
    # W on the row space of the skip input, and across it.
    w = wishart_factor(skip.shape, width - tokens, skip, generator, columns=tokens)
    if is_rotation:
        w = torch.linalg.solve_triangular(lower_factor(w / math.sqrt(width)), w, upper=False)
    mixed = (branch_gain / math.sqrt(width) * root) @ w  # (..., m, 2m)
    mixed[..., :tokens].add_(skip, alpha=skip_gain)
    return lower_factor(mixed)


class WidthChain:
    """The Markov chain that V of a network of width n follows from layer to layer, exact in law.

    Without an output projection and with H > 1 heads the slices of X that the heads write to differ
    in covariance; the state then holds a factor for each slice, and V is the mean of their
    covariances. Needs a width of at least 2 m H there, and of 2 m otherwise.
    """

    def __init__(
        self, settings: FiniteNetwork, v0: Tensor, generator: torch.Generator | None
    ) -> None:
        self.settings, self.v0, self.generator = settings, v0, generator
        self.width, self.slices = settings.width, settings.slices
        self.shaped_matrix = ShapedMatrix(
            settings.zero_logit_attention(v0.shape[-1], v0),
            settings.identity_gain + settings.detuning.identity / self.width,
            settings.head_gains("softmax_gain", v0),
            settings.head_gains("center_gain", v0) - settings.detuning.softmax / self.width,
        )

    def start(self, paths: int) -> Tensor:
        """Return (paths, slices, m, m) factors; the frame of X in the n columns is Haar-random."""
        tokens = self.v0.shape[-1]
        factor = root_of(self.v0).expand(paths, 1, tokens, tokens)
        if self.slices == 1:
            return factor
        sizes = (paths, self.slices, tokens, tokens)
        parts = wishart_factor(sizes, self.width / self.slices, self.v0, self.generator)
        frame = lower_factor(parts.transpose(1, 2).flatten(2))[:, None]
        parts = torch.linalg.solve_triangular(frame.expand_as(parts), parts, upper=False)
        return lower_factor(math.sqrt(self.slices) * factor @ parts)

    def covariance(self, state: Tensor) -> Tensor:
        """Return (paths, m, m)."""
        return (state @ state.mT).mean(1)

    def step(self, state: Tensor, index: int) -> Tensor:
        """Return the factors after one block."""
        if self.settings.attention:
            state = self._attention(state)
        return self._mlp(state) if self.settings.mlp else state

    def _whole(self, state: Tensor) -> Tensor:
        """Return a factor of V, (paths, m, m)."""
        if self.slices == 1:
            return state[:, 0]
        return lower_factor(state.transpose(1, 2).flatten(2) / math.sqrt(self.slices))

    def _attention(self, state: Tensor) -> Tensor:
        settings, generator = self.settings, self.generator
        factor = self._whole(state)
        paths, tokens = factor.shape[:2]
        sizes = (paths, settings.heads, tokens, tokens)
        keys = gaussian_factor(sizes, settings.head_dim, factor, generator)
        queries = normal((*sizes[:3], keys.shape[-1]), factor, generator)
        raw = factor[:, None] @ (queries @ keys.mT) @ factor.mT[:, None]
        logits = settings.scale_value * raw  # (43)
        root = self.shaped_matrix(logits) @ factor[:, None]  # (paths, H, m, m)
        if self.slices == 1 and not (settings.heads == 1 and settings.out_proj != "gaussian"):
            # The output projection mixes what the heads' value projections made.
            slice_width = self.width // settings.heads
            values = gaussian_factor(sizes, slice_width, factor, generator)
            wide = (root @ values).transpose(1, 2).flatten(2) / math.sqrt(self.width)  # (45)
            root = lower_factor(wide)[:, None]
        is_rotation = settings.out_proj == "orthogonal" and settings.heads > 1
        return self._branch(state, root, is_rotation)

    def _mlp(self, state: Tensor) -> Tensor:
        settings = self.settings
        factor = self._whole(state)
        hidden = round(settings.mlp_ratio * self.width)
        slopes = [1 + c / math.sqrt(self.width) for c in (settings.c_plus, settings.c_minus)]
        correction = variance_correction(settings.c_plus, settings.c_minus, self.width)
        gram = torch.empty_like(factor)
        tokens = factor.shape[-1]
        rows = max(1, _HIDDEN_BYTES // (hidden * tokens * factor.element_size()))
        for part, found in zip(factor.split(rows), gram.split(rows), strict=True):
            x = part @ normal((len(part), tokens, hidden), factor, self.generator)
            x = slopes[0] * x.clamp(min=0) + slopes[1] * x.clamp(max=0)
            found.copy_(x @ x.mT)  # (47)
        root = root_of(correction / hidden * gram)[:, None]
        return self._branch(state, root.expand_as(state))

    def _branch(self, state: Tensor, root: Tensor, is_rotation: bool = False) -> Tensor:
        return branch_step(
            state,
            root,
            self.settings.detuned_skip_gain,
            self.settings.branch_gain,
            self.width / self.slices,
            self.generator,
            is_rotation=is_rotation,
        )


def root_of(v: Tensor) -> Tensor:
    """Return R with R R^T = V: the Cholesky factor, or the symmetric root where V is singular."""
    factor, info = torch.linalg.cholesky_ex(v)
    is_bad = info != 0
    if is_bad.any():
        values, vectors = torch.linalg.eigh(v.nan_to_num())
        symmetric = (vectors * values.clamp(min=0).sqrt()[..., None, :]) @ vectors.mT
        symmetric = torch.where(v.isfinite(), symmetric, torch.nan)
        factor = torch.where(is_bad[..., None, None], symmetric, factor)
    return factor
