"""Bounds what clients can make the embedded trainer hold, and for how long."""

from __future__ import annotations

import dataclasses
import math

from mintjax.errors import BadRequestError, ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds what clients can make the trainer hold. An error names the limit that refused.

    Args:
        max_sessions: sessions of clients at a time.
        max_models: models in training at a time, of all sessions.
        max_samplers: sampling sessions at a time, of all sessions.
        max_rank: of a model's adapters.
        max_datum_tokens: tokens of one datum. The model's context is a bound of its own.
        max_targets: targets of one pass, over all datums; one a token, or K of ``[T, K]``.
        max_candidates: targets of one token, K of ``[T, K]``.
        max_loss_nodes: nodes of the graph of a loss that runs here.
        max_losses: losses of that kind that a session may make.
        max_body_bytes: of a request, also after it is decompressed.
        max_metadata_bytes: of what a client says of a session, a model or a checkpoint, as JSON.
        max_connections: open at a time. The one that has waited longest for its request is closed
            for a new one.
        request_seconds: for a request to arrive whole, from its first byte on or from the opening
            of its connection.
        session_seconds: after which the models and samplers of a client that sends nothing, not
            even a heartbeat, are let go; infinite to keep them.
        missing_seconds: for which a request waits for the ``seq_id`` before it.

    Raises:
        ConfigError: one of them is not above 0.
    """

    max_sessions: int = 10_000
    max_models: int = 2000
    max_samplers: int = 10_000
    max_rank: int = 512
    max_datum_tokens: int = 2048
    max_targets: int = 1 << 22
    max_candidates: int = 1024
    max_loss_nodes: int = 1000
    max_losses: int = 1000
    max_body_bytes: int = 128 * 1024 * 1024
    max_metadata_bytes: int = 16 * 1024
    max_connections: int = 512
    request_seconds: float = 120.0
    session_seconds: float = 3600.0
    missing_seconds: float = 600.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value: float = getattr(self, field.name)
            if math.isnan(value) or value <= 0:
                raise ConfigError(f"{field.name} must be above 0, not {value}")

    def check(self, name: str, value: float, what: str, status: int = 400) -> None:
        """Refuses what is beyond a limit.

        Args:
            name: the limit's.
            value: what is asked for.
            what: the words for it.
            status: of the answer.

        Raises:
            BadRequestError: ``value`` is larger than the limit; the message names it, and says how
                to raise it.
        """
        if value > getattr(self, name):
            raise BadRequestError(status, self.refusal(name, what))

    def refusal(self, name: str, what: str) -> str:
        """Words the refusal of what is beyond a limit.

        Args:
            name: the limit's.
            what: the words for what is asked for.
        """
        option = name.replace("_", "-")
        return (
            f"{name}: {what}, where this trainer allows {getattr(self, name)}. To raise it, start "
            f"the trainer with --{option}, or with limits=Limits({name}=...)"
        )


DEFAULT_LIMITS = Limits()
