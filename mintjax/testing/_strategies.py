"""Hypothesis strategies that make ragged batches, with awkward cases among them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from mintjax.types import Datum, ModelInput

Array: TypeAlias = npt.NDArray[Any]
Generator: TypeAlias = Callable[[np.random.Generator, tuple[int, ...]], Array]
LogRatios: TypeAlias = Literal["none", "small", "extreme"]


class Example(NamedTuple):
    """A batch for testing an objective.

    Args:
        data: the datums.
        logprobs: the logprobs of each datum's tokens, float32.
    """

    data: list[Datum]
    logprobs: list[Array]

    def __repr__(self) -> str:
        rows = [
            f"datum {i}: {_shown({'logprobs under training': lp, **datum.loss_fn_inputs})}"
            for i, (datum, lp) in enumerate(zip(self.data, self.logprobs, strict=True))
        ]
        return "Example(\n  " + "\n  ".join(rows) + "\n)"


def _shown(columns: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name}={np.array2string(np.asarray(value), threshold=12, precision=5, separator=', ')}"
        for name, value in columns.items()
        if name != "target_tokens"
    )


@st.composite
def batches(
    draw: st.DrawFn,
    *,
    block: int = 1,
    max_blocks: int = 4,
    max_length: int = 2000,
    candidates: int | None = None,
    columns: Sequence[str] | Mapping[str, Generator] = (
        "weights",
        "advantages",
        "logprobs",
        "ref_logprobs",
    ),
    log_ratios: Sequence[LogRatios] = ("none", "small", "extreme"),
    poison: bool = False,
) -> Example:
    """Draws batches of many kinds: short rows, long rows, fully masked rows, ratios far from 1.

    Hypothesis draws the structure, so that a failing example shrinks to few and short rows. The
    numbers come from a seed that Hypothesis draws too.

    Args:
        draw: Hypothesis passes it.
        block: the number of datums that belong together: 2 for pairs, G for groups of G.
        max_blocks: the largest number of blocks; there is at least one.
        max_length: the largest number of tokens. Most rows are short; some have up to this many.
        candidates: K for rows ``[T, K]``; None for rows ``[T]``.
        columns: names of the columns, or generators ``(rng, shape) -> array`` by name. Known names:
            ``weights`` (a mask with whole rows of 0 now and then), ``advantages``, ``logprobs``,
            ``ref_logprobs``, ``teacher_logprobs``, ``outcomes``, ``desirable`` (one number per
            datum).
        log_ratios: the distances of ``logprobs`` and ``ref_logprobs`` from the logprobs in
            training: ``"none"`` makes them equal, ``"small"`` is some tenths of a nat,
            ``"extreme"`` is up to 80 nats in both directions.
        poison: writes infinities and NaN where ``weights`` is 0, because no loss may read there.

    Returns:
        A strategy for :class:`Example`.
    """
    rows = block * draw(st.integers(1, max_blocks), label="blocks")
    short = st.integers(1, min(20, max_length))
    lengths = [draw(short) for _ in range(rows)]
    if max_length > 20 and draw(st.booleans(), label="long row"):
        lengths[draw(st.integers(0, rows - 1))] = draw(st.integers(21, max_length))
    whole = draw(st.sets(st.integers(0, rows - 1), max_size=2), label="masked rows")
    distance: LogRatios = draw(st.sampled_from(list(log_ratios)), label="log-ratios")
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1), label="seed"))

    generators = dict(columns) if isinstance(columns, Mapping) else {n: _KNOWN[n] for n in columns}
    data: list[Datum] = []
    logprobs: list[Array] = []
    for i, length in enumerate(lengths):
        shape = (length,) if candidates is None else (length, candidates)
        target = _logprobs(rng, shape)
        made = {name: np.asarray(make(rng, shape)) for name, make in generators.items()}
        for name in _FOLLOWERS.intersection(made):
            made[name] = np.minimum(target + _DISTANCES[distance](rng, shape), 0.0)
        if "weights" in made:
            if i in whole:
                made["weights"] = np.zeros(shape)
            hidden = made["weights"] == 0
            target = _poisoned(rng, target, hidden, poison)
            for name in _FOLLOWERS.union({"advantages"}).intersection(made):
                made[name] = _poisoned(rng, made[name], hidden, poison)
        inputs: dict[str, Array] = {n: value.astype(np.float32) for n, value in made.items()}
        inputs["target_tokens"] = np.zeros(shape, np.int64)
        model_input = ModelInput.from_ints(np.zeros(length, np.int64))
        data.append(Datum(model_input, inputs))  # pyright: ignore[reportArgumentType]
        logprobs.append(target.astype(np.float32))
    return Example(data, logprobs)


def _logprobs(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return (-rng.gamma(1.0, 1.5, shape) - 1e-3).astype(np.float32)


def _weights(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return rng.random(shape) < 0.7


def _advantages(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return np.where(rng.random(shape) < 0.1, 0.0, rng.normal(size=shape))


def _outcomes(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return np.eye(shape[-1])[rng.integers(0, shape[-1], shape[:-1])]


def _desirable(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return np.float32(rng.random() < 0.5)  # pyright: ignore[reportReturnType]


def _extreme(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return np.where(rng.random(shape) < 0.3, rng.uniform(-80, 80, shape), rng.normal(size=shape))


_KNOWN: dict[str, Generator] = {
    "weights": _weights,
    "advantages": _advantages,
    "logprobs": _logprobs,
    "ref_logprobs": _logprobs,
    "teacher_logprobs": _logprobs,
    "outcomes": _outcomes,
    "desirable": _desirable,
}
_FOLLOWERS = frozenset({"logprobs", "ref_logprobs"})
_DISTANCES: dict[LogRatios, Generator] = {
    "none": lambda rng, shape: np.zeros(shape),
    "small": lambda rng, shape: rng.normal(0, 0.3, shape),
    "extreme": _extreme,
}


def _poisoned(rng: np.random.Generator, values: Array, hidden: Array, poison: bool) -> Array:
    """Writes extreme numbers, or NaN and infinities, where a mask is 0."""
    kinds = np.array([np.nan, np.inf, -np.inf, -300.0]) if poison else np.array([-300.0, -1.0])
    return np.where(hidden, kinds[rng.integers(0, kinds.size, values.shape)], values)
