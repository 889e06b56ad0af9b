"""What the covariance SDE predicts for a model, and how networks of that model compare with it."""

from __future__ import annotations

import json
import math
import reprlib
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import config_file
from .._version import __version__
from ..checks import check_divides, check_number, check_size, fail
from . import tuning as sde_tuning
from .comparison import Comparison, compare, critical_value, plain
from .paths import EIGENVALUE_RANGE
from .process import INTEGRATORS, CovarianceSDE, check_start, equicorrelated
from .sample import LEVELS, CovarianceSample, Estimate, fraction, quantile, quantile_error
from .settings import OUT_PROJ
from .tuning import Candidate, End, Interval, Tuning, mean_correlation, tune

if TYPE_CHECKING:
    from .network import FiniteNetwork

MEAN_CORRELATION = "mean_correlation"
METHODS = ("network", "chain")
LEVEL = 0.01
"""Probability that `compare_networks` finds a difference between samples of one law."""

OnProgress = Callable[[str, int, int], None]
Stop = Callable[[], bool]

_START = {"tokens": 4, "correlation": 0.2, "variance": 1.0}
_BAND_HALF_WIDTH = 0.05
_STEPS, _LEAST_TOTAL_STEPS = 256, 64
_TUNING_PATHS, _TUNING_STEPS, _LEAST_TUNING_STEPS = 1024, 64, 16
_CHUNK = {"cpu": 512}  # paths at a time: what an interruption may cost
_ROWS = 4  # of the table, beside the start

_COUNTS = ("depth", "width", "tokens", "heads", "paths", "steps", "networks", "head_dim")
_NUMBERS = (
    "correlation",
    "variance",
    "branch_gain",
    "tau0",
    "mlp_ratio",
    "c_plus",
    "c_minus",
)
_FLAGS = ("causal", "attention", "mlp", "finite_width", "tune")
_CHOICES = {"out_proj": OUT_PROJ, "integrator": tuple(INTEGRATORS), "method": METHODS}
_OPTIONAL = ("tokens", "correlation", "variance", "v0", "steps", "band", "head_dim")
# Names of flags that are no settings, and what to do instead of writing them into a file.
_REMEDIES = {
    "no_causal": "Write causal = false.",
    "no_attention": "Write attention = false.",
    "no_mlp": "Write mlp = false.",
    "limit": "Write finite_width = false.",
    "no_tune": "Write tune = false.",
    **{
        name: f"Give --{name} on the command line."
        for name in ("config", "plot", "output", "json", "device")
    },
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A model and how to simulate it. The names are those of the command's flags.

    Args:
        depth, width: of the model; depth / width is the time of the SDE.
        tokens, correlation, variance: of an equicorrelated start. Defaults 4, 0.2 and 1.0.
        v0: rows of the (m, m) covariance at the start, instead of those three.
        branch_gain, tau0, heads, softmax_gain, out_proj, causal, attention, mlp, mlp_ratio, c_plus,
            c_minus: as in `shaped_attn.sde.CovarianceSDE`, where ``causal`` is ``is_causal``.
        finite_width: whether to correct the drift of the MLP for ``width`` (its c_n), the largest
            effect of a finite width. Default True.
        paths: number of paths of the SDE.
        steps: per unit of depth / width. Default None: 256, at least 64 in total, and with
            ``finite_width`` at most one for each layer.
        integrator: "chain" or "euler_maruyama".
        seed: of all draws.
        band: least and largest median correlation to tune for. Default None: 0.05 to either side of
            that of the start.
        tune: whether to look for the branch gains and tau0 that keep it there.
        networks, method, head_dim: of `compare_networks`, as in `shaped_attn.sde.FiniteNetwork`.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of its range.
    """

    depth: int = 64
    width: int = 128
    tokens: int | None = None
    correlation: float | None = None
    variance: float | None = None
    v0: tuple[tuple[float, ...], ...] | None = None
    branch_gain: float = 0.5
    tau0: float = 1.0
    heads: int = 1
    softmax_gain: float | tuple[float, ...] = 1.0
    out_proj: str = "none"
    causal: bool = False
    attention: bool = True
    mlp: bool = True
    mlp_ratio: float = 1.0
    c_plus: float = 0.0
    c_minus: float = -1.0
    finite_width: bool = True
    paths: int = 4096
    steps: int | None = None
    integrator: str = "chain"
    seed: int = 0
    band: tuple[float, float] | None = None
    tune: bool = True
    networks: int = 1000
    method: str = "network"
    head_dim: int | None = None

    def __post_init__(self) -> None:
        """Check every field and fill in what follows from others."""
        for name in _COUNTS:
            self._check(name, check_size)
        check_divides("heads", self.heads, "width", self.width)
        for name in _NUMBERS:
            self._check(name, check_number)
            if getattr(self, name) is not None:
                self._set(name, float(getattr(self, name)))
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                got = repr(getattr(self, name))
                fail(TypeError, name, "must be true or false", got, "Write it without quotes.")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                got = repr(getattr(self, name))
                fail(ValueError, name, f"must be one of {choices}", got, "Choose one of them.")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            fail(TypeError, "seed", "must be an int", repr(self.seed), "Give a whole number.")
        if not 0 <= self.seed < 2**63:
            fail(ValueError, "seed", "must be from 0 to 2^63 - 1", self.seed, "Give another one.")
        if isinstance(self.softmax_gain, list):
            self._set("softmax_gain", tuple(self.softmax_gain))
        for name in ("softmax_gain", "band"):
            given = getattr(self, name)
            if given is not None or name not in _OPTIONAL:
                for value in given if isinstance(given, list | tuple) else (given,):
                    check_number(name, value)
        self._fill_start()
        if self.band is not None:
            self._set("band", sde_tuning.check_band(self.band, self.tokens))
        # What they refuse is found out here rather than after minutes.
        self._set("steps", self._default_steps() if self.steps is None else self.steps)
        check_start(self.start(), EIGENVALUE_RANGE)
        least = self.sde().least_steps(self.tokens)
        per_unit = math.ceil(self.time * self.steps - 1e-9) / self.time
        if self.integrator == "chain" and per_unit < least:
            rule = f"must be at least {least} per unit of depth / width for {self.tokens} tokens"
            fail(ValueError, "steps", rule, self.steps, "Give more, or leave it out.")

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check(self, name: str, check: Callable[[str, object], None]) -> None:
        value = getattr(self, name)
        if value is not None or name not in _OPTIONAL:
            check(name, value)

    def _fill_start(self) -> None:
        if self.v0 is None:
            for name, value in _START.items():
                if getattr(self, name) is None:
                    self._set(name, value)
            return
        self._set("v0", _checked_matrix("v0", self.v0))
        given = [name for name in ("correlation", "variance") if getattr(self, name) is not None]
        if self.tokens not in (None, len(self.v0)):
            given.insert(0, "tokens")
        if given:
            fail(
                ValueError,
                "v0",
                "must not be given beside tokens, correlation or variance",
                " and ".join(given),
                "Leave out one or the other: v0 is the whole start.",
            )
        self._set("tokens", len(self.v0))

    def _default_steps(self) -> int:
        steps = max(_STEPS, math.ceil(_LEAST_TOTAL_STEPS / self.time))
        # A chain of the model's own width has one step for each layer, and is closest to it.
        if self.finite_width and self.integrator == "chain":
            steps = min(steps, self.width)
        return max(steps, self.sde().least_steps(self.tokens))

    @property
    def time(self) -> float:
        """The last time, depth / width."""
        return self.depth / self.width

    @property
    def target_band(self) -> tuple[float, float]:
        """The band to tune for; needs 2 tokens."""
        if self.band is not None:
            return self.band
        rho = _mean_correlation_of(self.start())
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
        from .network import FiniteNetwork

        return FiniteNetwork(
            width=self.width, depth=self.depth, head_dim=self.head_dim, **self._block()
        )

    def _block(self) -> dict[str, Any]:
        names = (
            *("branch_gain", "tau0", "heads", "softmax_gain", "out_proj", "attention", "mlp"),
            *("mlp_ratio", "c_plus", "c_minus"),
        )
        return {"is_causal": self.causal, **{name: getattr(self, name) for name in names}}

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return plain(asdict(self))


@dataclass(frozen=True)
class Row:
    """Quantiles at one depth, by statistic."""

    layer: float
    time: float
    quantiles: dict[str, tuple[float, ...]]


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
    def blow_up(self) -> Estimate:
        """Fraction of the paths with an eigenvalue above the admissible ones."""
        return self.sample.exploded_fraction()

    @property
    def collapse(self) -> Estimate:
        """Fraction of the paths with an eigenvalue below the admissible ones."""
        return fraction(self.sample.collapsed)

    def rows(self) -> list[Row]:
        """Return the quantiles at a few depths; none if there is no path."""
        return _rows(self.sample, self.settings.width)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; numbers that JSON lacks (NaN, infinity) become strings."""
        return plain(
            {
                "settings": self.settings.to_dict(),
                "time": self.settings.time,
                "is_complete": self.is_complete,
                **_sample_data(self.sample, self.settings.width),
                "tuning": self.tuning and self.tuning.to_dict(),
                "assumptions": assumptions(self.settings),
                **_provenance(self.device, self.seconds),
            }
        )


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
        return plain(
            {
                "settings": self.settings.to_dict(),
                "time": self.settings.time,
                "is_complete": self.is_complete,
                "agrees": self.agrees,
                "prediction": _sample_data(self.prediction, width),
                "networks": self.networks and _sample_data(self.networks, width),
                "comparison": self.comparison and self.comparison.to_dict(),
                "assumptions": assumptions(self.settings),
                **_provenance(self.device, self.seconds),
            }
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
        tuned = _tune(settings, device, on_progress, stop)
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
        settings: the model.
        device: where to run.
        on_progress: called with what is being done, how much of it is, and how much there is.
        stop: asked between steps; if it returns True the result holds what there is.

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
            method=settings.method,
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
    settings.network()
    statistics = tokens * (tokens + 1) // 2
    if critical_value(LEVEL / statistics, settings.paths, settings.networks) >= 1:
        fail(
            ValueError,
            "networks and paths",
            "must be enough to tell two laws apart",
            f"{settings.networks} and {settings.paths} for {statistics} statistics",
            "Give more of them.",
        )
    if settings.method == "network" and settings.width < tokens:
        rule = f"must be at least the number of tokens, {tokens}"
        fail(ValueError, "width", rule, settings.width, "Give a larger one, or fewer tokens.")
    slices = settings.heads if settings.attention and settings.out_proj == "none" else 1
    if settings.method == "chain" and settings.width < 2 * tokens * slices:
        rule = f"must be at least {2 * tokens * slices} for the chain"
        fail(ValueError, "width", rule, settings.width, "Use the method network.")


def read_config(path: Path) -> dict[str, Any]:
    """Read settings by name from a JSON file, or from a TOML file on Python 3.11 and later.

    A ``v0`` that is a string names a file, relative to the folder of this one.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not of that format, or has a name that is no setting.
    """
    values = config_file.read(path, [f.name for f in fields(Settings)], _REMEDIES)
    if isinstance(values.get("v0"), str):
        values["v0"] = read_covariance(path.parent / values["v0"])
    return values


def read_covariance(path: Path) -> tuple[tuple[float, ...], ...]:
    """Read an (m, m) matrix from a .npy or .json file, as its rows.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds no square matrix of numbers.
    """
    suffix = path.suffix.lower()
    if suffix not in (".json", ".npy"):
        fail(ValueError, "v0", "must be a .npy or .json file", path.name, "Convert it.")
    try:
        if suffix == ".npy":
            from numpy.lib.format import read_array

            # Not numpy.load, which takes other formats too, and advises to unpickle what is none.
            with path.open("rb") as file:
                matrix = read_array(file, allow_pickle=False).tolist()
        else:
            matrix = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        got = f"{path} ({error.strerror or error})"
        fail(type(error), "v0", "must be a file that can be read", got, "Check its path.")
    except ValueError as error:
        remedy = "Write it with numpy.save, or as JSON: a list of rows."
        fail(ValueError, "v0", f"must be a whole {suffix} file", f"{path} ({error})", remedy)
    return _checked_matrix(f"v0 of {path}", matrix)


def _checked_matrix(name: str, rows: Any) -> tuple[tuple[float, ...], ...]:
    is_matrix = isinstance(rows, list | tuple) and rows
    if not (is_matrix and all(isinstance(r, list | tuple) and len(r) == len(rows) for r in rows)):
        remedy = "Give the m x m covariance of the tokens, row by row."
        got = type(rows).__name__
        if is_matrix:
            lengths = [len(r) if isinstance(r, list | tuple) else type(r).__name__ for r in rows]
            got = f"{len(rows)} rows, of lengths {reprlib.repr(lengths)}"
        fail(ValueError, name, "must be a square matrix", got, remedy)
    for row in rows:
        for value in row:
            check_number(f"an entry of {name}", value)
    return tuple(tuple(float(value) for value in row) for row in rows)


def make_settings(config: Mapping[str, Any], flags: Mapping[str, Any]) -> Settings:
    """Join the settings of a file with those of the command line, which win.

    A start of the command line replaces that of the file as a whole, be it ``v0`` or a correlation.
    """
    config = dict(config)
    if flags.get("v0") is not None:
        for name in _START:
            config.pop(name, None)
    elif any(name in flags for name in _START):
        config.pop("v0", None)
    return Settings(**{**config, **flags})


def assumptions(settings: Settings) -> list[str]:
    """Say in plain words what a prediction rests on."""
    low, high = EIGENVALUE_RANGE
    found = [
        "Weights at initialisation, no normalisation layers, no positions; "
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
    if settings.integrator == "chain":
        found.append(
            f"Integrator: chain, {settings.steps} steps per unit of depth / width; with fewer "
            "steps fewer paths blow up."
        )
    else:
        found.append(
            f"Integrator: Euler-Maruyama, {settings.steps} steps per unit of depth / width."
        )
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


def tuning_lines(tuning: Tuning) -> list[str]:
    """Say in plain words which branch gains and tau0 keep the correlation in the band."""
    low, high = tuning.band
    found = [
        f"To keep the median of mean rho in [{low:.3g}, {high:.3g}] at the last layer:",
    ]
    for interval in (tuning.branch_gain, tuning.tau0):
        if interval is not None:
            found += _interval_lines(interval)
    if tuning.tau0 is None:
        why = (
            "has no effect without attention" if tuning.is_complete else "not searched: interrupted"
        )
        found.append(f"  tau0: {why}")
    found.append(
        f"  ({tuning.paths} paths and {tuning.steps} steps per unit of depth / width for each "
        "value tried; the number of blow-ups depends on the steps)"
    )
    return found


def _interval_lines(interval: Interval) -> list[str]:
    name = interval.parameter.replace("_", " ")
    least, most = interval.search_range
    nearest = interval.nearest
    if nearest is None:
        return [f"  {name}: interrupted before the first value was tried"]
    if not interval.is_found:
        tried = f"no value from {least:g} to {most:g} does"
        if not interval.is_complete:
            tried = f"interrupted; none of the {len(interval.candidates)} values tried does"
        return [f"  {name}: {tried}; nearest:", _candidate_line(nearest, interval)]
    other = "tau0" if interval.parameter == "branch_gain" else "branch_gain"
    fixed = getattr(nearest, other)
    ends = [interval.low, interval.high]
    low, high = (f"{getattr(end.candidate, interval.parameter):g}" for end in ends)
    lines = [f"  {name}: from {low} to {high}, at {other.replace('_', ' ')} {fixed:g}"]
    for end in ends if low != high else ends[:1]:
        lines.append(_candidate_line(end.candidate, interval) + _end_note(end, interval))
    return lines


def _candidate_line(candidate: Candidate, interval: Interval) -> str:
    return (
        f"    at {getattr(candidate, interval.parameter):g}: median "
        f"{format_estimate(candidate.correlation)}, blow-up {format_estimate(candidate.blow_up)}"
    )


def _end_note(end: End, interval: Interval) -> str:
    if end.is_search_limit:
        return "; bounded by the search range"
    if end.outside is None:
        return "; interrupted there"
    return "" if interval.is_complete else f"; {end.outside:g} is outside, between them interrupted"


def format_statistic(name: str, value: float) -> str:
    """A correlation with three decimals, a variance as `format_number`."""
    return format_number(value) if name.startswith("V_") else f"{value:.3f}"


def format_number(value: float) -> str:
    """Three decimals, or few digits and an exponent where that says too little or too much."""
    if not math.isfinite(value):
        return str(value)
    if value == 0 or 5e-3 <= abs(value) < 100:
        return f"{value:.3f}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def format_estimate(estimate: Estimate) -> str:
    """A value and its standard error, both to the second digit of the error."""
    value, error = estimate
    if not (math.isfinite(value) and math.isfinite(error) and error > 0):
        return f"{value:.3g} ± {error:.2g}"
    decimals = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:.{decimals}f} ± {error:.{decimals}f}" if value else f"0 ± {error:.{decimals}f}"


def shown_statistics(tokens: int) -> list[str]:
    """Return the names of the statistics for a table or a plot, of those of `statistics_of`."""
    if tokens == 1:
        return ["V_11"]
    names = [_name("rho", 1, 2, tokens), _name("V", 1, 1, tokens)]
    return names if tokens == 2 else [MEAN_CORRELATION, *names]


def statistics_of(sample: CovarianceSample) -> dict[str, Tensor]:
    """Return the statistics that are reported, each (K, paths).

    They are the mean correlation, the correlations of the first two, the last two, and the first
    and the last token, and the variances of the first and the last.
    """
    tokens = sample.tokens
    if tokens == 1:
        return sample.statistics()
    v = sample.covariances
    found = {MEAN_CORRELATION: mean_correlation(sample)}
    for i, j in ((1, 2), (tokens - 1, tokens), (1, tokens)):
        scale = (v[..., i - 1, i - 1] * v[..., j - 1, j - 1]).rsqrt()
        found[_name("rho", i, j, tokens)] = v[..., i - 1, j - 1] * scale
    for i in (1, tokens):
        found[_name("V", i, i, tokens)] = v[..., i - 1, i - 1]
    return found


def _name(symbol: str, i: int, j: int, tokens: int) -> str:
    """The name of an entry in `CovarianceSample.statistics`."""
    return f"{symbol}_{i}{'' if tokens < 10 else '_'}{j}"


def _rows(sample: CovarianceSample, width: int) -> list[Row]:
    if sample.paths == 0:
        return []
    values = {name: quantile(value, LEVELS) for name, value in statistics_of(sample).items()}
    last = float(sample.times[-1])
    indices = {
        int((sample.times - last * part / _ROWS).abs().argmin()) for part in range(_ROWS + 1)
    }
    return [
        Row(
            float(sample.times[k]) * width,
            float(sample.times[k]),
            {name: tuple(value[k].tolist()) for name, value in values.items()},
        )
        for k in sorted(indices)
    ]


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


def _provenance(device: str, seconds: float) -> dict[str, Any]:
    versions = {"shaped_attn": __version__, "torch": torch.__version__}
    return {"versions": versions, "device": device, "seconds": seconds}


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


def _tune(
    settings: Settings,
    device: torch.device | str,
    on_progress: OnProgress | None,
    stop: Stop | None,
) -> Tuning:
    steps = settings.steps
    sde = settings.sde()
    if settings.integrator == "chain":
        # The chain needs few steps for its medians, Euler-Maruyama does not.
        enough = max(_TUNING_STEPS, math.ceil(_LEAST_TUNING_STEPS / settings.time))
        steps = min(steps, max(enough, sde.least_steps(settings.tokens)))
    return tune(
        sde,
        settings.start(device),
        time=settings.time,
        band=settings.target_band,
        paths=min(settings.paths, _TUNING_PATHS),
        steps=steps,
        seed=settings.seed,
        on_progress=_named("tuning", on_progress),
        stop=stop,
        integrator=settings.integrator,
    )


def _named(phase: str, on_progress: OnProgress | None) -> Callable[[int, int], None] | None:
    if on_progress is None:
        return None
    return lambda done, total: on_progress(phase, done, total)


def _mean_correlation_of(v0: Tensor) -> float:
    one = torch.zeros(1, dtype=torch.float64)
    sample = CovarianceSample("sde", one, v0[None, None], one, one > 0, 1)
    return float(mean_correlation(sample)[0, 0])
