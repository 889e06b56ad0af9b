"""Predicts the token covariance of deep networks, and measures it in networks of finite width."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..checks import fail
from ..sde import (
    Comparison,
    CovarianceSample,
    CovarianceSDE,
    FiniteNetwork,
    compare,
    equicorrelated,
)
from ..sde.comparison import plain as plain_data
from ..sde.paths import EIGENVALUE_RANGE
from ..sde.sample import LEVELS, quantile

CORRELATION, VARIANCE = "rho_12", "V_11"
LEVEL = 0.01  # probability of finding a difference between samples of one law

# Collapse is what plain networks are run for: nothing stops them below.
PLAIN_EIGENVALUE_RANGE = (0.0, 1e12)

OnProgress = Callable[[str, int, int], None]
Stop = Callable[[], bool]


@dataclass(frozen=True)
class CovarianceConfig:
    """What to predict and to run. The defaults take about ten seconds of one CPU core.

    Args:
        width, depth: of the networks; depth / width is the time of the prediction.
        tokens, correlation: number of tokens, from 2 to 9, and the correlation of any two at the
            start, where each has the variance 1.
        branch_gain, tau0: of each block, as in `shaped_attn.sde.FiniteNetwork`.
        paths: number of paths of the prediction.
        networks, plain_networks: number of networks with shaped and with plain attention.
        snapshots: number of depths to record.
        path_chunk, network_chunk, plain_chunk: how many to run at a time: what Ctrl-C may cost.

    Raises:
        ValueError: the number of tokens is out of its range.
    """

    width: int = 64
    depth: int = 64
    tokens: int = 4
    correlation: float = 0.2
    branch_gain: float = 0.5
    tau0: float = 1.0
    paths: int = 4096
    networks: int = 1024
    plain_networks: int = 128
    snapshots: int = 33
    path_chunk: int = 1024
    network_chunk: int = 128
    plain_chunk: int = 64

    def __post_init__(self) -> None:
        """Check the number of tokens."""
        if not 2 <= self.tokens <= 9:
            fail(
                ValueError,
                "tokens",
                "must be from 2 to 9, for the page to name rho_12 and V_11",
                self.tokens,
                "The default is 4.",
            )

    @property
    def time(self) -> float:
        """The last time of the prediction."""
        return self.depth / self.width

    def prediction(self) -> CovarianceSDE:
        """The process whose law the networks should have."""
        return CovarianceSDE(width=self.width, branch_gain=self.branch_gain, tau0=self.tau0)

    def network(self) -> FiniteNetwork:
        """Networks of shaped blocks."""
        return FiniteNetwork(
            width=self.width, depth=self.depth, branch_gain=self.branch_gain, tau0=self.tau0
        )

    def plain_network(self) -> FiniteNetwork:
        """The same networks with plain softmax attention at its usual temperature."""
        return FiniteNetwork(
            width=self.width,
            depth=self.depth,
            branch_gain=self.branch_gain,
            skip_gain=self.network().skip_gain,
            identity_gain=0.0,
            center_gain=0.0,
            scale="standard",
        )


@dataclass(frozen=True)
class CovarianceResult:
    """What `measure` found. After an interruption the samples are smaller, and may be empty.

    Attributes:
        config: what was asked for.
        seed: of all draws.
        device: where it ran.
        prediction: paths of the SDE.
        networks: networks of shaped blocks.
        plain: networks with plain attention.
        comparison: of prediction and networks at the last depth; None if one of them is empty.
        seconds: how long it took.
    """

    config: CovarianceConfig
    seed: int
    device: str
    prediction: CovarianceSample
    networks: CovarianceSample
    plain: CovarianceSample
    comparison: Comparison | None
    seconds: float

    @property
    def samples(self) -> dict[str, CovarianceSample]:
        """The three samples by name."""
        return {"prediction": self.prediction, "networks": self.networks, "plain": self.plain}

    @property
    def is_complete(self) -> bool:
        """Whether nothing was interrupted."""
        return all(sample.is_complete for sample in self.samples.values())

    @property
    def agrees(self) -> bool | None:
        """Whether no statistic tells the two apart; None if there are too few to do so."""
        if self.comparison is None or not self.comparison.can_disagree:
            return None
        return self.comparison.agrees

    def distance_from_one(self, name: str) -> tuple[float, ...] | None:
        """Quantiles of 1 - rho_12 at the last depth of one sample; None if it is empty.

        The smaller they are, the more parallel the tokens; rho_12 itself would be 1 after rounding.
        """
        sample = self.samples[name]
        if not sample.paths:
            return None
        return tuple(quantile(1 - sample.at(-1).correlations()[CORRELATION][0], LEVELS).tolist())

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; numbers that JSON lacks (NaN, infinity) become strings."""
        return plain_data(
            {
                "settings": {**asdict(self.config), "seed": self.seed, "device": self.device},
                "eigenvalue_range": {"shaped": EIGENVALUE_RANGE, "plain": PLAIN_EIGENVALUE_RANGE},
                "is_complete": self.is_complete,
                "agrees": self.agrees,
                "levels": LEVELS,
                **{name: _sample_data(sample) for name, sample in self.samples.items()},
                "final_one_minus_rho_12": {
                    name: self.distance_from_one(name) for name in self.samples
                },
                "comparison": self.comparison and self.comparison.to_dict(),
                "seconds": self.seconds,
            }
        )


def _sample_data(sample: CovarianceSample) -> dict[str, Any]:
    found: dict[str, Any] = {
        "source": sample.source,
        "paths": sample.paths,
        "requested": sample.requested,
        "times": sample.times.tolist(),
        "quantiles": {},
        "stopped": None,
    }
    if sample.paths:
        values, errors = sample.quantiles(), sample.quantile_errors()
        found["quantiles"] = {
            name: {"values": values[name].tolist(), "standard_errors": errors[name].tolist()}
            for name in (CORRELATION, VARIANCE)
        }
        found["stopped"] = sample.stopped_fraction()._asdict()
    return found


def measure(
    config: CovarianceConfig,
    *,
    device: torch.device | str = "cpu",
    seed: int = 0,
    on_progress: OnProgress | None = None,
    stop: Stop | None = None,
) -> CovarianceResult:
    """Predict the covariance over depth, run networks with plain and with shaped attention.

    Args:
        config: what to run.
        device: where.
        seed: of all draws.
        on_progress: called with what is being done, how much of it is, and how much there is.
        stop: asked between steps; if it returns True the result holds what there is.
    """
    begin = time.perf_counter()
    start = equicorrelated(config.tokens, config.correlation, device=device)
    generator = torch.Generator(device).manual_seed(seed)

    def options(phase: str, chunk: int) -> dict[str, Any]:
        def show(done: int, total: int) -> None:
            if on_progress is not None:
                on_progress(phase, done, total)

        return {
            "snapshots": config.snapshots,
            "chunk": chunk,
            "on_progress": show,
            "stop": stop,
        }

    prediction = config.prediction().sample(
        start,
        config.time,
        config.paths,
        # The process is a limit; with a step for each layer its chain is closest to the network.
        max(config.width, 2 * config.tokens),
        generator,
        **options("prediction", config.path_chunk),
    )
    # What takes longest comes last, so that whoever interrupts it has some of everything.
    plain = config.plain_network().sample(
        start,
        config.plain_networks,
        generator,
        eigenvalue_range=PLAIN_EIGENVALUE_RANGE,
        **options("plain networks", config.plain_chunk),
    )
    networks = config.network().sample(
        start, config.networks, generator, **options("shaped networks", config.network_chunk)
    )
    comparison = None
    if prediction.paths and networks.paths:
        comparison = compare(prediction, networks, LEVEL)
    return CovarianceResult(
        config=config,
        seed=seed,
        device=str(device),
        prediction=prediction,
        networks=networks,
        plain=plain,
        comparison=comparison,
        seconds=time.perf_counter() - begin,
    )
