"""Priors A0: attention matrices at zero logits that keep the covariance of tokens on a schedule.

Token i and key j are counted from 1 in the equations, from 0 in the code. Equation numbers are
those of sde/covariance-sde.md. All arithmetic is in float64, and in logs where entries underflow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .arguments import Gain
from .checks import check_size, fail
from .validation import broadcasts, check_device, check_own_keys
from .visibility import Visibility

CACHED_TOKENS = 1024
"""Up to this length the dense matrix of an E-SPA without a mask is kept between calls."""


@dataclass(frozen=True)
class PriorTable:
    """A prior as every implementation takes it, in O(tokens) numbers for each head where it can.

    Attributes:
        form: what ``values`` holds.
        values: "dense": log A0, broadcastable to (H, T, S), -inf where a key is hidden.
            "geometric": (H, 5) log2 of the entry of the first token on the diagonal, of the others
            on the diagonal, of those one step off it in the first column and elsewhere, and by how
            much these two fall with each further step.
            "column": (H, 4, tokens) E_i, R_{i-1}, R_j and A_ii of (62).
    """

    form: str
    values: Tensor

    def log_rows(
        self, start: int, stop: int, keys: int, *, q_offset: int, key_start: Tensor | None
    ) -> Tensor:
        """Return log A0 of the queries ``start`` to ``stop`` and the first ``keys`` keys.

        (1 or B, 1 or H, queries, keys). Entries that a causal mask hides may be anything but NaN.
        Tokens count from ``key_start`` (B,), where there is one.
        """
        if self.form == "dense":
            part = self.values[(None,) * (3 - self.values.ndim)]
            part = part if part.shape[1] == 1 else part[:, start:stop]
            part = part if part.shape[2] == 1 else part[:, :, :keys]
            return part.expand(-1, stop - start, keys)[None]
        device = self.values.device
        query = torch.arange(q_offset + start, q_offset + stop, device=device)[None, None, :, None]
        key = torch.arange(keys, device=device)[None, None, None]
        if key_start is not None:
            first = key_start.clamp(min=0)[:, None, None, None]
            query, key = query - first, key - first
        return (self._geometric if self.form == "geometric" else self._column)(query, key)

    def _geometric(self, query: Tensor, key: Tensor) -> Tensor:
        corner, diagonal, first, other, fall = self.values.T[..., None, None]  # (H, 1, 1) each
        distance = (query - key).abs()
        on = torch.where(key == 0, corner, diagonal)
        off = torch.where(key == 0, first, other) - fall * (distance - 1)
        return math.log(2) * torch.where(distance == 0, on, off)

    def _column(self, query: Tensor, key: Tensor) -> Tensor:
        last = self.values.shape[-1] - 1
        row, above, column, diagonal = self.values.unbind(1)  # (H, tokens) each
        i, j = query.clamp(0, last), key.clamp(0, last)
        heads = torch.arange(len(row), device=row.device)[:, None, None]
        off = row[heads, i] + (column[heads, j] - above[heads, i])
        entries = torch.where(query == key, diagonal[heads, i], off)
        return torch.where(query >= key, entries, 1).log()


@dataclass(frozen=True, eq=False)
class ESPA:
    r"""E-SPA: the prior that takes the token kernel exp(-decay_in |i-j|) to exp(-decay_out |i-j|).

    With causal attention A0 = L_out L_in^{-1} for the Cholesky factors of the two kernels, in the
    closed form (49)-(54):

        A0_11 = 1,   A0_ii = a,   A0_i1 = f r^(i-2),   A0_ij = a (r - r_in) r^(i-j-1)
        r = exp(-decay_out),   r_in = exp(-decay_in),   a = sqrt((1 - r^2) / (1 - r_in^2)),
        f = r - a r_in

    Without a mask it is the product of symmetric roots, S_out^(1/2) S_in^(-1/2), which has no
    closed form and is built as a dense matrix.

    Args:
        decay_in: rate of the kernel that enters, for one layer or per head: a number from
            decay_out to infinity, or a Tensor of shape () or (H,), which gets a gradient.
            Infinity, the default, is the identity: tokens that do not correlate.
        decay_out: rate of the kernel that leaves, above 0. Default 0.005.

    Raises:
        TypeError, ValueError: a rate is not a number or a Tensor, or not in its range.

    References:
        He et al., Deep Transformers without Shortcuts, arXiv 2302.10322.
    """

    _PARAMETERS = ("decay_in", "decay_out")

    decay_in: Gain = math.inf
    decay_out: Gain = 0.005

    def __post_init__(self) -> None:
        """Check the rates, those that are numbers: the values of a Tensor are not looked at."""
        for name in self._PARAMETERS:
            _check_parameter("ESPA", name, getattr(self, name))
        low, high = self.decay_out, self.decay_in
        if not isinstance(low, Tensor) and not 0 < low < math.inf:
            fail(ValueError, "decay_out", "must be above 0 and finite", low, "Try 0.005.")
        if not isinstance(high, Tensor) and not high > 0:
            raise ValueError(f"decay_in must be above 0, got {high}. math.inf is the identity.")
        _check_order("ESPA", "decay_out", low, "decay_in", high)

    @staticmethod
    def schedule(layers: int, decay: float = 0.005) -> list[ESPA]:
        """Return a prior for each layer, from the identity to exp(-decay |i-j|).

        All layers have the same entry on the diagonal far from the first token, alpha^(1 / layers)
        with alpha = sqrt(1 - exp(-2 decay)): the rate after layer l is
        -log(1 - alpha^(2 l / layers)) / 2 (papers.md, section 3).
        """
        check_size("layers", layers)
        if not decay > 0:
            raise ValueError(f"decay must be above 0, got {decay}. The default is 0.005.")
        log_alpha = math.log(-math.expm1(-2 * decay)) / 2
        rates = [math.inf]
        # -expm1 and not 1 - exp, for a decay that is nearly its last value.
        rates += [
            -0.5 * math.log(-math.expm1(2 * layer / layers * log_alpha))
            for layer in range(1, layers)
        ]
        rates.append(decay)
        return [ESPA(a, b) for a, b in zip(rates[:-1], rates[1:], strict=True)]

    def kernel(self, tokens: int, *, entering: bool = False) -> Tensor:
        """Return the token kernel that leaves, or enters, (H or 1, tokens, tokens) float64."""
        rate = _parameter(self.decay_in if entering else self.decay_out, None)[:, None, None]
        index = torch.arange(tokens, device=rate.device)
        distance = (index[:, None] - index).abs()
        # inf * 0 is NaN.
        return torch.where(distance == 0, 1.0, torch.exp(-rate * distance.clamp(min=1)))

    def table(self, tokens: int, device: torch.device | None = None) -> PriorTable:
        """Return the prior of causal attention."""
        log_a, log_f, log_b, rate = self._logs(device)
        values = torch.stack((torch.zeros_like(log_a), log_a, log_f, log_b, rate), dim=-1)
        return PriorTable("geometric", values / math.log(2))

    def root_table(self, tokens: int, device: torch.device | None = None) -> PriorTable:
        """Return the prior without a mask."""
        is_fixed = not isinstance(self.decay_in, Tensor) and not isinstance(self.decay_out, Tensor)
        # A graph must not hold what another call computed.
        if is_fixed and tokens <= CACHED_TOKENS and not torch.compiler.is_compiling():
            return PriorTable("dense", _cached_roots(self, tokens, device))
        return PriorTable("dense", self._log_roots(tokens, device))

    def _log_roots(self, tokens: int, device: torch.device | None) -> Tensor:
        leaving = _symmetric_root(self.kernel(tokens).to(device))
        entering = _symmetric_root(self.kernel(tokens, entering=True).to(device))
        entries = torch.linalg.solve(entering, leaving, left=False)
        return entries.clamp(min=0).log()  # round-off below 0

    def _logs(self, device: torch.device | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return log a, log f, log(a (r - r_in)) and the rate, each (H or 1,), (49)-(51)."""
        g0, g = _parameters(self.decay_in, self.decay_out, device)
        is_identity = g0 == torch.inf
        finite = torch.where(is_identity, 1.0, g0)
        r0 = torch.where(is_identity, 0.0, torch.exp(-finite))
        r = torch.exp(-g)
        one_minus_r0_squared = torch.where(is_identity, 1.0, -torch.expm1(-2 * finite))
        a = (-torch.expm1(-2 * g) / one_minus_r0_squared).sqrt()
        dr = torch.where(is_identity, r, -r * torch.expm1(g - finite))
        one_minus_a = dr * (r + r0) / (one_minus_r0_squared * (1 + a))
        f = dr + one_minus_a * r0
        return a.log(), f.log(), (a * dr).log(), g


@dataclass(frozen=True, eq=False)
class USPA:
    r"""U-SPA: the prior that takes a uniform correlation of tokens from rho_in to rho_out.

    With causal attention A0 = L_out L_in^{-1} for the Cholesky factors of (1 - rho) I + rho 1 1^T,
    in the closed form (55)-(62), every term of which is positive. Without a mask (64):

        A0 = s I + ((t - s) / m) 1 1^T,   s^2 = (1 - rho_out) / (1 - rho_in),
        t^2 = (1 + (m - 1) rho_out) / (1 + (m - 1) rho_in)           for m tokens

    Args:
        rho_in: correlation that enters, from 0 to rho_out: a number, or a Tensor of shape () or
            (H,) without a gradient. Default 0.0: tokens that do not correlate.
        rho_out: correlation that leaves, below 1. Default 0.8.

    Raises:
        TypeError, ValueError: a correlation is not a number or a Tensor, or not in its range, or
            has a gradient.

    References:
        He et al., Deep Transformers without Shortcuts, arXiv 2302.10322.
    """

    _PARAMETERS = ("rho_in", "rho_out")

    rho_in: Gain = 0.0
    rho_out: Gain = 0.8

    def __post_init__(self) -> None:
        """Check the correlations, those that are numbers."""
        for name in self._PARAMETERS:
            value = getattr(self, name)
            _check_parameter("USPA", name, value)
            if isinstance(value, Tensor) and value.requires_grad:
                got = "a Tensor that requires a gradient"
                remedy = f"Pass {name}.detach(), or learn the rates of ESPA."
                fail(ValueError, name, "cannot be learned", got, remedy)
            if not isinstance(value, Tensor) and not 0 <= value < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {value}. Try 0.8.")
        _check_order("USPA", "rho_in", self.rho_in, "rho_out", self.rho_out)

    @staticmethod
    def schedule(layers: int, rho: float = 0.8) -> list[USPA]:
        """Return a prior for each layer, from uncorrelated tokens to the correlation ``rho``.

        The correlation after layer l is 1 - (1 - rho)^(l / layers) (papers.md, section 3).
        """
        check_size("layers", layers)
        if not 0 < rho < 1:
            raise ValueError(f"rho must be between 0 and 1, got {rho}. The default is 0.8.")
        values = [-math.expm1(layer / layers * math.log1p(-rho)) for layer in range(layers)]
        values.append(rho)
        return [USPA(a, b) for a, b in zip(values[:-1], values[1:], strict=True)]

    def kernel(self, tokens: int, *, entering: bool = False) -> Tensor:
        """Return the token kernel that leaves, or enters, (H or 1, tokens, tokens) float64."""
        rho = _parameter(self.rho_in if entering else self.rho_out, None)[:, None, None]
        return (1 - rho) * torch.eye(tokens, device=rho.device, dtype=torch.float64) + rho

    def table(self, tokens: int, device: torch.device | None = None) -> PriorTable:
        """Return the prior of causal attention."""
        return PriorTable("column", torch.stack(self._vectors(tokens, device), dim=1))

    def root_table(self, tokens: int, device: torch.device | None = None) -> PriorTable:
        """Return the prior without a mask."""
        on, off = (x.log2() for x in self._root_entries(tokens, device))
        return PriorTable("geometric", torch.stack((on, on, off, off, torch.zeros_like(on)), -1))

    def _vectors(self, tokens: int, device: torch.device | None) -> tuple[Tensor, ...]:
        """Return E_i, R_{i-1}, R_j and A_ii of (62), each (H or 1, tokens) float64."""
        rho0, rho = _parameters(self.rho_in, self.rho_out, device)
        rho0, rho = rho0[:, None], rho[:, None]
        i = torch.arange(1, tokens + 1, device=rho.device, dtype=torch.float64)

        def q(x: Tensor, j: Tensor) -> Tensor:
            return 1 + j * x

        def diagonal_root(x: Tensor) -> Tensor:
            return ((1 - x) * q(x, i - 1) / q(x, i - 2)).sqrt()  # (55)

        # q(x, -1) = 1 - x at i = 1.
        d, d0 = diagonal_root(rho), diagonal_root(rho0)
        c = rho * ((1 - rho) / (q(rho, i - 1) * q(rho, i - 2))).sqrt()  # (56)
        y = 2 * (rho - rho0) / (q(rho, i) * q(rho0, i - 2))  # (57)
        x = q(rho, i - 2) * q(rho0, i) / (q(rho, i) * q(rho0, i - 2))
        delta = c / d0 * y / (1 + x.sqrt())  # (58)
        column = delta.flip(-1).cumsum(-1).flip(-1)  # (59) R_j
        above = torch.cat((torch.zeros_like(column[:, :1]), column[:, :-1]), dim=-1)  # R_{i-1}
        w, w0 = (q(z, i - 3) * q(z, i - 1) for z in (rho, rho0))  # (60)
        size = rho0 + rho * (w0 / w).clamp(min=0).sqrt()
        size = torch.where(size == 0, 1.0, size)
        change = (rho - rho0) * (rho + rho0 + (2 * i - 4) * rho * rho0)
        row = d / d0 * change / (w * q(rho0, i - 2) * size)  # (61)
        row = torch.where(i < 2, 0.0, row)
        return row, above, column, d / d0

    def _root_entries(self, tokens: int, device: torch.device | None) -> tuple[Tensor, Tensor]:
        """Return the entries of (64) on and off the diagonal, each (H or 1,) float64."""
        rho0, rho = _parameters(self.rho_in, self.rho_out, device)
        m = max(1, tokens)
        s = ((1 - rho) / (1 - rho0)).sqrt()
        t_squared = (1 + (m - 1) * rho) / (1 + (m - 1) * rho0)
        # t - s without cancellation where rho is near rho0.
        gap = m * (rho - rho0) / ((1 + (m - 1) * rho0) * (1 - rho0))
        other = gap / (t_squared.sqrt() + s) / m
        return s + other, other


def resolve_prior(
    prior: ESPA | USPA | Tensor | None,
    q: Tensor,
    k: Tensor,
    visibility: Visibility,
) -> PriorTable | None:
    """Check the ``prior`` of `shaped_attention` and return its table; None is the uniform prior."""
    if prior is None:
        return None
    q_offset, key_start, key_end = visibility.q_offset, visibility.key_start, visibility.key_end
    heads, keys = q.shape[1], k.shape[2]
    if isinstance(prior, Tensor):
        return check_table(PriorTable("dense", prior), q, k)
    if not isinstance(prior, (ESPA, USPA)):
        rule = (
            "must be None (uniform), an ESPA, a USPA or a Tensor with the log of the prior matrix"
        )
        fail(TypeError, "prior", rule, type(prior).__name__, "Leave it out for the uniform prior.")
    for name in prior._PARAMETERS:  # not vars, which torch 2.11 cannot compile
        value = getattr(prior, name)
        if isinstance(value, Tensor) and value.ndim == 1 and value.shape[0] not in (1, heads):
            rule = f"as a Tensor must have shape () or (H,) = ({heads},)"
            got, remedy = f"shape ({len(value)},)", "Give one value, or one value per query head."
            fail(ValueError, f"prior.{name}", rule, got, remedy)
    check_own_keys("prior", "Choose q_offset between 0 and S - T.", q, k, q_offset)
    if visibility.is_causal:
        return prior.table(keys, q.device)
    if key_start is not None or key_end is not None:
        rule = (
            "without a causal mask depends on the number of tokens, so key_start and key_end must "
            "be None"
        )
        got = "key_start" if key_start is not None else "key_end"
        remedy = "Use is_causal=True, sequences of one length, or a prior for each as a Tensor."
        fail(ValueError, "prior", rule, got, remedy)
    table = prior.root_table(keys, q.device)
    if table.form == "dense":
        return PriorTable("dense", table.values[:, q_offset : q_offset + q.shape[2]])
    return table


def check_table(table: PriorTable, q: Tensor, k: Tensor) -> PriorTable:
    """Check the values of a table against the main arguments."""
    heads, queries, keys = q.shape[1], q.shape[2], k.shape[2]
    values = table.values
    wanted = {
        "dense": (heads, queries, keys),
        "geometric": (heads, 5),
        "column": (heads, 4, values.shape[-1] if values.ndim else 0),
    }.get(table.form)
    if wanted is None:
        rule = 'must be "dense", "geometric" or "column"'
        remedy = "Pass prior to shaped_attention, which chooses it."
        fail(ValueError, "prior_form", rule, repr(table.form), remedy)
    if not values.is_floating_point():
        remedy = "Pass the natural logarithm of the prior weights, -inf for weight 0."
        fail(TypeError, "prior", "as a Tensor must have a floating dtype", values.dtype, remedy)
    is_dense, shape = table.form == "dense", tuple(values.shape)
    if not broadcasts(shape, wanted) or (len(shape) < len(wanted) and not is_dense):
        rule = f'of form "{table.form}" must have shape'
        if is_dense:
            rule = "as a Tensor must broadcast to (H, T, S) ="
        remedy = "A prior shared by all heads is (T, S)."
        fail(ValueError, "prior", f"{rule} {wanted}", f"shape {shape}", remedy)
    check_device("prior", values, q)
    return table


def check_learnable(table: PriorTable) -> None:
    """Check that the kernels have a gradient of this table."""
    if table.form != "geometric":
        rule = "cannot be learned with impl='triton', but for an ESPA under a causal mask"
        got = f"a {table.form} prior that requires a gradient"
        fail(ValueError, "prior", rule, got, "Pass impl='torch', or detach it.")


def prior_matrix(prior: ESPA | USPA, tokens: int, *, is_causal: bool = True) -> Tensor:
    """Return A0 written out, (H or 1, tokens, tokens) float64: to look at, and for other tools.

    Args:
        prior: `ESPA` or `USPA`.
        tokens: T.
        is_causal: whether token i sees token j <= i only. Default True.
    """
    table = prior.table(tokens) if is_causal else prior.root_table(tokens)
    matrix = table.log_rows(0, tokens, tokens, q_offset=0, key_start=None)[0].exp()
    return matrix.tril() if is_causal else matrix


def _parameter(value: Gain, device: torch.device | None) -> Tensor:
    """Return a parameter as (H or 1,) float64."""
    if isinstance(value, Tensor):
        return value.to(device, torch.float64).reshape(-1)
    # Unlike a copy of a number, it does not wait for the device.
    return torch.full((1,), float(value), dtype=torch.float64, device=device)


def _parameters(first: Gain, second: Gain, device: torch.device | None) -> tuple[Tensor, ...]:
    return torch.broadcast_tensors(_parameter(first, device), _parameter(second, device))


def _check_parameter(prior: str, name: str, value: object) -> None:
    if isinstance(value, Tensor):
        if not value.is_floating_point() or value.ndim > 1:
            rule = "as a Tensor must be floating and of shape () or (H,)"
            got = f"{value.dtype}, shape {tuple(value.shape)}"
            remedy = "Give one value, or one for each head."
            fail(TypeError, f"{name} of {prior}", rule, got, remedy)
    elif isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
        got = f"{value!r} of type {type(value).__name__}"
        remedy = "Pass a float, or a Tensor with one value for each head."
        fail(TypeError, f"{name} of {prior}", "must be a number or a Tensor", got, remedy)


def _check_order(prior: str, low_name: str, low: Gain, high_name: str, high: Gain) -> None:
    if not isinstance(low, Tensor) and not isinstance(high, Tensor) and high < low:
        rule = f"must be at least {low_name} = {low:g}, or entries of the prior are negative"
        remedy = f"Correlations of tokens can only grow; see {prior}.schedule."
        fail(ValueError, high_name, rule, f"{high:g}", remedy)


_cache: dict[tuple, Tensor] = {}


def _cached_roots(prior: ESPA, tokens: int, device: torch.device | None) -> Tensor:
    """Return the log of the prior without a mask, of fixed rates; the last 128 are kept."""
    key = (prior.decay_in, prior.decay_out, tokens, str(device))
    found = _cache.pop(key, None)
    if found is None:
        # The first call may be for inference, a later one for training.
        with torch.inference_mode(False), torch.no_grad():
            found = prior._log_roots(tokens, device)
    if type(found) is Tensor:  # not a fake one
        _cache[key] = found
        if len(_cache) > 128:
            del _cache[next(iter(_cache))]
    return found


def _symmetric_root(kernel: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(kernel)
    return (vectors * values.clamp(min=0).sqrt()[..., None, :]) @ vectors.mT
