"""Serves losses that clients upload as graphs, and passes that name one of them."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mintjax.errors import DataError, NonFiniteError
from mintjax.local.engine import Engine
from mintjax.local.limits import Limits
from mintjax.local.loss_graphs import CustomLoss, DatumLoss
from mintjax.local.sessions import Sessions
from mintjax.protocol import messages
from mintjax.ragged.checks import check_data
from mintjax.step.carrier import FORWARD_LOSS_FN, forward_data
from mintjax.types import Datum, ForwardBackwardOutput

LOSS_FN = "custom"
"""The name by which a pass asks for an uploaded loss; its ``loss_id`` is in the pass's config."""

_LARGEST_WHOLE = 1 << 24  # beyond it float32 rounds integers

Run = Callable[[], Any]
Floats = npt.NDArray[np.float32]


class CustomLosses:
    """Keeps the losses of each session. Any thread may call any method.

    Args:
        engine: the trainer, which sums.
        sessions: those that there are.
        limits: bounds on what clients can make the trainer hold.
    """

    def __init__(self, engine: Engine, sessions: Sessions, limits: Limits) -> None:
        self._engine = engine
        self._sessions = sessions
        self._limits = limits
        self._lock = threading.Lock()
        self._losses: dict[str, dict[str, CustomLoss]] = {}  # by session and id
        self._numbered: dict[tuple[str, int], tuple[bytes, str]] = {}

    def create(self, request: messages.CreateCustomLossRequest) -> Run:
        """Reads a loss, for ``create_custom_loss``; whether its shapes fit is told in its turn.

        Raises:
            NotFoundError: there is no such session.
            DataError: the graph is none, or does what is not served; the message names the node.
            BadRequestError: it is beyond a limit.
        """
        self._sessions.get(request.session_id)
        loss = CustomLoss(request.name, request.inputs, request.graph, self._limits)
        content = messages.encode([request.name, request.inputs, request.graph])
        key = (request.session_id, request.custom_loss_seq_id)
        with self._lock:
            known = self._numbered.get(key)
            there_are = len(self._losses.get(request.session_id, {}))
        if known is not None and known[0] != content:
            raise DataError("another loss has this number", field="custom_loss_seq_id")
        if known is None:
            self._limits.check(
                "max_losses", there_are + 1, f"the session has made {there_are} losses"
            )

        def run() -> messages.CreateCustomLossResponse:
            loss.trace()
            self._sessions.get(request.session_id)  # it may have ended meanwhile
            with self._lock:
                _, loss_id = self._numbered.setdefault(key, (content, f"loss-{uuid.uuid4().hex}"))
                self._losses.setdefault(request.session_id, {})[loss_id] = loss
            return messages.CreateCustomLossResponse(loss_id)

        return run

    def end(self, session_id: str) -> None:
        """Forgets the losses of a session."""
        with self._lock:
            self._losses.pop(session_id, None)
            for key in [key for key in self._numbered if key[0] == session_id]:
                del self._numbered[key]

    def run_pass(
        self, model_id: str, given: messages.ForwardBackwardInput, *, backward: bool
    ) -> Run:
        """Checks a pass with an uploaded loss, and runs it in its turn.

        Args:
            model_id: which model.
            given: its data, and the ``loss_id`` in its config.
            backward: whether the gradient is added to what has accumulated.

        Raises:
            NotFoundError: there is no such model.
            DataError: there is no such loss in the model's session, or the data are not what it
                reads; the message names datum and field.
            BadRequestError: it is beyond a limit.
        """
        self._engine.model(model_id)
        loss = self._named(model_id, given.loss_fn_config or {})
        check_data(given.data, ["target_tokens"])
        data = forward_data(given.data)
        self._engine.check_pass(model_id, data, FORWARD_LOSS_FN, limits=self._limits)
        columns = [_columns(loss, datum, i) for i, datum in enumerate(given.data)]
        loss.check_sizes([datum.loss_fn_inputs["target_tokens"].shape for datum in data])

        def run() -> ForwardBackwardOutput:
            results: dict[int, DatumLoss] = {}

            def derivative(i: int, logprobs: Floats) -> Floats:
                results[i] = loss.evaluate(logprobs, columns[i])
                _check_finite(loss, i, results[i])
                return results[i].gradient

            if backward:
                output = self._engine.pull_back(model_id, data, derivative)
            else:
                output = self._engine.forward(model_id, data, FORWARD_LOSS_FN)
                for i, row in enumerate(output.logprobs):
                    derivative(i, row)
            return ForwardBackwardOutput(
                loss_fn_outputs=output.loss_fn_outputs, metrics=_metrics(list(results.values()))
            )

        return run

    def _named(self, model_id: str, config: Mapping[str, Any]) -> CustomLoss:
        loss_id = config.get("loss_id")
        if not isinstance(loss_id, str) or len(config) > 1:
            raise DataError(
                "a custom loss takes its loss_id, and nothing else", field="loss_fn_config"
            )
        with self._lock:
            loss = self._losses.get(self._sessions.run(model_id).session_id, {}).get(loss_id)
        if loss is None:
            raise DataError(
                f"there is no loss {loss_id[:80]!r} in this session; make one first, with "
                "create_custom_loss",
                field="loss_fn_config",
            )
        return loss


def _columns(loss: CustomLoss, datum: Datum, i: int) -> list[Floats]:
    """Takes the columns of a datum that a loss reads, in their order.

    Raises:
        DataError: one is missing, of another rank or length than it must be, not finite, or holds
            integers that float32 would round.
    """
    inputs, tokens = datum.loss_fn_inputs, datum.model_input.length
    targets: tuple[int, ...] = inputs["target_tokens"].shape
    if len(targets) != loss.inputs[0].rank:
        raise DataError(
            f"its shape is {list(targets)}, where loss {loss.name!r} takes logprobs of rank "
            f"{loss.inputs[0].rank}",
            datum=i,
            field="target_tokens",
        )
    found: list[Floats] = []
    candidates: dict[int, str] = {targets[1]: "target_tokens"} if len(targets) > 1 else {}
    for one in loss.columns:
        if one.name not in inputs:
            raise DataError(f"loss {loss.name!r} reads it", datum=i, field=one.name)
        column: Any = np.asarray(inputs[one.name])
        if one.rank == 0 and column.size == 1:  # protocol buffers tell no [] from [1]
            column = column.reshape(())
        if column.ndim != one.rank or (one.rank and len(column) != tokens):
            raise DataError(
                f"shape {list(column.shape)} does not fit the {tokens} tokens at rank {one.rank}",
                datum=i,
                field=one.name,
            )
        if one.rank == 2:
            candidates[column.shape[1]] = one.name
            if len(candidates) > 1:
                raise DataError(
                    f"shape {list(column.shape)}; all that is [T, K] has one K here",
                    datum=i,
                    field=one.name,
                )
        beyond = (column > _LARGEST_WHOLE) | (column < -_LARGEST_WHOLE)
        if column.dtype.kind in "iu" and np.any(beyond):
            raise DataError(
                f"an integer beyond {_LARGEST_WHOLE}, which is computed with float32 here",
                datum=i,
                field=one.name,
            )
        if not np.isfinite(column).all():
            raise DataError("a number is not finite", datum=i, field=one.name)
        found.append(column.astype(np.float32))
    return found


def _check_finite(loss: CustomLoss, i: int, result: DatumLoss) -> None:
    if not np.isfinite(result.loss) or not np.isfinite(result.gradient).all():
        raise NonFiniteError(
            f"datum {i}: loss {loss.name!r} or its gradient is not finite; nothing was applied",
            datum=i,
        )


def _metrics(results: Sequence[DatumLoss]) -> dict[str, float]:
    """Joins the metrics of datums as their suffixes say, and sums the losses.

    A metric that is not finite is left out, because no such number travels.
    """
    found = {"loss:sum": float(sum(result.loss for result in results))}
    for name in results[0].metrics:
        total = float(sum(result.metrics[name] for result in results))
        found[name] = total / len(results) if name.endswith(":mean") else total
    return {name: value for name, value in found.items() if np.isfinite(value)}
