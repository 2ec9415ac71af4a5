"""Makes batches of random numbers with the columns that an objective reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import numpy.typing as npt

from mintjax.errors import ConfigError, DataError
from mintjax.gradients import Objective
from mintjax.gradients.torch import torch_objective
from mintjax.ragged import Ragged
from mintjax.ragged.batch import Batch
from mintjax.types import Datum, ModelInput

_VOCABULARY = 256  # the embedded trainer's, and within everybody else's
_SHORT = (2, 9)  # lengths to look at an objective with


class Arrays(NamedTuple):
    """A batch, and the logprobs that a trainer would return for it.

    Args:
        data: B datums.
        logprobs: the logprobs of their targets, in nats: float32, ``[T_i]`` or ``[T_i, K]``.
    """

    data: list[Datum]
    logprobs: list[npt.NDArray[np.float32]]


class Synthetic:
    """A source of batches.

    The logprobs resemble those of a model in training: ``-lp`` is exponential with mean 1.
    ``weights`` is 0 on a prompt and 1 on the answer after it. Columns whose name ends in
    ``logprobs`` lie near the logprobs. ``desirable`` is 1 or 0 for each datum. All other columns,
    such as ``advantages``, are normal.

    Args:
        columns: the names of the columns, with ``:datum`` behind one that holds a single number for
            each datum (``"reward:datum"``); the others hold one for each token.
        lengths: least and greatest number of tokens; uniform between.
        candidates: K, to have ``[T, K]`` logprobs; None for ``[T]``.
        seed: of all.

    Raises:
        ConfigError: lengths that are no range, or a column that is not understood.
    """

    def __init__(
        self,
        columns: Sequence[str] = (),
        lengths: tuple[int, int] = (50, 2048),
        *,
        candidates: int | None = None,
        seed: int = 0,
    ) -> None:
        low, high = lengths
        if not 1 <= low <= high:
            raise ConfigError(
                f"lengths {low}:{high}: give the least, at least 1, then the greatest"
            )
        self.columns = tuple(columns)
        self.lengths = lengths
        self.candidates = candidates
        self._rng = np.random.default_rng(seed)
        for column in self.columns:
            if column.partition(":")[1:] not in (("", ""), (":", "datum")):
                raise ConfigError(f"column {column!r}: give its name, or name:datum")

    def batch(self, datums: int) -> Arrays:
        """Makes a batch of so many ``datums``, with new lengths."""
        low, high = self.lengths
        return self._of_lengths(self._rng.integers(low, high + 1, datums))

    def complete(self, objective: Objective, datums: int) -> None:
        """Adds the columns that an objective reads.

        The objective is traced, not compiled. While it fails because a column is missing, that
        column is added and the objective is traced again.

        Args:
            objective: ``(data, logprobs) -> (loss, metrics)``.
            datums: B; some objectives need a multiple of 2 or of a group's size.

        Raises:
            Exception: whatever else the objective raises.
        """
        while True:
            short = self._of_lengths(self._rng.integers(*_SHORT, datums))
            missing = _missing_column(objective, short)
            if missing is None:
                return
            self.columns += (f"{missing}:datum" if missing == "desirable" else missing,)

    def _of_lengths(self, lengths: npt.NDArray[Any]) -> Arrays:
        rng, trailing = self._rng, () if self.candidates is None else (self.candidates,)
        logprobs = [-rng.exponential(size=(n, *trailing)).astype(np.float32) for n in lengths]
        data: list[Datum] = []
        for row in logprobs:
            tokens = rng.integers(_VOCABULARY, size=len(row))
            inputs: dict[str, Any] = {"target_tokens": rng.integers(_VOCABULARY, size=row.shape)}
            for column in self.columns:
                name, _, per_datum = column.partition(":")
                inputs[name] = self._column(name, row, bool(per_datum))
            data.append(Datum(ModelInput.from_ints(tokens), inputs))
        return Arrays(data, logprobs)

    def _column(
        self, name: str, row: npt.NDArray[np.float32], per_datum: bool
    ) -> npt.NDArray[np.float32]:
        shape, rng = () if per_datum else row.shape, self._rng
        if name == "weights" and not per_datum:
            prompt = int(rng.integers(0, 1 + len(row) // 2))
            mask = np.ones(shape, np.float32)
            mask[:prompt] = 0
            return mask
        if name == "desirable":
            return np.full(shape, rng.integers(2), np.float32)
        noise = rng.standard_normal(shape).astype(np.float32)
        near = name.endswith("logprobs") and not per_datum
        return np.minimum(row + 0.2 * noise, 0) if near else noise


def _missing_column(objective: Objective, arrays: Arrays) -> str | None:
    """Finds a column that an objective reads and that is missing."""
    batch = Batch(arrays.data)

    def value(rows: Sequence[Any]) -> Any:
        return objective(batch, Ragged.from_rows(rows))[0]

    present = batch.names
    try:
        if isinstance(objective, torch_objective):
            objective.evaluate(batch, arrays.logprobs)
        else:
            jax.eval_shape(value, arrays.logprobs)
    except DataError as error:
        if error.field is None or error.field in present:
            raise
        return error.field
    except KeyError as error:
        if len(error.args) != 1 or not isinstance(error.args[0], str) or error.args[0] in present:
            raise
        return error.args[0]
    return None
