"""Drift and diffusion of the covariance SDE in closed form.

Equation numbers are those of covariance-sde.md. V is (..., m, m), symmetric and positive
semidefinite; ``rows`` is P0 (m, m); a row gain is the gain of the centred softmax of a row, beta.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


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


def relu_excess(correlation: Tensor, c_plus: float, c_minus: float) -> Tensor:
    """Return nu(rho), the rate at which a shaped ReLU raises the covariance of two tokens.

    nu(rho) = ((c_plus - c_minus)^2 / (2 pi)) (sqrt(1 - rho^2) - rho arccos(rho)), (26).
    """
    rho = correlation.clamp(-1, 1)
    # Not 1 - rho^2, whose rounding is all that is left near rho = 1.
    rise = ((1 - rho) * (1 + rho)).sqrt() - rho * rho.arccos()
    return (c_plus - c_minus) ** 2 / (2 * math.pi) * rise


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


def linear_coefficient(
    branch_gain: float,
    *,
    attention: bool,
    mlp: bool,
    out_proj: str,
    mlp_ratio: float,
    attention_gain: float,
) -> float:
    """Return kappa, the coefficient of `linear_diffusion`, section 3.7.

    ``attention_gain`` is the branch gain of attention times its identity gain.
    """
    kappa = 0.0
    if attention:
        square = attention_gain**2
        kappa += 2 * square if out_proj == "gaussian" else square * (2 - square)
    if mlp:
        square = branch_gain**2
        kappa += square * (2 - square + square / mlp_ratio)
    return kappa


def detuning_drift(detuning: tuple[float, float], v: Tensor, zero_logit: Tensor) -> Tensor:
    """Return the drift of detuned attention gains for branch gain 1: 2 e1 V + e2 (A0 V + V A0^T).

    That is (35), where A0 is P0; a prior whose rows do not sum to 1 multiplies the centre too.
    """
    identity, softmax = detuning
    pulled = zero_logit @ v
    return 2 * identity * v + softmax * (pulled + pulled.mT)
