"""The covariance of tokens over depth: its SDE, finite networks, and their comparison.

Equation numbers are those of covariance-sde.md in this folder, which derives them. Without its
fluctuations, and with any prior and activation, `token_kernel` follows it.
"""

from .comparison import Comparison, StatisticComparison, compare
from .integrators import Chain, EulerMaruyama, Integrator
from .network import FiniteNetwork
from .process import CovarianceSDE
from .sample import CovarianceSample, Estimate
from .settings import Detuning
from .start import equicorrelated
from .stopping_map import StoppingTimeMap, stopping_time_map
from .token_kernel import Propagation, input_kernel, propagate
from .tuning import Tuning, tune

__all__ = [
    "Chain",
    "Comparison",
    "CovarianceSDE",
    "CovarianceSample",
    "Detuning",
    "Estimate",
    "EulerMaruyama",
    "FiniteNetwork",
    "Integrator",
    "Propagation",
    "StatisticComparison",
    "StoppingTimeMap",
    "Tuning",
    "compare",
    "equicorrelated",
    "input_kernel",
    "propagate",
    "stopping_time_map",
    "tune",
]
