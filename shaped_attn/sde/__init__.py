"""The covariance of tokens over depth: its SDE, finite networks, and their comparison.

Equation numbers are those of covariance-sde.md in this folder, which derives them.
"""

from .comparison import Comparison, StatisticComparison, compare
from .network import FiniteNetwork
from .process import CovarianceSDE, equicorrelated
from .sample import CovarianceSample, Estimate
from .settings import Detuning
from .stopping_map import StoppingTimeMap, stopping_time_map
from .tuning import Tuning, tune

__all__ = [
    "Comparison",
    "CovarianceSDE",
    "CovarianceSample",
    "Detuning",
    "Estimate",
    "FiniteNetwork",
    "StatisticComparison",
    "StoppingTimeMap",
    "Tuning",
    "compare",
    "equicorrelated",
    "stopping_time_map",
    "tune",
]
