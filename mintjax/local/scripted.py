"""A trainer for tests of training code: its logprobs are given, and it keeps what it gets."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mintjax import objectives
from mintjax.client import ServiceClient
from mintjax.errors import DataError
from mintjax.gradients import value_and_logprob_grads
from mintjax.local.engine import Engine
from mintjax.local.server import trainer
from mintjax.tensors import TensorData
from mintjax.types import AdamParams, Datum, ForwardBackwardOutput, OptimStepResponse


class ScriptedPass(NamedTuple):
    """A backward pass that a scripted trainer got.

    Args:
        data: the datums as they were sent, with the columns that carry the gradient.
        loss_fn: the name of the loss that was asked for.
        grads: the derivative of the loss by each datum's logprobs, ``[T]`` or ``[T, K]``, float32.
    """

    data: list[Datum]
    loss_fn: str
    grads: list[npt.NDArray[np.float32]]


class ScriptedStep(NamedTuple):
    """An optimizer step that a scripted trainer got.

    Args:
        passes: the backward passes before it, since the last optimizer step.
        adam_params: its hyperparameters.
    """

    passes: list[ScriptedPass]
    adam_params: AdamParams


class ScriptedTrainer(Engine):
    """A trainer without a model, for one training client.

    Args:
        logprobs: gives the logprobs of a datum's targets, in nats, in the shape of its
            ``target_tokens``; called at every pass.

    Attributes:
        steps: the optimizer steps so far, in order.
        passes: the backward passes since the last of them.

    It checks requests as the embedded trainer does. Its losses and their gradients are those of
    :mod:`mintjax.objectives`, and they are sums. Sampling and checkpoints are the embedded
    trainer's, of a model that no step changes.
    """

    def __init__(self, logprobs: Callable[[Datum], npt.ArrayLike]) -> None:
        super().__init__()
        self.steps: list[ScriptedStep] = []
        self.passes: list[ScriptedPass] = []
        self._logprobs = logprobs

    def forward(
        self,
        model_id: str,
        data: Sequence[Datum],
        loss_fn: str,
        loss_fn_config: Mapping[str, float] | None = None,
    ) -> ForwardBackwardOutput:
        """Returns the logprobs that are given, and their loss; keeps nothing.

        Raises:
            DataError: the logprobs that are given have another shape than the targets.
            NonFiniteError: the loss or its gradient is not finite.
        """
        return self._scripted(data, loss_fn, loss_fn_config)[0]

    def forward_backward(
        self,
        model_id: str,
        data: Sequence[Datum],
        loss_fn: str,
        loss_fn_config: Mapping[str, float] | None = None,
    ) -> ForwardBackwardOutput:
        """Does as :meth:`forward`, and keeps the pass and its gradient."""
        output, grads = self._scripted(data, loss_fn, loss_fn_config)
        self.passes.append(ScriptedPass(list(data), loss_fn, grads))
        return output

    def optim_step(self, model_id: str, params: AdamParams) -> OptimStepResponse:
        """Keeps the step with the passes before it; no weights change."""
        self.steps.append(ScriptedStep(self.passes, params))
        self.passes = []
        return OptimStepResponse()

    def _scripted(
        self, data: Sequence[Datum], loss_fn: str, config: Mapping[str, float] | None
    ) -> tuple[ForwardBackwardOutput, list[npt.NDArray[np.float32]]]:
        rows = [np.asarray(self._logprobs(datum), np.float32) for datum in data]
        for i, (datum, row) in enumerate(zip(data, rows, strict=True)):
            wanted = datum.loss_fn_inputs["target_tokens"].shape
            if row.shape != wanted:
                raise DataError(
                    f"the scripted logprobs have the shape {list(row.shape)}, where target_tokens "
                    f"has {list(wanted)}",
                    datum=i,
                    field="logprobs",
                )
        objective: Any = getattr(objectives, loss_fn)(**(config or {}))
        result = value_and_logprob_grads(objective, list(data), rows)
        output = ForwardBackwardOutput(
            loss_fn_outputs=[{"logprobs": TensorData(row)} for row in rows],
            metrics={"loss:sum": float(result.loss)},
        )
        return output, result.grads


@contextmanager
def scripted_trainer(
    logprobs: Callable[[Datum], npt.ArrayLike] = lambda datum: np.full(
        datum.loss_fn_inputs["target_tokens"].shape, -1.0, np.float32
    ),
) -> Generator[tuple[ServiceClient, ScriptedTrainer]]:
    """Runs a trainer for tests of training code, in this process and without a model.

    It takes milliseconds where a model takes seconds. Base models are those of
    ``mintjax.local.BASE_MODELS``; ``"mintjax/nano"`` is the smallest. It needs the extra ``local``.

    Args:
        logprobs: gives the logprobs of a datum's targets, in nats, in the shape of its
            ``target_tokens``; -1 for each target by default.

    Yields:
        A client for the code under test, and the trainer, which keeps what it gets.

    Example:
        >>> from mintjax import AdamParams, Datum, ModelInput
        >>> from mintjax.local import scripted_trainer
        >>> tokens = ModelInput.from_ints([1, 2])
        >>> datum = Datum(tokens, {"target_tokens": [2, 3], "weights": [0.0, 1.0]})
        >>> with scripted_trainer() as (service, script):
        ...     model = service.create_lora_training_client("mintjax/nano", rank=1)
        ...     _ = model.forward_backward([datum], "cross_entropy").result()
        ...     _ = model.optim_step(AdamParams(learning_rate=0.1)).result()
        >>> step, = script.steps
        >>> step.adam_params.learning_rate, step.passes[0].grads[0].tolist()
        (0.1, [0.0, -1.0])
    """
    script = ScriptedTrainer(logprobs)
    with script, trainer(script) as service:
        yield service, script
