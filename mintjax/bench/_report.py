"""An objective's cost for batches of several sizes, alone or beside another implementation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import numpy as np

from mintjax.bench import _torch
from mintjax.bench._clock import Timing, interleaved
from mintjax.bench._machine import Machine, machine
from mintjax.bench._steps import StepTimes
from mintjax.bench._subject import load
from mintjax.bench._synthetic import Arrays, Synthetic
from mintjax.errors import ConfigError, MintjaxError
from mintjax.gradients import Objective, value_and_logprob_grads
from mintjax.gradients.torch import torch_objective
from mintjax.ragged.batch import Batch

_AGREE = 1e-3  # of the largest gradient; implementations of one loss differ by rounding only

Implementations = dict[str, Callable[[Arrays], Any]]


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The batches and the number of steps to measure.

    Args:
        objective: its name, for the report.
        datums: the sizes of batches, B, one after the other.
        steps: measured steps of each size.
        warm_up: steps in front of them that do not count.
        against: None, ``"torch"`` for the counterpart of one of mintjax's own objectives, or
            ``"module:function"`` for a torch loss ``(data, list of tensors) -> (loss, metrics)``.
    """

    objective: str
    datums: tuple[int, ...] = (256,)
    steps: int = 20
    warm_up: int = 5
    against: str | None = None


class Result(msgspec.Struct, kw_only=True):
    """The times of one implementation for batches of one size.

    Args:
        implementation: ``"mintjax"``, ``"torch"``, or the name of what was given.
        datums: B.
        median_ms: of a step, in milliseconds.
        p90_ms: nine steps of ten took no longer.
        first_ms: the first step, with everything that is done once.
        compilations: programs that mintjax had compiled, in the warm-up too.
        tokens_per_second: tokens of a step over its time; the median.
        step_ms: every step in order, those of the warm-up first.
    """

    implementation: str
    datums: int
    median_ms: float
    p90_ms: float
    first_ms: float
    compilations: int
    tokens_per_second: float
    step_ms: list[float]


class Report(msgspec.Struct, kw_only=True):
    """The results, with the machine that they are of.

    Args:
        objective: its name.
        columns: of the batches.
        lengths: least and greatest number of tokens.
        steps: measured steps of each size.
        warm_up: steps in front of them.
        results: for each size and implementation.
        gradient_difference: the largest between two implementations, over the largest gradient;
            None if there was only one.
        machine: where.
        trainer: whose steps were timed, if any were.
        custom_steps: where the time of those steps went, for each size.
    """

    objective: str
    columns: tuple[str, ...]
    lengths: tuple[int, int]
    steps: int
    warm_up: int
    results: list[Result]
    gradient_difference: float | None
    machine: Machine
    trainer: str | None = None
    custom_steps: list[StepTimes] = []


def run(
    objective: Objective,
    source: Synthetic,
    settings: Settings,
    on_step: Callable[[], object] = lambda: None,
) -> Report:
    """Time ``value_and_logprob_grads`` of an objective on fresh lengths in every step.

    What is timed goes from a list of NumPy arrays of logprobs to one of gradients: packing,
    the compiled gradient, unpacking and the check that all is finite.

    Args:
        objective: ``(data, logprobs) -> (loss, metrics)``.
        source: of the batches; the columns that the objective reads are added to it.
        settings: how much, and against what.
        on_step: called after each step.

    Returns:
        The report.

    Raises:
        ConfigError: there is nothing of that name to compare with.
        MintjaxError: the other implementation's gradients are not the same.
        Exception: whatever the objective raises.
    """
    implementations: Implementations = {"mintjax": _ours(objective)}
    if settings.against is not None:
        name, other = _other(objective, settings)
        implementations[name] = other
    results: list[Result] = []
    differences: list[float] = []
    for datums in settings.datums:
        source.complete(objective, datums)
        tokens: list[int] = []
        timings = interleaved(
            implementations,
            _batches(source, datums, settings.warm_up + settings.steps, tokens),
            warm_up=settings.warm_up,
            on_step=on_step,
        )
        results += [_result(name, datums, tokens, timing) for name, timing in timings.items()]
        if len(implementations) > 1:
            differences.append(_difference(source.batch(datums), implementations))
    return Report(
        objective=settings.objective,
        columns=source.columns,
        lengths=source.lengths,
        steps=settings.steps,
        warm_up=settings.warm_up,
        results=results,
        gradient_difference=max(differences, default=None),
        machine=machine(),
    )


def _batches(source: Synthetic, datums: int, steps: int, tokens: list[int]) -> Iterator[Arrays]:
    for _ in range(steps):
        arrays = source.batch(datums)
        tokens.append(sum(len(row) for row in arrays.logprobs))
        yield arrays


def _ours(objective: Objective) -> Callable[[Arrays], Any]:
    return lambda arrays: value_and_logprob_grads(objective, arrays.data, arrays.logprobs).grads


def _other(objective: Objective, settings: Settings) -> tuple[str, Callable[[Arrays], Any]]:
    against = settings.against
    assert against is not None
    if against != "torch":
        theirs = torch_objective(load(against))
        _torch.import_torch()
        return against, lambda arrays: theirs.evaluate(Batch(arrays.data), arrays.logprobs)[2]
    found = _torch.counterpart(objective)
    if found is None:
        raise ConfigError(
            f"mintjax has no torch counterpart of {settings.objective}; name yours, a function "
            "(data, list of tensors) -> (loss, metrics): --against my_module:torch_loss"
        )
    return "torch", _torch.gradient(*found)


def _difference(arrays: Arrays, implementations: Implementations) -> float:
    (_, ours), (name, theirs) = (
        (name, np.concatenate([np.ravel(grad) for grad in gradient(arrays)]))
        for name, gradient in implementations.items()
    )
    scale = max(float(np.abs(ours).max()), float(np.abs(theirs).max()))
    difference = float(np.abs(ours - theirs).max()) / (scale or 1.0)
    if not difference <= _AGREE:
        at = int(np.argmax(np.abs(ours - theirs)))
        raise MintjaxError(
            f"{name} is another loss: its gradient at token {at} of the batch is {theirs[at]:.6g}, "
            f"where the objective's is {ours[at]:.6g}; times would not compare"
        )
    return difference


def _result(name: str, datums: int, tokens: list[int], timing: Timing) -> Result:
    counted = slice(timing.warm_up, None)
    rates = [n / s for n, s in zip(tokens[counted], timing.seconds[counted], strict=True)]
    return Result(
        implementation=name,
        datums=datums,
        median_ms=1e3 * timing.quantile(0.5),
        p90_ms=1e3 * timing.quantile(0.9),
        first_ms=1e3 * timing.seconds[0],
        compilations=sum(timing.compilations),
        tokens_per_second=float(np.median(rates)),
        step_ms=[1e3 * seconds for seconds in timing.seconds],
    )
