"""Keeps the sessions of clients, what they have made, and what they sample from."""

from __future__ import annotations

import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from mintjax.errors import APIStatusError, NotFoundError
from mintjax.local.limits import Limits


@dataclass
class Session:
    """Records what one client has made.

    Args:
        display_name: for people.
        user_metadata: whatever the client said of itself.
        project_id: that it belongs to.
        model_ids: of the models that it trains.
        sampling_session_ids: of what it samples from.
        last_seen: when it last sent something, on the monotonic clock, in seconds.
    """

    display_name: str | None = None
    user_metadata: Mapping[str, object] | None = None
    project_id: str | None = None
    model_ids: list[str] = field(default_factory=list[str])
    sampling_session_ids: list[str] = field(default_factory=list[str])
    last_seen: float = field(default_factory=time.monotonic)


@dataclass
class Run:
    """Records a model in training.

    Args:
        session_id: of the client.
        project_id: of its session.
        user_metadata: whatever the client said of the model.
        last_request: when it was last asked for something, in seconds since 1970.
    """

    session_id: str
    project_id: str | None
    user_metadata: Mapping[str, object] | None
    last_request: float = field(default_factory=time.time)


@dataclass
class Sampler:
    """Records what a sampling session samples from.

    Args:
        session_id: of the client.
        source: a checkpoint's path, or a base model's name.
        copies: of the sampling client, in other processes.
    """

    session_id: str
    source: str
    copies: int = 0


class Left(NamedTuple):
    """The things that a session leaves behind.

    Args:
        model_ids: of the models that are still in training.
        sources: what it sampled from.
    """

    model_ids: list[str]
    sources: list[str]


class Sessions:
    """Keeps sessions of clients, and their sampling sessions. Any thread may call any method.

    Args:
        limits: how many there may be, and how long one is kept of a client that is gone.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._lock = threading.Lock()
        self._sessions: dict[str, Session] = {}
        self._runs: dict[str, Run] = {}
        self._samplers: dict[str, Sampler] = {}
        self._ended: OrderedDict[str, None] = OrderedDict()

    def open(
        self,
        display_name: str | None = None,
        user_metadata: Mapping[str, object] | None = None,
        project_id: str | None = None,
    ) -> str:
        """Begins a session; returns its id.

        Raises:
            BadRequestError: there are as many as there may be.
        """
        with self._lock:
            self._check_room("max_sessions", len(self._sessions), "sessions")
            session_id = f"session-{uuid.uuid4().hex}"
            self._sessions[session_id] = Session(display_name, user_metadata, project_id)
        return session_id

    def get(self, session_id: str) -> Session:
        """Returns one session.

        Raises:
            NotFoundError: there is none of that id.
            APIStatusError: 410, it has ended.
        """
        with self._lock:
            return self._get(session_id)

    def assign(self, session_id: str, project_id: str) -> None:
        """Moves a session, and its models, into a project.

        Raises:
            NotFoundError: there is none of that id.
        """
        with self._lock:
            session = self._get(session_id)
            session.project_id = project_id
            for model_id in session.model_ids:
                if model_id in self._runs:
                    self._runs[model_id].project_id = project_id

    def ids(self) -> list[str]:
        """Returns the ids of all sessions, the newest first."""
        with self._lock:
            return [*reversed(self._sessions)]

    def seen(
        self, *, session_id: str | None, model_id: str | None, sampling_session_id: str | None
    ) -> None:
        """Notes that the client of one of these is still there."""
        with self._lock:
            owner = session_id
            if model_id:
                run = self._runs.get(model_id)
                if run is not None:
                    run.last_request = time.time()
                owner = None if run is None else run.session_id
            elif sampling_session_id:
                sampler = self._samplers.get(sampling_session_id)
                owner = None if sampler is None else sampler.session_id
            if owner is not None and owner in self._sessions:
                self._sessions[owner].last_seen = time.monotonic()

    def check_room_for_model(self) -> None:
        """Checks that one more model may be made.

        Raises:
            BadRequestError: there are as many as there may be.
        """
        with self._lock:
            self._check_room("max_models", len(self._runs), "models")

    def add_model(
        self, session_id: str, model_id: str, user_metadata: Mapping[str, object] | None = None
    ) -> None:
        """Notes that a session has made a model.

        Raises:
            NotFoundError: the session has ended meanwhile.
            BadRequestError: there are as many models as there may be.
        """
        with self._lock:
            self._check_room("max_models", len(self._runs), "models")
            session = self._get(session_id)
            session.model_ids.append(model_id)
            self._runs[model_id] = Run(session_id, session.project_id, user_metadata)

    def remove_model(self, model_id: str) -> None:
        """Notes that a model is no longer in training; its session still lists it."""
        with self._lock:
            self._runs.pop(model_id, None)

    def runs(self) -> dict[str, Run]:
        """Returns the models in training, by id."""
        with self._lock:
            return dict(self._runs)

    def run(self, model_id: str) -> Run:
        """Returns what is recorded of a model in training.

        Raises:
            NotFoundError: its session has ended.
        """
        with self._lock:
            try:
                return self._runs[model_id]
            except KeyError:
                raise NotFoundError(404, f"model_id: {model_id!r} is in no session") from None

    def open_sampling(self, session_id: str, source: str) -> str:
        """Begins to sample from a checkpoint's path or a base model's name; returns an id.

        Raises:
            NotFoundError: there is no such session.
            BadRequestError: there are as many as there may be.
        """
        with self._lock:
            session = self._get(session_id)
            self._check_room("max_samplers", len(self._samplers), "sampling sessions")
            sampling_session_id = f"sampling-{uuid.uuid4().hex}"
            self._samplers[sampling_session_id] = Sampler(session_id, source)
            session.sampling_session_ids.append(sampling_session_id)
        return sampling_session_id

    def source(self, sampling_session_id: str) -> str:
        """Returns what a sampling session samples from.

        Raises:
            NotFoundError: there is none of that id.
        """
        with self._lock:
            return self._sampler(sampling_session_id).source

    def join(self, sampling_session_id: str) -> int:
        """Counts one more copy of a sampling session's client; returns its number, from 1 on.

        Raises:
            NotFoundError: there is none of that id.
        """
        with self._lock:
            sampler = self._sampler(sampling_session_id)
            sampler.copies += 1
            return sampler.copies

    def end(self, session_id: str) -> Left:
        """Ends a session, and returns what it leaves behind.

        One that has ended may be ended again, because the first answer may have been lost.

        Raises:
            NotFoundError: there is none of that id.
        """
        with self._lock:
            if session_id in self._ended:
                return Left([], [])
            session = self._get(session_id)
            del self._sessions[session_id]
            self._ended[session_id] = None
            if len(self._ended) > self._limits.max_sessions:
                self._ended.popitem(last=False)
            samplers = [self._samplers.pop(one, None) for one in session.sampling_session_ids]
            return Left(
                [one for one in session.model_ids if self._runs.pop(one, None) is not None],
                list({one.source for one in samplers if one is not None}),
            )

    def gone(self) -> Collection[str]:
        """Returns the ids of the sessions whose clients have sent nothing for too long."""
        oldest = time.monotonic() - self._limits.session_seconds
        with self._lock:
            return [name for name, one in self._sessions.items() if one.last_seen < oldest]

    def _get(self, session_id: str) -> Session:
        try:
            return self._sessions[session_id]
        except KeyError:
            if session_id in self._ended:
                raise APIStatusError(410, f"session_id: {session_id!r} has ended") from None
            raise NotFoundError(
                404,
                f"session_id: there is no session {session_id!r}; the trainer was restarted, or it "
                "ended long ago",
            ) from None

    def _sampler(self, sampling_session_id: str) -> Sampler:
        try:
            return self._samplers[sampling_session_id]
        except KeyError:
            raise NotFoundError(
                404, f"sampling_session_id: there is no sampling session {sampling_session_id!r}"
            ) from None

    def _check_room(self, name: str, there_are: int, of_what: str) -> None:
        self._limits.check(name, there_are + 1, f"{there_are} {of_what} are open already")
