"""Objectives that the trainer runs by itself: each is written and uploaded once for a session."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable, Hashable
from typing import Any, NamedTuple, TypeVar

import numpy as np

from mintjax.errors import APIError
from mintjax.gradients import Objective
from mintjax.gradients.identity import identify, traces_of
from mintjax.gradients.lengths import kind_of
from mintjax.protocol import messages
from mintjax.ragged.batch import Batch
from mintjax.step.one_datum import server_loss
from mintjax.step.server_loss import NotLowered, ServerLoss

T = TypeVar("T")

logger = logging.getLogger("mintjax.client")

MOST_VALUES = 3
"""An objective whose numbers have had so many values is not uploaded with another, because each
takes a request of its own."""

_KEPT = 256  # losses held at a time, the oldest dropped first


class Named(NamedTuple):
    """A loss, and what tells it from all others.

    Args:
        key: equal for two losses exactly if they mean the same, their numbers included.
        loss: for the trainer.
    """

    key: Hashable
    loss: ServerLoss


class ServerLosses:
    """Keeps the losses that one session has uploaded."""

    def __init__(self) -> None:
        self._written: dict[Hashable, ServerLoss | None] = {}
        self._values: dict[Hashable, set[Hashable]] = {}
        self._ids: dict[Hashable, str | None] = {}
        self._numbers = itertools.count()
        self._uploading = asyncio.Lock()

    def written(self, objective: Objective, data: Batch) -> Named | None:
        """Writes an objective for the trainer, unless it was written before.

        What tells two objectives apart is all that they can reach, as for compiled programs, and
        the values of their numbers, because these are constants of the graph.

        Args:
            objective: the objective as it is now.
            data: the batch.

        Returns:
            None if it cannot be written, or if its numbers change too often.
        """
        identity = identify(objective)
        kinds = tuple((name, repr(kind_of(data, name))) for name in sorted(data.names))
        targets = data.rows("target_tokens")[0]
        program = (identity.key, identity.parameter_kinds, kinds, targets.shape[1:])
        numbers = tuple(np.asarray(value).tobytes() for value in identity.parameters)
        key = (program, numbers)
        if key not in self._written:
            loss = None
            values = self._values.setdefault(program, set())
            if len(values) < MOST_VALUES:
                values.add(numbers)
                try:
                    with traces_of(key if identity.keeps_traces else None):
                        loss = server_loss(objective, data)
                except NotLowered as error:
                    logger.info("%s goes by two passes, because %s", objective, error)
            else:
                logger.info("%s goes by two passes, because its numbers change", objective)
            _add(self._written, key, loss)
        loss = self._written[key]
        return None if loss is None else Named(key, loss)

    async def loss_id(
        self, named: Named, session_id: str, run: Callable[..., Awaitable[Any]]
    ) -> str | None:
        """Uploads a loss, unless it was uploaded before.

        Args:
            named: the loss.
            session_id: of the session.
            run: sends a request and waits for its result, as ``Connection.run`` does.

        Returns:
            The trainer's name of it; None if the trainer refuses it, or cannot be asked.
        """
        async with self._uploading:
            if named.key in self._ids:
                return self._ids[named.key]
            request = messages.CreateCustomLossRequest(
                session_id,
                next(self._numbers),
                named.loss.name,
                named.loss.inputs,
                named.loss.graph,
            )
            try:
                made = await run("create_custom_loss", request, messages.CreateCustomLossResponse)
            except APIError as error:
                logger.info("the trainer does not run %s: %s", named.loss.name, error)
                _add(self._ids, named.key, None)
                return None
            _add(self._ids, named.key, made.loss_id)
            return made.loss_id

    def refused(self, loss_id: str) -> None:
        """Notes that the trainer does not run a loss that it has taken."""
        for key, known in self._ids.items():
            if known == loss_id:
                self._ids[key] = None


def _add(kept: dict[Hashable, T], key: Hashable, value: T) -> None:
    if len(kept) >= _KEPT:
        del kept[next(iter(kept))]
    kept[key] = value
