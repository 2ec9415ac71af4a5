"""Runs, their checkpoints, and sessions of clients, as a trainer lists them."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal, TypeAlias

import msgspec

from mintjax.errors import DataError

CheckpointType: TypeAlias = str
"""``"training"``, ``"sampler"`` or ``"external"``; a trainer may have others."""

_KINDS = {"weights": "training", "sampler_weights": "sampler", "external_weights": "external"}


class ParsedCheckpointTinkerPath(msgspec.Struct, frozen=True, kw_only=True):
    """The parts of a checkpoint's path.

    Args:
        tinker_path: the whole.
        training_run_id: of the model that was saved.
        checkpoint_type: what it was saved for.
        checkpoint_id: its name within the run, ``weights/<name>`` or ``sampler_weights/<name>``.
    """

    tinker_path: str
    training_run_id: str
    checkpoint_type: CheckpointType
    checkpoint_id: str

    @classmethod
    def from_tinker_path(cls, tinker_path: str) -> ParsedCheckpointTinkerPath:
        """Reads ``tinker://<run>/<kind>/<name>``.

        Raises:
            DataError: it is no such path.
        """
        run, *rest = tinker_path.removeprefix("tinker://").split("/")
        if not tinker_path.startswith("tinker://") or len(rest) != 2 or rest[0] not in _KINDS:
            raise DataError(
                f"{tinker_path!r} is no checkpoint; it must read tinker://<run>/<kind>/<name>, "
                f"where the kind is one of {', '.join(_KINDS)}",
                field="tinker_path",
            )
        return cls(
            tinker_path=tinker_path,
            training_run_id=run,
            checkpoint_type=_KINDS[rest[0]],
            checkpoint_id="/".join(rest),
        )


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint, as a trainer lists it.

    Args:
        checkpoint_id: its name within the run, ``weights/<name>`` or ``sampler_weights/<name>``.
        checkpoint_type: what it was saved for.
        time: when.
        tinker_path: the whole path.
        size_bytes: of what is kept.
        public: whether everybody may load it.
        user_metadata: what was said of it when it was saved.
        expires_at: when it may be removed; never if None.
    """

    checkpoint_id: str
    checkpoint_type: CheckpointType
    time: datetime
    tinker_path: str
    size_bytes: int | None = None
    public: bool = False
    user_metadata: dict[str, Any] | None = None
    expires_at: datetime | None = None

    @property
    def training_run_id(self) -> str:
        """The run that it belongs to."""
        return ParsedCheckpointTinkerPath.from_tinker_path(self.tinker_path).training_run_id


class Cursor(msgspec.Struct, frozen=True, kw_only=True):
    """A part of a longer list.

    Args:
        offset: how many come before it.
        limit: how many were asked for.
        total_count: how many there are.
    """

    offset: int
    limit: int
    total_count: int


class CheckpointsListResponse(msgspec.Struct, frozen=True, kw_only=True):
    """Checkpoints, the newest first.

    Args:
        checkpoints: the checkpoints.
        cursor: the part that they are; None where all were asked for.
    """

    checkpoints: list[Checkpoint]
    cursor: Cursor | None = None


class TrainingRun(msgspec.Struct, frozen=True, kw_only=True):
    """A model, in training or saved, as a trainer lists it.

    Args:
        training_run_id: its ``model_id``.
        base_model: what it was made from.
        model_owner: whose it is.
        is_lora: whether its weights are adapters.
        last_request_time: when it was last trained or saved.
        corrupted: whether it is of no more use.
        lora_rank: of its adapters.
        last_checkpoint: the newest to train on from.
        last_sampler_checkpoint: the newest to sample from.
        user_metadata: what was said of it when it was made.
    """

    training_run_id: str
    base_model: str
    model_owner: str
    is_lora: bool
    last_request_time: datetime
    corrupted: bool = False
    lora_rank: int | None = None
    last_checkpoint: Checkpoint | None = None
    last_sampler_checkpoint: Checkpoint | None = None
    user_metadata: dict[str, Any] | None = None


class TrainingRunsResponse(msgspec.Struct, frozen=True, kw_only=True):
    """Runs, the newest first.

    Args:
        training_runs: the runs.
        cursor: the part that they are.
    """

    training_runs: list[TrainingRun]
    cursor: Cursor


class ListSessionsResponse(msgspec.Struct, frozen=True, kw_only=True):
    """The ids of sessions, the newest first.

    Args:
        sessions: the ids.
    """

    sessions: list[str]


class GetSessionResponse(msgspec.Struct, frozen=True, kw_only=True):
    """The models and samplers of one client.

    Args:
        training_run_ids: of its models.
        sampler_ids: of what it samples from.
        user_metadata: what it said of itself.
        display_name: for people.
    """

    training_run_ids: list[str]
    sampler_ids: list[str]
    user_metadata: dict[str, Any] | None = None
    display_name: str | None = None


class GetSamplerResponse(msgspec.Struct, frozen=True, kw_only=True):
    """The origin of the weights of a sampling session.

    Args:
        sampler_id: of the session.
        base_model: of the weights.
        model_path: of the checkpoint; None for a base model.
    """

    sampler_id: str
    base_model: str
    model_path: str | None = None


class OptimizerConfig(msgspec.Struct, frozen=True):
    """The family of an optimizer; its other fields are ignored.

    Args:
        type: its name.
    """

    type: str = "adamw"


class WeightsInfoResponse(msgspec.Struct, frozen=True, kw_only=True):
    """The shape of a model that can load a checkpoint.

    Args:
        base_model: that the model is made from.
        is_lora: whether its weights are adapters.
        lora_rank: of its adapters.
        train_unembed: whether the output projection is adapted, where the trainer says so.
        train_mlp: whether the feed-forward layers are.
        train_attn: whether the attention projections are.
        optimizer_config: of the model that was saved.
    """

    base_model: str
    is_lora: bool = True
    lora_rank: int | None = None
    train_unembed: bool | None = None
    train_mlp: bool | None = None
    train_attn: bool | None = None
    optimizer_config: OptimizerConfig = OptimizerConfig()


AccessScope = Literal["owned", "accessible"]
"""Whose runs and sessions are listed: one's own, or all that one may see."""
