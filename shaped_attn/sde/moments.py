"""Drift and diffusion of the covariance SDE in closed form.

Equation numbers are those of covariance-sde.md. V is (..., m, m), symmetric and positive
semidefinite; ``rows`` is P0 (m, m); a row gain is the gain of the centred softmax of a row, beta.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..nn.activations import relu_excess
from .settings import BlockSettings, ZeroLogitAttention


def attention_drift(v: Tensor, rows: Tensor, squared_gain: Tensor, gain: Tensor) -> Tensor:
    """Return the drift of attention for branch gain 1 and tau0 = 1, in O(m^3).

    The equation, (15) with the traces of (17):

        mu_ij = V_ij tr(J_i V J_j V) + (1/2) ( V_ii (V s_i)_j + V_jj (V s_j)_i )

    Args:
        v: (..., m, m).
        rows: (m, m) P0.
        squared_gain: (m, m) beta_i beta_j, averaged over heads: the weight of the traces.
        gain: (m,) beta_i, averaged over heads: the weight of the s terms.
    """
    v_rows = v @ rows.mT  # (..., m, m)  (V p_i)_q in column i
    between = rows @ v_rows  # p_i V p_j
    mixed = rows @ v_rows.square()
    traces = rows @ v.square() @ rows.mT - mixed - mixed.mT + between.square()
    size = v.diagonal(dim1=-2, dim2=-1)  # (..., m)
    # r_i(q): squared distance of token q to the mean that token i sees, (9); i in rows.
    distance = size[..., None, :] - 2 * v_rows.mT + between.diagonal(dim1=-2, dim2=-1)[..., :, None]
    mean_distance = (rows * distance).sum(-1, keepdim=True)
    s = gain[:, None] * rows * (distance - mean_distance)  # (10)
    pull = size[..., :, None] * (s @ v)
    return squared_gain * v * traces + (pull + pull.mT) / 2


def mlp_drift(v: Tensor, c_plus: float, c_minus: float) -> Tensor:
    """Return the drift of the MLP for branch gain 1: nu(rho_ij) sqrt(V_ii V_jj), (28)."""
    i, j = torch.tril_indices(v.shape[-1], v.shape[-1], -1, device=v.device)
    size = v.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    scale = size[..., i] * size[..., j]
    rho = v[..., i, j] / scale.masked_fill(scale == 0, 1)
    rise = relu_excess(rho, c_plus, c_minus) * scale
    drift = torch.zeros_like(v)
    drift[..., i, j] = rise
    drift[..., j, i] = rise
    return drift


def linear_diffusion(v: Tensor) -> Tensor:
    """Return Sigma_lin_{ij,pq} = V_ip V_jq + V_iq V_jp, (..., m, m, m, m), (13)."""
    direct = torch.einsum("...ip,...jq->...ijpq", v, v)
    return direct + direct.transpose(-1, -2)


def attention_diffusion(v: Tensor, rows: Tensor, squared_gain: Tensor) -> Tensor:
    """Return the diffusion of the attention matrix for branch gain 1 and tau0 = 1, (14).

    The equation, with K^{uw} = V J_u V J_w V:

        V_ip K^{ip}_jq + V_iq K^{iq}_jp + V_jp K^{jp}_iq + V_jq K^{jq}_ip

    Args:
        v: (..., m, m).
        rows: (m, m) P0.
        squared_gain: (m, m) beta_u beta_w, averaged over heads.

    Returns:
        (..., m, m, m, m).
    """
    jacobian = torch.diag_embed(rows) - rows[:, :, None] * rows[:, None, :]  # (m, m, m)  u first
    left = torch.einsum("...ab,ubc->...uac", v, jacobian)  # V J_u
    kernel = torch.einsum("...uac,...cd,...wbd->...uwab", left, v, left)
    weighed = (squared_gain * v)[..., None, None] * kernel  # (..., u, w, a, b)
    first = weighed.transpose(-3, -2)  # V_ip K^{ip}_jq as (i, j, p, q)
    both_last = first + first.transpose(-1, -2)
    return both_last + both_last.transpose(-4, -3)


@dataclass(frozen=True, eq=False)
class Coefficients:
    """Drift and diffusion of the SDE of one block for m tokens.

    Attributes:
        block: the settings.
        width: of a target network, or None for the limit itself.
        zero_logit: P0 (m, m) and the row sums of A0 (m,).
        squared_gain: (m, m) beta_i beta_j, mean over heads.
        gain: (m,) beta_i, mean over heads.
        noise_gain: (m,) root of the mean of beta_i^2 over heads.
        kappa: coefficient of `linear_diffusion`, section 3.7.
        mlp_correction: factor of the drift of the MLP, c_n.
        drift_scale: gam^2 / tau0^2.
        noise_scale: gam^2 / (tau0 sqrt(H)).
    """

    block: BlockSettings
    width: int | None
    zero_logit: ZeroLogitAttention
    squared_gain: Tensor
    gain: Tensor
    noise_gain: Tensor
    kappa: float
    mlp_correction: float
    drift_scale: float
    noise_scale: float

    def drift(self, v: Tensor) -> Tensor:
        """Return mu(V), (..., m, m): (15), (28), (30), (35)."""
        block, (rows, mass) = self.block, self.zero_logit
        square = block.branch_gain**2
        drift = torch.zeros_like(v)
        if block.attention:
            pull = attention_drift(v, rows, self.squared_gain, self.gain)
            drift = drift + self.drift_scale * pull
            tuned = (block.detuning.identity, block.detuning.softmax)
            if any(tuned):
                identity, softmax = (gain * block.identity_gain for gain in tuned)
                # A prior whose rows do not sum to 1 multiplies the centre too.
                pulled = (mass[:, None] * rows) @ v
                drift = drift + square * (2 * identity * v + softmax * (pulled + pulled.mT))
        if block.mlp:
            rise = mlp_drift(v, block.c_plus, block.c_minus)
            drift = drift + square * self.mlp_correction * rise
        return drift + (block.attention + block.mlp) * block.detuning.variance * v

    def diffusion(self, v: Tensor) -> Tensor:
        """Return Sigma(V), (..., m, m, m, m): (33), (34)."""
        sigma = self.kappa * linear_diffusion(v)
        if self.block.attention:
            rows = self.zero_logit.rows
            sigma = sigma + self.noise_scale**2 * attention_diffusion(v, rows, self.squared_gain)
        return sigma
