"""Makes models on the trainer, some of them only to measure it."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from functools import partial
from typing import Literal

import msgspec

from mintjax.client.background import in_daemon_thread
from mintjax.client.connection import Connection
from mintjax.client.reductions import GRADIENTS
from mintjax.client.training import SECONDS_TO_UNLOAD, TrainingClient
from mintjax.errors import MintjaxError
from mintjax.protocol import messages
from mintjax.step.probe import (
    Measurement,
    SteepError,
    confirm_gradients,
    confirm_reduction,
    measure_reduction,
)
from mintjax.step.reduction import Reduction
from mintjax.types import LoraConfig

_RANKS = (8, 64)  # of throwaway models; the second where gradients of the first are not small


async def make_model(
    connection: Connection,
    base_model: str,
    config: LoraConfig,
    user_metadata: dict[str, str] | None = None,
) -> TrainingClient:
    """Makes a model, within the client's loop.

    Args:
        connection: the session.
        base_model: its name.
        config: of the adapters.
        user_metadata: kept with the model.
    """
    session, number = await connection.session(), next(connection.model_numbers)
    metadata = msgspec.UNSET if user_metadata is None else user_metadata  # some refuse a null
    request = messages.CreateModelRequest(session, number, base_model, config, metadata)
    made = await connection.run("create_model", request, messages.CreateModelResponse)
    return TrainingClient(connection, made.model_id, partial(measure_on, connection, base_model))


async def measure_on(
    connection: Connection,
    base_model: str,
    known: Reduction | Literal["gradients"] | None = None,
) -> Measurement:
    """Measures on a throwaway model, which is unloaded whatever happens.

    Args:
        connection: the session.
        base_model: of the model.
        known: check only whether the trainer has this reduction, or takes gradients of logprobs.

    Raises:
        UnknownReductionError: it cannot be told, or the trainer has another.
    """
    for rank in _RANKS:
        try:
            return await _measure_with(connection, base_model, known, rank)
        except SteepError:
            if rank == _RANKS[-1]:
                raise
    raise AssertionError


async def _measure_with(
    connection: Connection,
    base_model: str,
    known: Reduction | Literal["gradients"] | None,
    rank: int,
) -> Measurement:
    model = await make_model(connection, base_model, LoraConfig(rank, 0))

    def work() -> Measurement:
        if known is None:
            return measure_reduction(model)
        if known == GRADIENTS:
            return confirm_gradients(model, model._add_gradient)  # pyright: ignore[reportPrivateUsage]
        return confirm_reduction(model, known)

    try:
        return await in_daemon_thread(work, "mintjax-measurement")
    finally:
        with suppress(MintjaxError, TimeoutError):  # a trainer may have no such endpoint
            await asyncio.wait_for(asyncio.wrap_future(model.unload()), SECONDS_TO_UNLOAD)
