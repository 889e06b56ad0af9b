"""The kernel of tokens over depth, with signal-preserving attention and without.

Sigma_l (T, T) holds the inner products of the tokens after layer l, divided by the width. At
initialisation, where logits are 0, attention is its prior A0, and every layer acts on the kernel
alone. `propagate` follows it, in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import check_choice, check_flag, check_number, check_size, fail
from ..nn.activations import Activation, activation_kernel, correlations
from ..nn.positions import rotary_table
from ..priors import ESPA, USPA, prior_matrix
from .start import check_covariance

POSITIONS = (None, "learned", "sinusoidal")
"""The embeddings of positions that `input_kernel` knows."""


@dataclass(frozen=True, eq=False)
class Propagation:
    """The kernel of the tokens by layer.

    Attributes:
        kernels: (layers + 1, T, T) float64, Sigma_0 first.
    """

    kernels: Tensor

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.kernels) - 1

    @property
    def tokens(self) -> int:
        """T."""
        return self.kernels.shape[-1]

    def correlations(self) -> Tensor:
        """Return Sigma_ij / sqrt(Sigma_ii Sigma_jj), (layers + 1, T, T)."""
        return correlations(self.kernels)

    def mean_correlation(self) -> Tensor:
        """Return the mean correlation of two different tokens, (layers + 1,); 1 is rank collapse.

        Raises:
            ValueError: there is one token.
        """
        i, j = torch.tril_indices(self.tokens, self.tokens, -1, device=self.kernels.device)
        if self.tokens < 2:
            fail(ValueError, "kernels", "must have at least two tokens", 1, "A pair takes two.")
        return self.correlations()[:, i, j].mean(-1)

    def effective_rank(self) -> Tensor:
        """Return exp(- sum_k p_k log p_k), (layers + 1,), from 1 (rank collapse) to T.

        p_k are the eigenvalues of the kernel divided by their sum.

        References:
            Roy and Vetterli, The effective rank: a measure of effective dimensionality, 2007.
        """
        values = torch.linalg.eigvalsh(self.kernels).clamp(min=0)  # round-off below 0
        share = values / values.sum(-1, keepdim=True)
        return torch.special.entr(share).sum(-1).exp()

    @torch.no_grad()
    def deviation(self, targets: Sequence[ESPA | USPA | Tensor]) -> Tensor:
        """Return by how much the kernel after each layer misses its target, at most, (layers,).

        Args:
            targets: one for each layer: a prior, for the kernel that leaves it, or a kernel (T, T).

        Raises:
            TypeError, ValueError: there is not one for each layer, or one is none of these.
        """
        if len(targets) != self.layers:
            rule = f"must have one for each of the {self.layers} layers"
            fail(ValueError, "targets", rule, len(targets), "A schedule of priors is one.")
        found = []
        for index, target in enumerate(targets):
            if isinstance(target, (ESPA, USPA)):
                target = target.kernel(self.tokens).to(self.kernels)
            else:
                target = _check_matrix(f"targets[{index}]", target, self.tokens)
            found.append((self.kernels[index + 1] - target).abs().max())
        return torch.stack(found)


@torch.no_grad()
def propagate(
    sigma0: Tensor,
    priors: Sequence[ESPA | USPA | Tensor | None],
    *,
    is_causal: bool = True,
    skip_gain: float = 0.0,
    branch_gain: float = 1.0,
    activation: Activation | None = None,
    mlp_skip_gain: float = 0.0,
    mlp_branch_gain: float = 1.0,
    has_normalization: bool = False,
) -> Propagation:
    """Return the kernel of the tokens after each layer of a network at initialisation.

    A layer is attention at zero logits and, with an activation phi, an MLP:

        attention   Sigma <- skip_gain^2 Sigma + branch_gain^2 A0 N(Sigma) A0^T
        MLP         Sigma <- mlp_skip_gain^2 Sigma + mlp_branch_gain^2 E[phi(u) phi(u)^T],
                                                                       u ~ N(0, N(Sigma))

    N(Sigma) is Sigma, or its correlations with normalisation before each branch. For priors that
    differ between heads A0 Sigma A0^T is the mean over heads.

    Skipless attention with orthogonal W_V and W_O does this exactly at any width, if its heads
    share one A0. Attention with skips and Gaussian weights of variance 1 / fan-in does it in the
    mean over the weights, in which the terms between skip and branch vanish. With MLPs or
    normalisation it is the limit of infinite width, for either law of the weights and no biases.

    Args:
        sigma0: (T, T) float64 or float32, symmetric and positive semidefinite: the kernel of the
            input, from `input_kernel` or any other.
        priors: A0 of each layer: `ESPA` or `USPA`; None for the uniform prior, which is plain
            softmax attention; or a matrix (T, T) or, one for each head, (H, T, T), such as the
            identity for Value-SkipInit.
        is_causal: whether token i sees token j <= i only; a matrix stays as it is. Default True.
        skip_gain: weight of the skip of attention. Default 0.0, none.
        branch_gain: weight of attention. Default 1.0.
        activation: of the MLP, as in `shaped_attn.nn.activations.activation_kernel`. Default None:
            no MLP.
        mlp_skip_gain: weight of the skip of the MLP. Default 0.0, none.
        mlp_branch_gain: weight of the MLP. Default 1.0.
        has_normalization: whether the input of each branch is normalised token by token, as by
            RMSNorm. Default False.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or range; the activation is
            not smooth enough.

    Example:
        >>> schedule = ESPA.schedule(36)
        >>> propagation = propagate(torch.eye(64), schedule)
        >>> float(propagation.deviation(schedule).max()) < 1e-12
        True

    References:
        He et al., Deep Transformers without Shortcuts, arXiv 2302.10322; papers.md (P7).
    """
    check_covariance("sigma0", sigma0, is_one=True)
    check_flag("is_causal", is_causal)
    check_flag("has_normalization", has_normalization)
    skip = check_number("skip_gain", skip_gain) ** 2
    branch = check_number("branch_gain", branch_gain) ** 2
    mlp_skip = check_number("mlp_skip_gain", mlp_skip_gain) ** 2
    mlp_branch = check_number("mlp_branch_gain", mlp_branch_gain) ** 2
    sigma = sigma0.to("cpu", torch.float64)
    kernels = [sigma]
    for index, prior in enumerate(priors):
        a = _matrix(f"priors[{index}]", prior, len(sigma), is_causal)
        x = correlations(sigma) if has_normalization else sigma
        sigma = skip * sigma + branch * (a @ x @ a.mT).mean(0)
        if activation is not None:
            x = correlations(sigma) if has_normalization else sigma
            sigma = mlp_skip * sigma + mlp_branch * activation_kernel(activation, x)
        kernels.append(sigma)
    return Propagation(torch.stack(kernels))


def input_kernel(
    ids: Tensor,
    *,
    positions: str | None = None,
    position_weight: float = 0.5,
    width: int = 512,
) -> Tensor:
    """Return the kernel of embedded tokens, (T, T) float64 with a unit diagonal.

    The equation, for embeddings of tokens and positions that are independent, with the weight w:

        Sigma_ij = (1 - w) 1{ids_i = ids_j} + w K_ij
        learned:        K_ij = 1{i = j}
        sinusoidal:     K_ij = (2 / width) sum_d cos((i - j) 10000^(-2 d / width))

    with d from 0 to width / 2 - 1. It is the mean kernel of (sqrt(1 - w) token + sqrt(w) position)
    at initialisation, each of unit variance: the embeddings of tokens, and of learned positions,
    are drawn independently of one another.

    Args:
        ids: (T,) integer tensor of tokens. Equal ones have the same embedding.
        positions: "learned", "sinusoidal" or None, the default: no positions, or rotary ones,
            which do not change the kernel.
        position_weight: w, from 0 to 1; only used with positions. Default 0.5.
        width: of the sinusoids, even. Default 512.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or range.

    References:
        Sinusoids: Vaswani et al., Attention Is All You Need, arXiv 1706.03762, section 3.5.
    """
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.is_complex():
        got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        fail(TypeError, "ids", "must be an integer Tensor", got, "Pass the numbers of the tokens.")
    if ids.ndim != 1 or len(ids) == 0:
        fail(ValueError, "ids", "must be (T,)", f"shape {tuple(ids.shape)}", "Pass one sequence.")
    check_choice("positions", positions, POSITIONS)
    weight = check_number("position_weight", position_weight, 0.0, 1.0)
    if check_size("width", width) % 2:
        fail(ValueError, "width", "must be even", width, "A sine and a cosine take two.")
    ids = ids.cpu()
    tokens = (ids[:, None] == ids).double()
    if positions is None:
        return tokens
    kernel = torch.eye(len(ids), dtype=torch.float64, device="cpu")
    if positions == "sinusoidal":
        table = torch.cat(rotary_table(len(ids), width, device="cpu", dtype=torch.float64), dim=1)
        kernel = table @ table.T * (2 / width)
    return (1 - weight) * tokens + weight * kernel


def _matrix(name: str, prior: object, tokens: int, is_causal: bool) -> Tensor:
    """Return A0, (H or 1, T, T)."""
    if prior is None:
        seen = torch.ones(tokens, tokens, dtype=torch.float64, device="cpu")
        seen = seen.tril() if is_causal else seen
        return (seen / seen.sum(-1, keepdim=True))[None]
    if isinstance(prior, (ESPA, USPA)):
        return prior_matrix(prior, tokens, is_causal=is_causal).cpu()
    matrix = _check_matrix(name, prior, tokens)
    return matrix if matrix.ndim == 3 else matrix[None]


def _check_matrix(name: str, matrix: object, tokens: int) -> Tensor:
    """Return a finite matrix, (T, T) or (H, T, T), in float64."""
    if not isinstance(matrix, Tensor) or not matrix.is_floating_point():
        rule, remedy = "must be ESPA, USPA or a floating Tensor", "None is the uniform prior."
        got = matrix.dtype if isinstance(matrix, Tensor) else type(matrix).__name__
        fail(TypeError, name, rule, got, remedy)
    if matrix.ndim not in (2, 3) or tuple(matrix.shape[-2:]) != (tokens, tokens):
        rule, got = f"must be (T, T) or (H, T, T) for T = {tokens}", f"shape {tuple(matrix.shape)}"
        fail(ValueError, name, rule, got, "It acts on the tokens of sigma0.")
    if not matrix.isfinite().all():
        fail(ValueError, name, "must be finite", "NaN or infinity in it", "Pass A0, not its log.")
    return matrix.to("cpu", torch.float64)
