"""Finds out, by a few steps on a throwaway model, what a trainer makes of losses.

One step of Adam with ``eps`` far above any gradient, and without memory, moves the weights in
proportion to the gradient, and so each logprob in proportion too. All datums here begin with the
same tokens, a head and a tail, so the gradient of a batch is a sum of two directions. How far they
move the logprobs is measured by one step each. The model then serves as a scale: what a trainer
divides by shows in how far other batches move the same logprobs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from mintjax.errors import BadRequestError, RequestFailedError, UnknownReductionError
from mintjax.step.carrier import FORWARD_LOSS_FN, carrier, forward_data
from mintjax.step.reduction import MEMBERS, SUM, Reduction, divisors
from mintjax.step.reported import returns_the_sum
from mintjax.types import AdamParams, Datum, ForwardBackwardOutput, ModelInput

HEAD, TAIL = 6, 10
_TOKENS = np.random.default_rng(0).integers(1, 100, 128)
_FAR_EPS, _NEAR_EPS = 1e3, 1.0  # some trainers refuse an eps above 1
_FIRST_RATE = 1e-4
_MOST_RATE = 10.0  # of a trainer that refuses the larger eps
_SMALL = 0.05  # of gradients that nothing divides, so that they are far below eps
_MOST_ALIKE = 100.0  # condition number of the two directions
_MOST_DRIFT = 0.3  # of the bases' steps, relative, while others are taken

Floats = npt.NDArray[np.float64]


class _Round(NamedTuple):
    """The length of the steps, and the error that still counts as agreement.

    Args:
        target: how far a step should move a sum of logprobs, in nats.
        tolerance: the largest relative error of a predicted step.
    """

    target: float
    tolerance: float


_ROUNDS = (_Round(0.02, 0.05), _Round(0.3, 0.15))
"""Short steps are linear in the gradient; arithmetic in 16 bits hides them, but not longer ones."""


class Piece(NamedTuple):
    """A datum whose weights are constant over its head and over its tail.

    Args:
        head: the weight of each of the first 6 tokens.
        tail: of each of the 10 that follow, if there are as many.
        tokens: how many there are in all; those that follow have weights of 0.
    """

    head: float
    tail: float
    tokens: int = HEAD + TAIL

    @property
    def weights(self) -> npt.NDArray[np.float32]:
        """The weights of all tokens."""
        row = np.zeros(self.tokens, np.float32)
        row[:HEAD] = self.head
        row[HEAD : HEAD + TAIL] = self.tail
        return row


Requests = Sequence[Sequence[Piece]]

BASES: tuple[Requests, Requests] = (((Piece(1, 0),),), ((Piece(0, 1),),))
"""One step for each direction."""

EXPERIMENTS: tuple[Requests, ...] = (
    ((Piece(1, 1), Piece(0, 0, 6), Piece(0, 0, 32), Piece(7, 0, 6)),),
    ((Piece(7, 0),), (Piece(0, 1, 32), Piece(0, 1, 32), Piece(0, 2, 32), Piece(1, 1, 32))),
    (
        (Piece(2, 1), Piece(1, 1), Piece(4, 1, 24), Piece(2, 1, 24)),
        (Piece(0, 2, 32), Piece(0, 0, 32), Piece(0, 0, 32), Piece(0, 0, 6)),
    ),
)
"""Steps of which any two reductions predict one at least that differs by half: several lengths,
weights, datums that are masked whole, and datums split over requests.

A request has one datum or four, of 32 tokens at most, because trainers on JAX compile for each
number of datums and for each range of lengths. A random search has found these."""

_HELD_OUT = tuple(Piece(0, 0, tokens) for tokens in (30, 20, 16, 23, 27))
_HELD_OUT_SLOPES = (1.3, 0.7)  # by which its gradients, together, raise head and tail


class _Future(Protocol):
    def result(self, timeout: float | None = None) -> Any: ...


class Trains(Protocol):
    """The methods of a training client that the measurement uses."""

    def forward(self, data: Sequence[Datum], loss_fn: str) -> _Future: ...
    def forward_backward(self, data: Sequence[Datum], loss_fn: str) -> _Future: ...
    def optim_step(self, adam_params: AdamParams, /) -> _Future: ...


_Send = Callable[[], None]
Adds = Callable[[Sequence[Datum], Sequence[npt.NDArray[np.float32]]], object]
"""Adds a gradient with respect to logprobs to what a trainer has accumulated, and waits for it."""


class SteepError(UnknownReductionError):
    """The trainer allows no ``eps`` that is far above the gradients of this model.

    Steps are not in proportion to gradients there. A larger rank makes gradients smaller, because
    trainers divide what an adapter adds by its rank.
    """


class Measurement(NamedTuple):
    """The result of a measurement.

    Args:
        reduction: of the trainer.
        error: by how much the movement on the batch that was held out differs from the predicted
            one, relative to it.
        steps: how many optimizer steps it took.
        reports_sum: the trainer returned, as ``loss:sum``, the sum of the losses that were sent;
            None where it returned none.
    """

    reduction: Reduction
    error: float
    steps: int
    reports_sum: bool | None


def measure_reduction(model: Trains) -> Measurement:
    """Measures what a trainer divides losses by, and checks the answer on a batch of its own.

    Args:
        model: a throwaway model; it is changed.

    Raises:
        UnknownReductionError: what was measured fits no reduction that is known here, or two, or
            the batch that was held out moved otherwise than predicted; the message gives numbers.
            A SteepError where that may be because gradients are not small.
    """
    steps = _Steps(model)
    with _steep(steps):
        for way in _ROUNDS[:-1]:
            with suppress(UnknownReductionError):
                return _measured(steps, way)
        return _measured(steps, _ROUNDS[-1])


@contextmanager
def _steep(steps: _Steps) -> Generator[None]:
    """Says of what cannot be told whether that may be because gradients are not small."""
    try:
        yield
    except UnknownReductionError as error:
        raise SteepError(str(error)) if steps.eps_is_near else error from None


def _measured(steps: _Steps, way: _Round) -> Measurement:
    before = _scale(steps, way)
    slopes = [steps.slope(way, steps.passes(experiment)) for experiment in EXPERIMENTS]
    after = _scale(steps, way)
    if not np.linalg.norm(after - before) <= _MOST_DRIFT * np.linalg.norm(before):
        times = float(np.linalg.norm(after) / np.linalg.norm(before))
        raise UnknownReductionError(
            "what this trainer divides losses by cannot be told: the same steps moved logprobs "
            f"{times:.3f} times as far the second time"
        )
    measured = [_in_bases((before + after) / 2, slope) for slope in slopes]
    return _checked(steps, way, best_fit(measured, way.tolerance), after)


def confirm_reduction(model: Trains, reduction: Reduction) -> Measurement:
    """Checks by a few steps that a trainer divides losses by what it once did.

    Args:
        model: a throwaway model; it is changed.
        reduction: what was measured at another time.

    Raises:
        UnknownReductionError: it does not.
    """
    steps, way = _Steps(model), _ROUNDS[0]
    with _steep(steps):
        scale = _scale(steps, way)
        if len(held_out(reduction, 1.0)[2]) == 1:  # one request does not tell requests from steps
            for experiment in EXPERIMENTS:
                found = _in_bases(scale, steps.slope(way, steps.passes(experiment)))
                _check(reduction, found, predicted(reduction, experiment), way.tolerance)
        return _checked(steps, way, reduction, scale)


def confirm_gradients(model: Trains, add: Adds) -> Measurement:
    """Checks that a trainer adds gradients of logprobs as they are, by requests of its own.

    Args:
        model: a throwaway model; it is changed.
        add: sends a gradient by those requests.

    Returns:
        A measurement of :data:`~mintjax.step.reduction.SUM`.

    Raises:
        UnknownReductionError: it does not.
    """
    steps, way = _Steps(model), _ROUNDS[0]

    def added(requests: Sequence[tuple[list[Datum], list[npt.NDArray[np.float32]]]]) -> _Send:
        def send() -> None:
            for data, grads in requests:
                add(data, grads)

        return send

    def base(piece: Piece) -> Floats:
        return steps.slope(way, added([([_datum(piece)], [-_SMALL * piece.weights])]))

    pieces, grads, sizes = held_out(SUM, _SMALL)
    data, rest = iter([_datum(piece) for piece in pieces]), iter(grads)
    parts = [
        (list(itertools.islice(data, size)), list(itertools.islice(rest, size))) for size in sizes
    ]
    with _steep(steps):
        scale = np.stack([base(request[0][0]) for request in BASES], axis=1)
        found = _in_bases(scale, steps.slope(way, added(parts)))
        error = _check(SUM, found, np.array(_HELD_OUT_SLOPES), way.tolerance)
    return Measurement(SUM, error, steps.count, None)


def predicted(reduction: Reduction, experiment: Requests) -> Floats:
    """Predicts a step as a sum of the steps of :data:`BASES`: returns how much of each it holds.

    Args:
        reduction: of the trainer.
        experiment: what the step is taken on.
    """
    amounts = np.zeros(2)
    weights = [[piece.weights for piece in request] for request in experiment]
    for request, by in zip(experiment, divisors(reduction, weights), strict=True):
        for piece, divisor in zip(request, by, strict=True):
            if piece.head or piece.tail:
                amounts += np.array([piece.head, piece.tail]) / divisor
    return amounts * _base_divisors(reduction)


def best_fit(measured: Sequence[Floats], tolerance: float) -> Reduction:
    """Finds the reduction that predicts how much of each base the :data:`EXPERIMENTS` hold.

    Args:
        measured: of each experiment, as :func:`predicted` has it.
        tolerance: the largest relative error that counts as agreement.

    Raises:
        UnknownReductionError: none does, or two do.
    """

    def error(member: Reduction) -> float:
        return max(
            _error(found, predicted(member, experiment))
            for experiment, found in zip(EXPERIMENTS, measured, strict=True)
        )

    (least, first), (second, next_one) = sorted(
        (error(member), i) for i, member in enumerate(MEMBERS)
    )[:2]
    nearest = MEMBERS[first]
    if not least <= tolerance:
        found = "; ".join(", ".join(f"{number:.4g}" for number in one) for one in measured)
        raise UnknownReductionError(
            "what this trainer divides losses by is none of the reductions known here: the nearest "
            f"is {nearest}, whose predictions are off by {least:.1%} (measured, in units of the "
            f"simplest steps: {found})"
        )
    if second < 2 * tolerance:
        raise UnknownReductionError(
            f"what this trainer divides losses by cannot be told: {nearest} (off by {least:.1%}) "
            f"and {MEMBERS[next_one]} (off by {second:.1%}) both fit"
        )
    return nearest


def held_out(
    reduction: Reduction, scale: float
) -> tuple[list[Piece], list[npt.NDArray[np.float32]], list[int]]:
    """Makes a batch for the check: gradients whose sum is constant over the head, and the tail.

    They have any sign; those of one datum are 0.

    Args:
        reduction: it goes in one request where the trainer divides by an amount of all requests
            that is not known beforehand, in two elsewhere.
        scale: of the gradients.

    Returns:
        The datums, their gradients with respect to logprobs, and the sizes of the requests.
    """
    rng = np.random.default_rng(1)
    sizes = [4, 1] if reduction.per_step in (None, "datums") else [4]
    pieces = list(_HELD_OUT[: sum(sizes)])
    grads = [rng.standard_normal(piece.tokens).astype(np.float32) for piece in pieces]
    grads[1][:] = 0
    total = sum(row[: HEAD + TAIL].astype(np.float64) for row in grads)
    grads[-1][: HEAD + TAIL] -= total + np.repeat(_HELD_OUT_SLOPES, [HEAD, TAIL])
    for row in grads:
        row[HEAD + TAIL :] = 0
        row *= scale
    return pieces, grads, sizes


def _checked(steps: _Steps, way: _Round, reduction: Reduction, scale: Floats) -> Measurement:
    """Checks a reduction on a batch that no other step has used.

    The gradients are carried there as those of a custom loss are.

    Raises:
        UnknownReductionError: the batch moves the logprobs otherwise than predicted.
    """
    per_unit = 1 / _base_divisors(reduction)[0]  # so that the step is about as long as the others
    pieces, grads, sizes = held_out(reduction, per_unit)
    data = [_datum(piece) for piece in pieces]

    def carried() -> None:
        rows = None
        if reduction.loss_fn != "cross_entropy":
            rest = iter(data)
            parts = [list(itertools.islice(rest, size)) for size in sizes]
            rows = [row for part in parts for row in steps.logprobs(part)]
        result = iter(carrier(reduction, data, rows, grads, len(data), sizes))
        for size in sizes:
            steps.send(list(itertools.islice(result, size)), reduction.loss_fn)

    found = _in_bases(scale, steps.slope(way, carried))
    expected = per_unit * np.array(_HELD_OUT_SLOPES) * _base_divisors(reduction)
    error = _check(reduction, found, expected, way.tolerance)
    return Measurement(reduction, error, steps.count, steps.reports_sum)


def _check(reduction: Reduction, found: Floats, expected: Floats, tolerance: float) -> float:
    error = _error(found, expected)
    if not error <= tolerance:
        raise UnknownReductionError(
            f"this trainer does not have {reduction}: a batch that was held out moved logprobs by "
            f"{found[0]:.3g} and {found[1]:.3g} times the simplest steps, where {expected[0]:.3g} "
            f"and {expected[1]:.3g} were predicted"
        )
    return error


def _scale(steps: _Steps, way: _Round) -> Floats:
    """Takes a step on each base.

    Returns:
        How far they moved head and tail, ``[2, bases]``, in nats per unit of the learning rate.
    """
    return np.stack([steps.slope(way, steps.passes(base)) for base in BASES], axis=1)


def _in_bases(scale: Floats, slope: Floats) -> Floats:
    """Writes a step as a sum of the steps on the bases.

    Raises:
        UnknownReductionError: the two move logprobs too much alike.
    """
    if not np.linalg.cond(scale) < _MOST_ALIKE:
        raise UnknownReductionError(
            "what this trainer divides losses by cannot be told: different tokens move all "
            "logprobs alike"
        )
    return np.linalg.solve(scale, slope).astype(np.float64)


class _Steps:
    """Takes steps on a model, and sees how far each moves the logprobs of head and tail."""

    def __init__(self, model: Trains) -> None:
        self.count = 0
        self.reports_sum: bool | None = None
        self._model = model
        self._rate = _FIRST_RATE
        self._eps = _FAR_EPS
        self._score: Floats | None = None

    @property
    def eps_is_near(self) -> bool:
        """Tells whether the trainer has refused an ``eps`` far above all gradients."""
        return self._eps == _NEAR_EPS

    def slope(self, way: _Round, send: _Send) -> Floats:
        """Takes a step on some requests, and again with another rate until it is long enough.

        Args:
            way: how long it should be.
            send: sends the requests for the model as it is.

        Returns:
            How far it moved the sums over head and tail, in nats per unit of the learning rate.

        Raises:
            UnknownReductionError: no step moves them as far.
        """
        size = 0.0
        for _ in range(6):
            moved = self._move(send)
            size = float(np.linalg.norm(moved))
            if not np.isfinite(size):
                break
            if way.target / 3 <= size <= way.target * 3:
                return moved / self._rate
            times = float(np.clip(way.target / (size or 1e-9), 1e-3, 1e3))
            self._rate *= times
            if self._eps == _NEAR_EPS:
                self._rate = min(_MOST_RATE, self._rate)
        raise UnknownReductionError(
            "what this trainer divides losses by cannot be told: a step moved a logprob by "
            f"{size:.2g}"
        )

    def passes(self, experiment: Requests) -> _Send:
        """Makes what sends the requests of an experiment, as cross-entropies."""

        def send() -> None:
            for request in experiment:
                self.send([_datum(piece) for piece in request], FORWARD_LOSS_FN)

        return send

    def send(self, data: Sequence[Datum], loss_fn: str) -> None:
        """Sends a request and waits for it, because some trainers compile for what they join."""
        output = self._model.forward_backward(list(data), loss_fn).result()
        found = returns_the_sum(loss_fn, data, output)
        if found is not None:
            self.reports_sum = found and self.reports_sum is not False

    def _move(self, send: _Send) -> Floats:
        before = self._scored() if self._score is None else self._score
        send()
        self._step()
        self._score = self._scored()
        return self._score - before

    def logprobs(self, data: Sequence[Datum]) -> list[npt.NDArray[np.float32]]:
        """Computes the logprobs of the targets as the model is."""
        output: ForwardBackwardOutput = self._model.forward(
            forward_data(data), FORWARD_LOSS_FN
        ).result()
        return output.logprobs

    def _step(self) -> None:
        try:
            self._model.optim_step(self._params()).result()
        except (BadRequestError, RequestFailedError):
            if self._eps == _NEAR_EPS:
                raise
            self._eps = _NEAR_EPS  # nothing was applied
            self._model.optim_step(self._params()).result()
        self.count += 1

    def _params(self) -> AdamParams:
        rate = self._rate * self._eps
        return AdamParams(learning_rate=rate, beta1=0.0, beta2=0.0, eps=self._eps)

    def _scored(self) -> Floats:
        [row] = self.logprobs([_datum(Piece(1, 1))])
        parts = row[:HEAD], row[HEAD:]
        return np.array([part.sum(dtype=np.float64) for part in parts])


def _datum(piece: Piece) -> Datum:
    tokens = _TOKENS[: piece.tokens + 1]
    return Datum(
        ModelInput.from_ints(tokens[:-1].tolist()),
        {"target_tokens": tokens[1:], "weights": piece.weights},
    )


def _base_divisors(reduction: Reduction) -> Floats:
    weights = [base[0][0].weights for base in BASES]
    return np.array([divisors(reduction, [[row]])[0][0] for row in weights])


def _error(found: Floats, expected: Floats) -> float:
    return float(np.max(np.abs(found - expected) / np.abs(expected)))
