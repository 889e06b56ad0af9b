"""What every family of kernels is given and leaves, and who allocates it.

A family is a member of `FAMILIES` and a result of `pick_family`. It gets tensors that are checked,
padded and allocated, launches, and returns nothing but the sums over rows and batch entries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch

from . import launch
from .columns import pad_columns, trim_columns
from .configs import TileConfig, pick_config
from .families import chosen_family, pick_family, triton_release
from .priors import UNIFORM, Prior

if TYPE_CHECKING:
    from ..visibility import Visibility

Gain = float | torch.Tensor


class Call(NamedTuple):
    """The arguments of one call, with D and Dv padded to multiples of 8.

    q (B, H, T, D), k (B, Hkv, S, D), v (B, Hkv, S, Dv) of one dtype: float16, bfloat16 or float32;
    residual (B, H, T, Dv) or None, of that dtype or a wider one. gains: identity, softmax, center,
    skip and branch gain and scale, each a number or a Tensor of shape () or (H,). prior_parameters:
    as its `Prior` takes them.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    residual: torch.Tensor | None
    gains: tuple[Gain, ...]
    visibility: Visibility
    prior: Prior = UNIFORM
    prior_parameters: tuple | None = None

    @property
    def is_centered(self) -> bool:
        """Whether the centre takes part: only a fixed gain of zero leaves it out."""
        return isinstance(self.gains[2], torch.Tensor) or self.gains[2] != 0.0

    @property
    def has_identity(self) -> bool:
        """Whether the identity term takes part."""
        return isinstance(self.gains[0], torch.Tensor) or self.gains[0] != 0.0

    @property
    def weighed_by(self) -> str | None:
        """What weighs the keys of a row one by one, "prior" or "mask", if anything does."""
        if not self.prior.is_uniform:
            return "prior"
        return None if self.visibility.attn_mask is None else "mask"

    def config(self, kernel: str) -> TileConfig:
        """Launch configuration of one of the portable kernels."""
        return pick_config(
            kernel,
            self.q.shape[3],
            self.v.shape[3],
            self.q.element_size(),
            launch.architecture(self.q),
            weighed_by=self.weighed_by,
            is_centered=self.is_centered,
        )


class ForwardResult(NamedTuple):
    """What a forward leaves, all contiguous.

    out (B, H, T, Dv), in the dtype of the residual, or of q without one, and lse (B, H, T) float32
    are the results. The others are for the backward, None to a family and empty in the end unless
    saved, and their Dv is padded: excess (B, H, T, Dv), dtype of q, is the centred softmax part Z,
    or the softmax part itself when nothing is centred, in float32 if it has a prior; center
    (B, H, T, Dv) float32 is the centre, kept only where a mask or a prior weighs the keys;
    row_stats (2, B, H, T) float32 holds m + log2 l of (6) and the sum of weights (n, or D of a
    prior).
    """

    out: torch.Tensor
    lse: torch.Tensor
    excess: torch.Tensor | None
    center: torch.Tensor | None
    row_stats: torch.Tensor | None


class AttentionGradients(NamedTuple):
    """Contiguous gradients in the dtypes of their inputs; the last four are None if not asked for.

    q, k, v and residual are allocated for the family, which returns the others, sums over rows and
    batch entries: gains (5, H) float32, of the identity, softmax, center, skip and branch gain of
    each head; scale (H,) float32; prior (H, entries) float32, of the table of its prior.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    residual: torch.Tensor | None
    gains: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    prior: torch.Tensor | None = None


class Needs(NamedTuple):
    """Which gradients a backward is asked for, beside those of q, k and v."""

    residual: bool = False
    gains: bool = False
    scale: bool = False
    prior: bool = False


class Family(NamedTuple):
    """Plans of one family of kernels: what one signature of calls fixes, built once for it.

    forward(call, saves) returns a plan, saves telling whether the backward's tensors are filled;
    plan(call, result) launches and fills `result`. backward(call, d_out, needs, is_deterministic)
    returns a plan; plan(call, saved, d_out, d_lse, gradients) fills the allocated `gradients` and
    returns them with the sums. No size is 0.
    """

    forward: Callable[[Call, bool], Callable[[Call, ForwardResult], None]]
    backward: Callable[[Call, torch.Tensor, Needs, bool], Callable[..., AttentionGradients]]


def _portable() -> Family:
    from .attention_bwd import BackwardPlan
    from .attention_fwd import ForwardPlan

    return Family(ForwardPlan, BackwardPlan)


def _hopper() -> Family:
    from .hopper.attention_bwd import BackwardPlan
    from .hopper.attention_fwd import ForwardPlan

    return Family(ForwardPlan, BackwardPlan)


# Imported when a call asks for one: Gluon is not everywhere.
FAMILIES: dict[str, Callable[[], Family]] = {"portable": _portable, "hopper": _hopper}


def _family_of(call: Call) -> Family:
    q, k, v = call[:3]
    name = pick_family(
        launch.architecture(q),
        q.dtype,
        q.shape[3],
        v.shape[3],
        weighed_by=call.weighed_by,
        rows=q.shape[0] * q.shape[1] * q.shape[2],
        group=q.shape[1] // k.shape[1],
        fits_tma=all(launch.fits_tma(x) for x in (q, k, v)),
        release=triton_release(),
        choice=chosen_family(),
    )
    return FAMILIES[name]()


def _forward_plan(call: Call, saves: bool) -> Callable[[Call, ForwardResult], None]:
    return _family_of(call).forward(call, saves)


def _backward_plan(
    call: Call, d_out: torch.Tensor, needs: Needs, is_deterministic: bool
) -> Callable[..., AttentionGradients]:
    return _family_of(call).backward(call, d_out, needs, is_deterministic)


def _empty(like: torch.Tensor, shape: tuple[int, ...], dtype=torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)


def attention_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    residual: torch.Tensor | None,
    gains: tuple[Gain, ...],
    visibility: Visibility,
    *,
    save_for_backward: bool,
    prior: Prior = UNIFORM,
    prior_parameters: tuple | None = None,
) -> ForwardResult:
    """Allocate the results of a call and let its family fill them.

    Arguments as in `Call`, of any head dimension, taken as already checked.
    """
    value_dim = v.shape[3]
    q, k, v, residual = (pad_columns(x) for x in (q, k, v, residual))
    call = Call(q, k, v, residual, gains, visibility, prior, prior_parameters)
    rows, value_rows = q.shape[:3], (*q.shape[:3], v.shape[3])
    out = _empty(q, value_rows, q.dtype if residual is None else residual.dtype)
    lse = _empty(q, rows)
    excess = center = row_stats = None
    if save_for_backward:
        # Under a prior near the identity the softmax part is nearly v_p(i), and (13) a difference.
        is_whole = call.weighed_by == "prior" and not call.is_centered
        excess = _empty(q, value_rows, torch.float32 if is_whole else q.dtype)
        row_stats = _empty(q, (2, *rows))
        if call.is_centered and call.weighed_by is not None:
            center = _empty(q, value_rows)
    if out.numel() > 0:
        with launch.on_device(q):
            plan = launch.plan_of(_forward_plan, call, (save_for_backward,))
            plan(call, ForwardResult(out, lse, excess, center, row_stats))
    return ForwardResult(
        trim_columns(out, value_dim),
        lse,
        _empty(q, (0,), q.dtype) if excess is None else excess,
        _empty(q, (0,)) if center is None else center,
        _empty(q, (0,)) if row_stats is None else row_stats,
    )


def attention_bwd(
    d_out: torch.Tensor,
    d_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    residual: torch.Tensor | None,
    gains: tuple[Gain, ...],
    visibility: Visibility,
    excess: torch.Tensor,
    center: torch.Tensor,
    row_stats: torch.Tensor,
    *,
    needs: Needs,
    is_deterministic: bool = True,
    prior: Prior = UNIFORM,
    prior_parameters: tuple | None = None,
) -> AttentionGradients:
    """Allocate the gradients of a call and let its family fill them.

    d_out (B, H, T, Dv) and d_lse (B, H, T) are the gradients of out and lse; excess, center and
    row_stats those of the `ForwardResult` of the same arguments with save_for_backward=True.
    Unless is_deterministic, a family may add up in an order that varies from call to call.
    """
    if q.shape[0] == 0 or q.shape[2] == 0 or k.shape[2] == 0:
        return _gradients_of_nothing(d_out, q, k, v, residual, gains, needs, prior)
    head_dim, value_dim = q.shape[3], v.shape[3]
    d_out, q, k, v, residual = (pad_columns(x) for x in (d_out, q, k, v, residual))
    call = Call(q, k, v, residual, gains, visibility, prior, prior_parameters)
    gradients = AttentionGradients(
        *(_empty(x, x.shape, x.dtype) for x in (q, k, v)),
        _empty(q, d_out.shape, d_out.dtype) if needs.residual else None,
    )
    keeps_center = call.is_centered and call.weighed_by is not None
    saved = ForwardResult(None, None, excess, center if keeps_center else None, row_stats)
    d_lse = None if d_lse is None else d_lse.contiguous()
    with launch.on_device(q):
        plan = launch.plan_of(
            _backward_plan, call, (d_out, needs, is_deterministic), saved, d_lse
        )
        gradients = plan(call, saved, d_out, d_lse, gradients)
    return gradients._replace(
        q=trim_columns(gradients.q, head_dim),
        k=trim_columns(gradients.k, head_dim),
        v=trim_columns(gradients.v, value_dim),
        residual=trim_columns(gradients.residual, value_dim),
    )


def _gradients_of_nothing(d_out, q, k, v, residual, gains, needs, prior) -> AttentionGradients:
    """Gradients when there is no query, no key or no batch entry: only the residual has a part."""
    heads = d_out.shape[1]
    d_residual = d_gains = d_scale = d_prior = None
    if needs.residual:
        skip = gains[3]
        if isinstance(skip, torch.Tensor):
            skip = skip.float().reshape(-1, 1, 1)
        d_residual = (skip * d_out).to(d_out.dtype)
    if needs.gains:
        d_gains = _empty(d_out, (5, heads)).zero_()
        if residual is not None:
            d_gains[3] = (d_out.float() * residual.float()).sum((0, 2, 3))
    if needs.scale:
        d_scale = _empty(d_out, (heads,)).zero_()
    if needs.prior:
        d_prior = _empty(d_out, (heads, prior.entries)).zero_()
    zeros = (_empty(x, x.shape, x.dtype).zero_() for x in (q, k, v))
    return AttentionGradients(*zeros, d_residual, d_gains, d_scale, d_prior)
