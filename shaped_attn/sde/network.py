"""Real networks of finite width, many at once, and the covariance of their tokens by layer."""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_choice, check_divides, check_positive, check_size, fail
from ..nn import Projection, ShapedBlock
from ..settings import documented, setting
from .chain import WidthChain, normal, root_of
from .paths import EIGENVALUE_RANGE, OnProgress, Stop, run
from .sample import CovarianceSample
from .settings import BlockSettings
from .start import check_start

METHODS = ("network", "chain")
SCALES = ("width", "standard")

_WEIGHT_BYTES = 2**26  # of one layer of all networks that run at a time
_CHAIN_PATHS = 1024


def _check_scale(name: str, value: Any) -> str | float:
    if isinstance(value, str):
        return check_choice(name, value, SCALES)
    return check_positive(name, value)


@documented
@dataclass(frozen=True, kw_only=True, eq=False)
class FiniteNetwork(BlockSettings):
    """Networks of `BlockSettings` with a width and a depth, at initialisation.

    Unlike `CovarianceSDE` it takes any gains and temperature, also those whose V has no limit:
    ``center_gain=0`` or ``scale="standard"`` show what shaping prevents.

    Raises:
        ValueError: heads do not divide the width, or an argument is out of its range.
    """

    width: int = setting(MISSING, "n.", check_size)
    depth: int = setting(MISSING, "Number of blocks.", check_size)
    head_dim: int | None = setting(
        None, "n_k, size of a head's queries and keys.", check_size, none="width / heads"
    )
    scale: str | float = setting(
        "width",
        'Of the logits q . k: "width" is 1 / (tau0 sqrt(n n_k)); "standard" is 1 / (tau0 '
        "sqrt(n_k)), the temperature without the width; or a number.",
        _check_scale,
    )

    def __post_init__(self) -> None:
        """Check the settings and fill in the size of a head."""
        super().__post_init__()
        check_divides("heads", self.heads, "width", self.width)
        if self.head_dim is None:
            self._set("head_dim", self.width // self.heads)
        if self.skip_gain**2 + self.detuning.variance / self.width < 0:
            rule = f"must be at least -skip_gain^2 * width = {-(self.skip_gain**2) * self.width:g}"
            remedy = "Give a larger width, or a smaller detuning."
            fail(ValueError, "detuning.variance", rule, f"{self.detuning.variance:g}", remedy)

    @property
    def scale_value(self) -> float:
        """The number that multiplies q . k for queries and keys of variance V."""
        if self.scale == "width":
            return 1 / (self.tau0 * math.sqrt(self.width * self.head_dim))
        if self.scale == "standard":
            return 1 / (self.tau0 * math.sqrt(self.head_dim))
        return float(self.scale)

    @property
    def detuned_skip_gain(self) -> float:
        """The weight of the skip path with ``detuning.variance``."""
        return math.sqrt(self.skip_gain**2 + self.detuning.variance / self.width)

    @property
    def detuned_center_gain(self) -> float | list[float]:
        """The weight of the centre with ``detuning.softmax``."""
        shift = self.detuning.softmax / self.width
        if isinstance(self.center_gain, tuple):
            return [gain - shift for gain in self.center_gain]
        return self.center_gain - shift

    def build_block(
        self, *, dtype: torch.dtype = torch.float32, device: torch.device | None = None
    ) -> ShapedBlock:
        """Return one block of these settings, initialised."""
        names = ("branch_gain", "attention", "mlp", "head_dim", "is_causal", "out_proj")
        names += ("softmax_gain", "mlp_ratio", "c_plus", "c_minus")
        block = ShapedBlock(
            self.width,
            self.heads,
            **{name: getattr(self, name) for name in names},
            skip_gain=self.detuned_skip_gain,
            preserves_variance=False,
            scale=self.scale_value,
            identity_gain=self.identity_gain + self.detuning.identity / self.width,
            center_gain=self.detuned_center_gain,
            dtype=dtype,
            device=device,
        )
        return block.requires_grad_(False)

    def visibility(self, networks: int, device: torch.device | None = None) -> dict[str, Tensor]:
        """Return padding and mask as `ShapedBlock` takes them, for a batch of networks."""
        found = {}
        for name in ("key_start", "key_end"):
            if (bound := getattr(self, name)) is not None:
                found[name] = torch.full((networks,), bound, device=device)
        if self.attn_mask is not None:
            found["attn_mask"] = self.attn_mask.to(device)
        return found

    def sample(
        self,
        v0: Tensor,
        networks: int = 4096,
        generator: torch.Generator | None = None,
        *,
        method: str = "network",
        dtype: torch.dtype = torch.float32,
        snapshots: int = 33,
        eigenvalue_range: tuple[float, float] = EIGENVALUE_RANGE,
        chunk: int | None = None,
        on_progress: OnProgress | None = None,
        stop: Stop | None = None,
    ) -> CovarianceSample:
        """Draw networks and record V = X X^T / n after some of their layers.

        Args:
            v0: (m, m) the covariance of the input, which X has exactly, in a random direction.
                float64 or float32, on the device that the networks run on.
            networks: number of networks. Default 4096.
            generator: of weights and inputs, on the device of v0. Default None: torch's own.
            method: "network" draws every weight and runs `shaped_attn.nn.ShapedBlock`; "chain" is
                the Markov chain that V of such a network follows, exact in law, whose cost does not
                grow with the width (linearly, if there is an MLP). Default "network".
            dtype: of the networks. V is computed in float64, the chain in the dtype of v0. Default
                float32.
            snapshots, eigenvalue_range, on_progress, stop: as in `CovarianceSDE.sample`, over
                layers.
            chunk: number of networks to run at a time. Default None: as many as have 64 MiB of
                weights in a layer, or 1024 for the chain.

        Returns:
            The covariances; their times are layer / width.

        Raises:
            TypeError, ValueError: as `CovarianceSDE.sample`; or the width is below m, for the
                chain below 2m for every head that writes to a slice of its own.
        """
        check_start(v0, eigenvalue_range, generator)
        check_size("networks", networks)
        check_choice("method", method, METHODS)
        self.check_tokens(v0.shape[-1], method)
        if method == "chain":
            simulation = WidthChain(self, v0, generator)
            chunk = _CHAIN_PATHS if chunk is None else chunk
        else:
            simulation = _Networks(self, v0, dtype, generator)
            if chunk is None:
                chunk = max(1, _WEIGHT_BYTES // simulation.weight_bytes)
        return run(
            simulation,
            source=method,
            paths=networks,
            steps=self.depth,
            time=self.depth / self.width,
            snapshots=snapshots,
            eigenvalue_range=eigenvalue_range,
            chunk=chunk,
            on_progress=on_progress,
            stop=stop,
        )

    def check_tokens(self, tokens: int, method: str) -> None:
        """Check that the width is enough for ``tokens`` tokens and the method of `sample`."""
        least, what = tokens, "networks"
        if method == "chain":
            least, what = 2 * tokens * self.slices, "the chain"
        if self.width < least:
            rule = f"must be at least {least} for {what} of {tokens} tokens"
            remedy = "Give a larger one, or fewer tokens; networks need the least."
            fail(ValueError, "width", rule, self.width, remedy)


class _Networks:
    """Many networks as one block whose weights have a leading dimension of networks.

    The weights are drawn again for each layer. The state is X, (networks, m, n).
    """

    def __init__(
        self,
        settings: FiniteNetwork,
        v0: Tensor,
        dtype: torch.dtype,
        generator: torch.Generator | None,
    ) -> None:
        if settings.prior is not None:
            rule = 'must be None for method="network"'
            fail(ValueError, "prior", rule, "a matrix", 'Use method="chain".')
        if not dtype.is_floating_point:
            fail(TypeError, "dtype", "must be a floating dtype", dtype, "Use torch.float32.")
        self.settings, self.v0, self.generator = settings, v0, generator
        self.block = settings.build_block(dtype=dtype, device=v0.device)
        self.dtype = dtype
        self.weights = {
            module: module.weight
            for module in self.block.modules()
            if isinstance(module, Projection)
        }
        self.weight_bytes = sum(w.numel() * w.element_size() for w in self.weights.values())

    def start(self, paths: int) -> Tensor:
        """Return sqrt(n) L Q with Q (m, n) of orthonormal rows, Haar-random: X X^T / n is V0."""
        settings, tokens = self.settings, self.v0.shape[-1]
        frame = normal((paths, settings.width, tokens), self.v0, self.generator)
        rows = torch.linalg.qr(frame).Q.mT
        self.stacks = {
            module: weight.new_empty(paths, *weight.shape)
            for module, weight in self.weights.items()
        }
        return (math.sqrt(settings.width) * root_of(self.v0) @ rows).to(self.dtype)

    def covariance(self, state: Tensor) -> Tensor:
        """Return X X^T / n, (networks, m, m), in float64."""
        x = state.double()
        return x @ x.mT / self.settings.width

    @torch.no_grad()
    def step(self, state: Tensor, index: int) -> Tensor:
        """Return X after a block with fresh weights."""
        networks = len(state)
        for module, stack in self.stacks.items():
            module.weight = nn.Parameter(stack[:networks], requires_grad=False)
        self.block.reset_parameters(self.generator)
        return self.block(state, **self.settings.visibility(networks, state.device))
