"""New models on a trainer, and what a throwaway one tells of it."""

from __future__ import annotations

from mintjax import wire
from mintjax.client.connection import Connection
from mintjax.client.training import TrainingClient
from mintjax.probe import measure_reduction
from mintjax.surrogates import Reduction
from mintjax.types import LoraConfig


async def make_model(
    connection: Connection,
    base_model: str,
    config: LoraConfig,
    user_metadata: dict[str, str] | None = None,
) -> TrainingClient:
    """Have the trainer make a model."""
    request = wire.CreateModelRequest(
        session_id=await connection.session(),
        model_seq_id=next(connection.model_numbers),
        base_model=base_model,
        lora_config=config,
        user_metadata=user_metadata,
    )
    made = await connection.accepted("create_model", request, wire.CreateModelResponse)
    return TrainingClient(connection, made.model_id)


def probe(connection: Connection, base_model: str) -> Reduction:
    """Measure the trainer's reduction on a throwaway model, and remember it.

    Raises:
        MintjaxError: it cannot be told.
    """
    made = connection.start(lambda: make_model(connection, base_model, LoraConfig(8, 0)))
    with made.result() as model:
        connection.reduction = measure_reduction(model)
    return connection.reduction
