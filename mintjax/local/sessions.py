"""Keeps the sessions of clients, and the weights that they sample from."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field

from mintjax.errors import NotFoundError


@dataclass
class Session:
    """The models and samplers that one client has made."""

    model_ids: list[str] = field(default_factory=list[str])
    sampling_session_ids: list[str] = field(default_factory=list[str])


class Sessions:
    """Sessions of clients, and their sampling sessions."""

    def __init__(self) -> None:
        self._sessions: dict[str, Session] = {}
        self._sources: dict[str, str] = {}

    def open(self) -> str:
        """Begin a session; returns its id."""
        session_id = f"session-{uuid.uuid4().hex}"
        self._sessions[session_id] = Session()
        return session_id

    def get(self, session_id: str) -> Session:
        """One session.

        Raises:
            NotFoundError: there is none of that id.
        """
        try:
            return self._sessions[session_id]
        except KeyError:
            raise NotFoundError(404, f"session_id: there is no session {session_id!r}") from None

    def of_model(self, model_id: str) -> Session:
        """The session that a model was made in."""
        return next(session for session in self._sessions.values() if model_id in session.model_ids)

    def open_sampling(self, session: Session, source: str) -> str:
        """Begin to sample from a checkpoint's path or a base model's name; returns an id."""
        sampling_session_id = f"sampling-{uuid.uuid4().hex}"
        self._sources[sampling_session_id] = source
        session.sampling_session_ids.append(sampling_session_id)
        return sampling_session_id

    def source(self, sampling_session_id: str) -> str:
        """Finds the weights that a sampling session samples from.

        Raises:
            NotFoundError: there is none of that id.
        """
        try:
            return self._sources[sampling_session_id]
        except KeyError:
            raise NotFoundError(
                404, f"sampling_session_id: there is no sampling session {sampling_session_id!r}"
            ) from None
