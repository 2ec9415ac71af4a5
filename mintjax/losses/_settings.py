"""The ranges of hyperparameters, and the checks that refuse what lies outside."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.core
import numpy as np

_MOST_SHOWN = 4


class Range(NamedTuple):
    """The numbers that a setting may be.

    Args:
        least: the lower end.
        most: the upper end.
        above: whether the lower end itself is left out.
        below: whether the upper end itself is left out.
    """

    least: float
    most: float = np.inf
    above: bool = False
    below: bool = False

    def __str__(self) -> str:
        low = f"above {self.least:g}" if self.above else f"at least {self.least:g}"
        if self.most == np.inf:
            return f"{low} and finite" if self.below else low
        return f"{low} and {'below' if self.below else 'at most'} {self.most:g}"

    def holds(self, number: np.ndarray) -> np.ndarray:
        """Marks the numbers that lie in it; NaN lies in none."""
        low = number > self.least if self.above else number >= self.least
        return low & (number < self.most if self.below else number <= self.most)


AT_LEAST_0 = Range(0)
ABOVE_0 = Range(0, above=True)
UP_TO_1 = Range(0, 1)
ANY = Range(-np.inf)

RANGES: dict[str, Range] = {
    "alpha": ANY,
    "beta": AT_LEAST_0,
    "buffer": ABOVE_0,
    "clip_high_threshold": AT_LEAST_0,
    "clip_low_threshold": AT_LEAST_0,
    "decay": UP_TO_1,
    "desirable_weight": AT_LEAST_0,
    "deviations": AT_LEAST_0,
    "discount": UP_TO_1,
    "divergence_threshold": AT_LEAST_0,
    "dual_clip_threshold": Range(1),
    "epsilon": AT_LEAST_0,
    "gamma": AT_LEAST_0,
    "greatest_ratio_threshold": ABOVE_0,
    "label_smoothing": Range(0, 0.5),
    "least_ratio_threshold": ABOVE_0,
    "lower": AT_LEAST_0,
    "margin": AT_LEAST_0,
    "max_length": ABOVE_0,
    "negative_decay": AT_LEAST_0,
    "negative_power": AT_LEAST_0,
    "negative_temperature": ABOVE_0,
    "nll_weight": AT_LEAST_0,
    "odds_ratio_weight": AT_LEAST_0,
    "penalty": AT_LEAST_0,
    "penalty_weight": AT_LEAST_0,
    "positive_decay": AT_LEAST_0,
    "positive_power": AT_LEAST_0,
    "positive_temperature": ABOVE_0,
    "reward_shift": ANY,
    "share": Range(0, 1, above=True),
    "step_count": ABOVE_0,
    "temperature": ABOVE_0,
    "truncation_threshold": AT_LEAST_0,
    "undesirable_weight": AT_LEAST_0,
    "upper": AT_LEAST_0,
    "win_probability": UP_TO_1,
}
"""By name of a setting, what it may be in every loss. Some losses allow less."""


def known(value: Any) -> np.ndarray | None:
    """Reads a hyperparameter as NumPy; None while it is traced, because it has no value then."""
    if isinstance(value, jax.core.Tracer):
        return None
    array = np.asarray(jax.device_get(value) if isinstance(value, jax.Array) else value)
    return array.astype(np.float64) if array.dtype.kind in "fiub" else None


def check_range(value: Any, allowed: Range, name: str, where: Any = None) -> None:
    """Checks that a hyperparameter lies in its range, at each position that counts.

    Args:
        value: a number or an array of them; what is traced is not checked.
        allowed: its range.
        name: what the message calls it.
        where: which positions count, or None for all.

    Raises:
        ValueError: it does not, or it is NaN; the message names it.
    """
    number = known(value)
    if number is None:
        return
    wrong = ~allowed.holds(number)
    if not wrong.any():
        return
    mask = np.ones(()) if where is None else known(where)
    if mask is not None and (wrong & (mask != 0)).any():
        raise ValueError(f"{name} must be {allowed}, not {_brief(number)}")


def check_settings(settings: dict[str, Any], where: Any = None, of: str = "") -> None:
    """Checks the hyperparameters among named arguments, each by :data:`RANGES`.

    Args:
        settings: arguments by name.
        where: which positions count, or None for all.
        of: the loss, for the message; empty where it is not known.

    Raises:
        ValueError: one is out of its range.
    """
    for name, value in settings.items():
        if name in RANGES:
            check_range(value, RANGES[name], f"{name} of {of}" if of else name, where)


def check_positive(loss: str, **values: Any) -> None:
    """Checks that hyperparameters are above 0.

    Raises:
        ValueError: one is not; the message names it and the loss.
    """
    for name, value in values.items():
        check_range(value, ABOVE_0, f"{name} of {loss}")


def check_bounds(
    low: Any, high: Any, names: tuple[str, str] = ("clip_low_threshold", "clip_high_threshold")
) -> None:
    """Checks that a lower bound of a ratio is not above the upper one.

    Raises:
        ValueError: it is, or one is NaN; the message says what the bounds mean.
    """
    check_order(
        low,
        high,
        names,
        "so no ratio lies between them. They bound the ratio itself: 0.8 means 0.8, not 1 - 0.8. "
        f"For an epsilon of 0.2 pass {names[0]}=0.8, {names[1]}=1.2",
    )


def check_order(low: Any, high: Any, names: tuple[str, str], otherwise: str) -> None:
    """Checks that one hyperparameter is not above another.

    Raises:
        ValueError: it is, or one is NaN; the message names both and ends with what is said here.
    """
    below, above = known(low), known(high)
    if below is not None and above is not None and not (below <= above).all():
        raise ValueError(
            f"{names[0]} is {_brief(below)} and {names[1]} is {_brief(above)}, {otherwise}"
        )


def check_count(value: Any, name: str, least: int = 1) -> None:
    """Checks that a number of things, such as groups, is an integer and large enough.

    Raises:
        ValueError: it is not; the message names it.
    """
    if not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"{name} must be an integer and at least {least}, not {value!r}")


def _brief(number: np.ndarray) -> str:
    if number.ndim == 0:
        return f"{number:g}"
    return np.array2string(number, threshold=_MOST_SHOWN, edgeitems=2)
