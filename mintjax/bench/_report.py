"""Measures an objective for several batch sizes, alone or beside another implementation."""

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

_AGREE = 1e-3  # of the largest gradient, because two implementations differ only by rounding

Implementations = dict[str, Callable[[Arrays], Any]]


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The batches and the number of steps to measure.

    Args:
        objective: the objective's name, for the report.
        datums: the batch sizes B to measure, in order.
        steps: the number of measured steps for each size.
        warm_up: the number of steps before them that do not count.
        against: None, ``"torch"`` for the counterpart of one of mintjax's own objectives, or
            ``"module:function"`` for a torch loss ``(data, list of tensors) -> (loss, metrics)``.
    """

    objective: str
    datums: tuple[int, ...] = (256,)
    steps: int = 20
    warm_up: int = 5
    against: str | None = None


class Result(msgspec.Struct, kw_only=True):
    """The times of one implementation for one batch size.

    Args:
        implementation: ``"mintjax"``, ``"torch"``, or the name of the given function.
        datums: the batch size B.
        median_ms: the median time of a step, in milliseconds.
        p90_ms: the 90th percentile, in milliseconds.
        first_ms: the time of the first step, which compiles.
        compilations: the number of programs that mintjax compiled, with the warm-up.
        tokens_per_second: the median of the tokens of a step divided by its time.
        step_ms: the time of every step in order, with the warm-up.
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
    """The results, with a description of the machine.

    Args:
        objective: the objective's name.
        columns: the names of the columns in the batches.
        lengths: the least and the greatest number of tokens of a datum.
        steps: the number of measured steps for each size.
        warm_up: the number of steps before them.
        results: one for each size and implementation.
        gradient_difference: the largest difference between the gradients of two implementations,
            divided by the largest gradient; None if there was only one implementation.
        machine: the machine and the versions.
        trainer: the trainer whose steps were timed, or None.
        custom_steps: the parts of a custom step's time, for each size.
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
    """Times ``value_and_logprob_grads`` of an objective, with new lengths in every step.

    The time goes from a list of NumPy arrays of logprobs to a list of gradients: packing, the
    compiled gradient, unpacking, and the check that all numbers are finite.

    Args:
        objective: ``(data, logprobs) -> (loss, metrics)``.
        source: makes the batches; the columns that the objective reads are added to it.
        settings: the sizes, the number of steps, and what to compare with.
        on_step: called after each step.

    Returns:
        The report.

    Raises:
        ConfigError: the implementation to compare with does not exist.
        MintjaxError: the other implementation's gradients differ.
        Exception: any exception of the objective.
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
            f"{name} computes another loss: its gradient at token {at} of the batch is "
            f"{theirs[at]:.6g}, "
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
