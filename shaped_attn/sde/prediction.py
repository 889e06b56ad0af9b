"""What the covariance SDE predicts for a model, and how networks of that model compare with it."""

from __future__ import annotations

import reprlib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._version import __version__
from ..checks import check_int, check_number, check_size, fail
from ..nn.config import ModelConfig, model_of
from ..settings import documented, setting
from .comparison import Comparison, compare, critical_value
from .integrators import INTEGRATORS, Integrator
from .network import METHODS, FiniteNetwork
from .paths import EIGENVALUE_RANGE
from .process import CovarianceSDE
from .sample import (
    LEVELS,
    CovarianceSample,
    fraction,
    mean_correlation,
    plain,
    quantile,
    quantile_error,
    statistic_name,
)
from .settings import BlockSettings
from .start import check_covariance, equicorrelated
from .tuning import Tuning, check_band, tune

MEAN_CORRELATION = "mean_correlation"
LEVEL = 0.01
"""Probability that `compare_networks` finds a difference between samples of one law."""

OnProgress = Callable[[str, int, int], None]
Stop = Callable[[], bool]

_START = {"tokens": 4, "correlation": 0.2, "variance": 1.0}
_BAND_HALF_WIDTH = 0.05
_TUNING_PATHS = 1024
_CHUNK = {"cpu": 512}  # paths at a time: what an interruption may cost


def check_matrix(name: str, rows: Any) -> tuple[tuple[float, ...], ...]:
    """Return the rows of a square matrix of numbers."""
    is_matrix = isinstance(rows, list | tuple) and rows
    if not (is_matrix and all(isinstance(r, list | tuple) and len(r) == len(rows) for r in rows)):
        remedy = "Give the m x m covariance of the tokens, row by row."
        got = type(rows).__name__
        if is_matrix:
            lengths = [len(r) if isinstance(r, list | tuple) else type(r).__name__ for r in rows]
            got = f"{len(rows)} rows, of lengths {reprlib.repr(lengths)}"
        fail(ValueError, name, "must be a square matrix", got, remedy)
    return tuple(tuple(check_number(f"an entry of {name}", value) for value in row) for row in rows)


@documented
@dataclass(frozen=True, kw_only=True)
class Settings(ModelConfig):
    """A model that the covariance SDE describes, and how to simulate it.

    It is one of method "shaped", with skips, without normalisation, and with keys and values for
    each head. What ``gain_scheme`` does later, ``impl`` and ``deterministic`` have no effect.

    Raises:
        TypeError, ValueError: a value is of the wrong type or out of its range, or the model is
            another one.
    """

    tokens: int | None = setting(None, "Number of tokens at the start.", check_size, none="4")
    correlation: float | None = setting(
        None, "Correlation of any two tokens at the start.", none="0.2"
    )
    variance: float | None = setting(None, "Variance of each token at the start.", none="1")
    v0: tuple[tuple[float, ...], ...] | None = setting(
        None,
        "Their covariance instead of these three: its rows, or a .npy or .json file of them.",
        check_matrix,
    )
    causal: bool = setting(True, "Whether tokens see earlier ones only.")
    attention: bool = setting(True, "Whether blocks have attention.")
    mlp: bool = setting(True, "Whether blocks have an MLP.")
    finite_width: bool = setting(
        True,
        "Whether the width corrects the drift of the MLP (its c_n), the largest effect of a finite "
        "one, or enters as depth / width alone.",
        flags=("--finite-width/--limit",),
    )
    paths: int = setting(4096, "Number of paths of the SDE.", check_size)
    steps: int | None = setting(
        None,
        "Steps per unit of depth / width.",
        check_size,
        none="256, more at little depth, one a layer at most",
    )
    integrator: str = setting("chain", "Scheme of the SDE.", choices=tuple(INTEGRATORS))
    seed: int = setting(0, "Seed of all draws.", partial(check_int, low=0, high=2**63 - 1))
    band: tuple[float, float] | None = setting(
        None, "Least and largest median correlation to tune for.", none="0.05 around the start"
    )
    tune: bool = setting(True, "Whether to look for the branch gains and tau0 that keep it there.")
    networks: int = setting(1000, "Number of networks to compare with.", check_size)
    against: str = setting(
        "network",
        "Real networks, or the Markov chain that their covariance follows exactly.",
        choices=METHODS,
    )

    def __post_init__(self) -> None:
        """Check every field and fill in what follows from others."""
        super().__post_init__()
        self._check_model()
        self._fill_start()
        if self.band is not None:
            self._set("band", check_band(self.band, self.tokens))
        # What they refuse is found out here rather than after minutes.
        self._check_start()
        limit, scheme = self.sde().coefficients(self.tokens), self.scheme
        if self.steps is None:
            self._set("steps", scheme.default_steps(limit, self.time))
        scheme.count(limit, self.time, self.steps)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check_model(self) -> None:
        """Check that the model is one that the theory describes."""
        described = {
            "method": ("shaped",),
            "has_skip": (None, True),
            "has_normalization": (None, False),
            "kv_heads": (None, self.heads),
        }
        for name, values in described.items():
            if getattr(self, name) not in values:
                raise ValueError(
                    f"{name} must be {' or '.join(map(repr, values))} for a prediction, got "
                    f"{getattr(self, name)!r}. Its theory has blocks of 'shaped' with skips, of "
                    "which branch_gain 1 leaves nothing, without normalisation, and with keys and "
                    "values for each head."
                )

    def _check_start(self) -> None:
        start, (low, high) = self.start(), EIGENVALUE_RANGE
        check_covariance("v0", start)
        values = torch.linalg.eigvalsh(start)
        if values[0] < low or values[-1] > high:
            raise ValueError(
                f"{'correlation and variance' if self.v0 is None else 'v0'} must lead to "
                f"eigenvalues from {low:g} to {high:g}, where no path stops, got eigenvalues from "
                f"{float(values[0]):.3g} to {float(values[-1]):.3g}. Give tokens of another size, "
                "or that depend less on each other."
            )

    def _fill_start(self) -> None:
        if self.v0 is None:
            for name, value in _START.items():
                if getattr(self, name) is None:
                    self._set(name, value)
            return
        given = [name for name in ("correlation", "variance") if getattr(self, name) is not None]
        if self.tokens not in (None, len(self.v0)):
            given.insert(0, "tokens")
        if given:
            raise ValueError(
                "v0 must not be given beside tokens, correlation or variance, got "
                f"{' and '.join(given)}. Leave out one or the other: v0 is the whole start."
            )
        self._set("tokens", len(self.v0))

    @property
    def time(self) -> float:
        """The last time, depth / width."""
        return self.depth / self.width

    @property
    def scheme(self) -> Integrator:
        """The integrator itself."""
        return INTEGRATORS[self.integrator]

    @property
    def target_band(self) -> tuple[float, float]:
        """The band to tune for; needs 2 tokens."""
        if self.band is not None:
            return self.band
        rho = float(mean_correlation(self.start()))
        least = -1 / (self.tokens - 1)
        return max(least, rho - _BAND_HALF_WIDTH), min(1.0, rho + _BAND_HALF_WIDTH)

    def start(self, device: torch.device | str = "cpu") -> Tensor:
        """Return V0, (m, m) float64."""
        if self.v0 is not None:
            return torch.tensor(self.v0, dtype=torch.float64, device=device)
        return equicorrelated(self.tokens, self.correlation, self.variance, device=device)

    def sde(self) -> CovarianceSDE:
        """Return the process."""
        return CovarianceSDE(width=self.width if self.finite_width else None, **self._block())

    def network(self) -> FiniteNetwork:
        """Return the networks."""
        return FiniteNetwork(
            width=self.width, depth=self.depth, head_dim=self.head_dim, **self._block()
        )

    def _block(self) -> dict[str, Any]:
        names = {f.name for f in fields(BlockSettings)} & {f.name for f in fields(Settings)}
        return {"is_causal": self.causal, **{name: getattr(self, name) for name in names}}

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON: the model, which can be trained, and the other settings."""
        model = plain(model_of(self))
        others = {name: x for name, x in plain(asdict(self)).items() if name not in model}
        return {"model": model, "settings": others}


@dataclass(frozen=True)
class Prediction:
    """What `predict` returns.

    Attributes:
        settings: what was asked for.
        sample: the paths; not all of them after an interruption.
        tuning: which gains and tau0 keep the correlation in the band; None if it was not asked for,
            there is but one token, or an interruption came before.
        device: where it ran.
        seconds: how long it took.
    """

    settings: Settings
    sample: CovarianceSample
    tuning: Tuning | None
    device: str
    seconds: float

    @property
    def is_complete(self) -> bool:
        """Whether nothing was interrupted."""
        if not self.sample.is_complete:
            return False
        if self.tuning is None:
            return not _is_tunable(self.settings)
        return self.tuning.is_complete

    @property
    def recommended(self) -> dict[str, Any] | None:
        """The model with the branch gain nearest to its own that keeps the correlation in the band.

        If no branch gain does, it is the tau0. None if none is known either.
        """
        if self.tuning is None:
            return None
        model, (low, high) = model_of(self.settings), self.tuning.band
        if low <= float(mean_correlation(self.sample.final).quantile(0.5)) <= high:
            return model
        for interval in (self.tuning.branch_gain, self.tuning.tau0):
            if interval is not None and interval.is_found:
                name = interval.parameter
                low, high = (getattr(end.candidate, name) for end in (interval.low, interval.high))
                nearest = min(max(model[name], low), high)
                return model | {name: nearest, "skip_gain": None}
        return None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; numbers that JSON lacks (NaN, infinity) become strings."""
        found = _sample_data(self.sample, self.settings.width)
        tuning = self.tuning and self.tuning.to_dict()
        return _to_dict(self, recommended=self.recommended, tuning=tuning, **found)


@dataclass(frozen=True)
class NetworkComparison:
    """What `compare_networks` returns.

    Attributes:
        settings: what was asked for.
        prediction: the paths of the SDE.
        networks: the networks; None if an interruption came before.
        comparison: of the two at the last depth; None if one of them has no path.
        device: where it ran.
        seconds: how long it took.
    """

    settings: Settings
    prediction: CovarianceSample
    networks: CovarianceSample | None
    comparison: Comparison | None
    device: str
    seconds: float

    @property
    def is_complete(self) -> bool:
        """Whether nothing was interrupted."""
        return (
            self.prediction.is_complete and self.networks is not None and self.networks.is_complete
        )

    @property
    def agrees(self) -> bool | None:
        """Whether no statistic tells the two apart; None if too few paths are there to do so."""
        if self.comparison is None or not self.comparison.can_disagree:
            return None
        return self.comparison.agrees

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; numbers that JSON lacks (NaN, infinity) become strings."""
        width = self.settings.width
        return _to_dict(
            self,
            agrees=self.agrees,
            prediction=_sample_data(self.prediction, width),
            networks=self.networks and _sample_data(self.networks, width),
            comparison=self.comparison and self.comparison.to_dict(),
        )


def predict(
    settings: Settings,
    *,
    device: torch.device | str = "cpu",
    on_progress: OnProgress | None = None,
    stop: Stop | None = None,
) -> Prediction:
    """Simulate the SDE of a model and tune it.

    Args:
        settings: the model.
        device: where to run.
        on_progress: called with what is being done, how much of it is, and how much there is.
        stop: asked between steps; if it returns True the result holds what there is.
    """
    begin = time.perf_counter()
    sample = _sample_sde(settings, device, on_progress, stop)
    tuned = None
    if sample.is_complete and _is_tunable(settings):
        sde, scheme = settings.sde(), settings.scheme
        limit = sde.coefficients(settings.tokens)
        tuned = tune(
            sde,
            settings.start(device),
            time=settings.time,
            band=settings.target_band,
            paths=min(settings.paths, _TUNING_PATHS),
            steps=scheme.median_steps(limit, settings.time, settings.steps),
            seed=settings.seed,
            on_progress=_named("tuning", on_progress),
            stop=stop,
            integrator=scheme,
        )
    return Prediction(settings, sample, tuned, str(device), time.perf_counter() - begin)


def compare_networks(
    settings: Settings,
    *,
    device: torch.device | str = "cpu",
    on_progress: OnProgress | None = None,
    stop: Stop | None = None,
) -> NetworkComparison:
    """Simulate the SDE of a model and networks of it, and compare their laws at the last depth.

    Args:
        settings, device, on_progress, stop: as in `predict`.

    Raises:
        ValueError: there are too few networks to tell any two laws apart.
    """
    check_comparison(settings)
    begin = time.perf_counter()
    sample = _sample_sde(settings, device, on_progress, stop)
    networks = comparison = None
    if sample.is_complete:
        networks = settings.network().sample(
            settings.start(device),
            settings.networks,
            # Not the draws of the SDE, which for the chain may be the same ones.
            torch.Generator(device).manual_seed(settings.seed + 1),
            method=settings.against,
            on_progress=_named("networks", on_progress),
            stop=stop,
        )
        if networks.paths:
            comparison = compare(sample, networks, LEVEL)
    seconds = time.perf_counter() - begin
    return NetworkComparison(settings, sample, networks, comparison, str(device), seconds)


def check_comparison(settings: Settings) -> None:
    """Check what `compare_networks` needs beyond `predict`."""
    tokens = settings.tokens
    settings.network().check_tokens(tokens, settings.against)
    statistics = tokens * (tokens + 1) // 2
    if critical_value(LEVEL / statistics, settings.paths, settings.networks) >= 1:
        raise ValueError(
            "networks and paths must be enough to tell two laws apart, got "
            f"{settings.networks} and {settings.paths} for {statistics} statistics. Give more."
        )


def assumptions(settings: Settings) -> list[str]:
    """Say in plain words what a prediction rests on."""
    low, high = EIGENVALUE_RANGE
    found = [
        "Weights and gains at initialisation, no normalisation layers, no positions; "
        "V = X X^T / width of the tokens X.",
        "Skip weight sqrt(1 - branch_gain^2); logits divided by tau0 sqrt(width head_dim).",
        f"Start: {_start_text(settings)}.",
        f"A path stops where an eigenvalue of V leaves [{low:g}, {high:g}] (blow-up above, "
        "collapse below); it counts in the quantiles with its last V.",
    ]
    if settings.finite_width and settings.mlp:
        found.append(
            f"Width {settings.width} enters as depth / width and as the MLP's c_n; other effects "
            "of a finite width are left out."
        )
    else:
        found.append("The limit of depth and width at their ratio; width enters in no other way.")
    found.append(f"Integrator: {settings.scheme.description(settings.steps)}.")
    return found


def _start_text(settings: Settings) -> str:
    if settings.v0 is not None:
        return f"the given covariance, tokens: {settings.tokens}"
    if settings.tokens == 1:
        return f"one token of variance {settings.variance:g}"
    return (
        f"{settings.tokens} tokens of variance {settings.variance:g}, any two of correlation "
        f"{settings.correlation:g}"
    )


def statistics_of(sample: CovarianceSample) -> dict[str, Tensor]:
    """Return the statistics that are reported, each (K, paths).

    They are the mean correlation, the correlations of the first two, the last two, and the first
    and the last token, and the variances of the first and the last.
    """
    tokens = sample.tokens
    if tokens == 1:
        return sample.statistics()
    v = sample.covariances
    found = {MEAN_CORRELATION: mean_correlation(v)}
    for i, j in ((1, 2), (tokens - 1, tokens), (1, tokens)):
        scale = (v[..., i - 1, i - 1] * v[..., j - 1, j - 1]).rsqrt()
        found[statistic_name("rho", i, j, tokens)] = v[..., i - 1, j - 1] * scale
    for i in (1, tokens):
        found[statistic_name("V", i, i, tokens)] = v[..., i - 1, i - 1]
    return found


def _sample_data(sample: CovarianceSample, width: int) -> dict[str, Any]:
    found: dict[str, Any] = {
        "source": sample.source,
        "paths": sample.paths,
        "requested": sample.requested,
        "times": sample.times.tolist(),
        "layers": (sample.times * width).tolist(),
        "levels": list(LEVELS),
        "quantiles": {},
        "blow_up": None,
        "collapse": None,
    }
    if sample.paths:
        found["quantiles"] = {
            name: {
                "values": quantile(value, LEVELS).tolist(),
                "standard_errors": quantile_error(value, LEVELS).tolist(),
            }
            for name, value in statistics_of(sample).items()
        }
        found["blow_up"] = sample.exploded_fraction()._asdict()
        found["collapse"] = fraction(sample.collapsed)._asdict()
    return found


def _to_dict(result: Prediction | NetworkComparison, **found: Any) -> dict[str, Any]:
    """Return what was ``found`` as plain data, beside what any result says of itself."""
    return plain(
        {
            **result.settings.to_dict(),
            "time": result.settings.time,
            "is_complete": result.is_complete,
            **found,
            "assumptions": assumptions(result.settings),
            "versions": {"shaped_attn": __version__, "torch": torch.__version__},
            "device": result.device,
            "seconds": result.seconds,
        }
    )


def _is_tunable(settings: Settings) -> bool:
    return settings.tune and settings.tokens > 1


def _sample_sde(
    settings: Settings,
    device: torch.device | str,
    on_progress: OnProgress | None,
    stop: Stop | None,
) -> CovarianceSample:
    return settings.sde().sample(
        settings.start(device),
        settings.time,
        settings.paths,
        settings.steps,
        torch.Generator(device).manual_seed(settings.seed),
        integrator=settings.integrator,
        chunk=_CHUNK.get(torch.device(device).type, settings.paths),
        on_progress=_named("paths", on_progress),
        stop=stop,
    )


def _named(phase: str, on_progress: OnProgress | None) -> Callable[[int, int], None] | None:
    if on_progress is None:
        return None
    return lambda done, total: on_progress(phase, done, total)
