"""Lists what the embedded trainer keeps, and changes what holds of checkpoints."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, TypeVar

import msgspec

from mintjax.errors import DataError, NotFoundError
from mintjax.local import checkpoints
from mintjax.local.checkpoints import CheckpointPath, Found, Tags
from mintjax.local.engine import Engine
from mintjax.local.sessions import Run, Sessions
from mintjax.protocol import messages
from mintjax.runs import (
    Checkpoint,
    CheckpointsListResponse,
    Cursor,
    GetSessionResponse,
    ListSessionsResponse,
    TrainingRun,
    TrainingRunsResponse,
)

T = TypeVar("T")

OWNER = "local"
"""The owner of all runs, because there are no accounts."""

HOUR = 3600
TEN_YEARS = 10 * 366 * 24 * HOUR
MOST_AT_ONCE = 1000
"""Longer lists come in parts."""


class Page(msgspec.Struct, frozen=True):
    """The part of a list that is asked for; in the query, where all is text.

    Args:
        limit: at most so many; :data:`MOST_AT_ONCE` if it is more.
        offset: without so many of the first.
        project_id: only of sessions of this project; of all if None.
        access_scope: of no matter here, because there are no accounts.
    """

    limit: Annotated[int, msgspec.Meta(ge=1, le=2**53)] = 20
    offset: Annotated[int, msgspec.Meta(ge=0, le=2**53)] = 0
    project_id: str | None = None
    access_scope: str = "owned"

    def cut(self, everything: Sequence[T]) -> tuple[Sequence[T], Cursor]:
        """Cuts out the part; also says which part it is."""
        limit = min(self.limit, MOST_AT_ONCE)
        cursor = Cursor(offset=self.offset, limit=limit, total_count=len(everything))
        return everything[self.offset : self.offset + limit], cursor


class Administration:
    """The requests that list and change what is kept. Any thread may call any method.

    Args:
        engine: the trainer, whose models and files are only looked at.
        sessions: of its clients.
    """

    def __init__(self, engine: Engine, sessions: Sessions) -> None:
        self._engine = engine
        self._sessions = sessions
        self._changing = threading.Lock()

    def list_sessions(self, page: Page) -> ListSessionsResponse:
        """Answers ``GET sessions``."""
        ids, _ = page.cut(self._sessions.ids())
        return ListSessionsResponse(sessions=list(ids))

    def get_session(self, session_id: str) -> GetSessionResponse:
        """Answers ``GET sessions/<id>``."""
        session = self._sessions.get(session_id)
        metadata = session.user_metadata
        return GetSessionResponse(
            training_run_ids=session.model_ids,
            sampler_ids=session.sampling_session_ids,
            user_metadata=None if metadata is None else dict(metadata),
            display_name=session.display_name,
        )

    def assign_project(self, session_id: str, project_id: str) -> None:
        """Answers ``PUT sessions/<id>/project``."""
        if not project_id:
            raise DataError("name one", field="project_id")
        self._sessions.assign(session_id, project_id)

    def copy_weights(self, request: messages.CopyWeightsRequest) -> messages.CopyWeightsResponse:
        """Answers ``POST copy_weights``, into a project, or as the model of a session's number.

        Whoever may use this trainer may read all of its checkpoints, so no token is asked for.
        """
        source = CheckpointPath.parse(request.source_path, field="source_path")
        check_ttl(request.ttl_seconds)
        model_id, project_id = f"copy-{uuid.uuid4().hex}", request.destination_project_id
        if request.session_id is not None and request.model_seq_id is not None:
            project_id = self._sessions.get(request.session_id).project_id
            model_id = f"{request.session_id}:train:{request.model_seq_id}"
            if model_id in self._engine.models or checkpoints.find_all(
                self._engine.directory, model_id
            ):
                raise DataError(f"there is a run {model_id} already", field="model_seq_id")
        elif project_id is None:
            raise DataError(
                "pass it, or session_id and model_seq_id", field="destination_project_id"
            )
        target = checkpoints.copy(
            self._engine.directory,
            source,
            model_id,
            project_id=project_id,
            ttl_seconds=request.ttl_seconds,
        )
        return messages.CopyWeightsResponse(str(target))

    def list_training_runs(self, page: Page) -> TrainingRunsResponse:
        """Answers ``GET training_runs``: models in training, and those that have checkpoints."""
        saved: dict[str, list[Found]] = {}
        for found in checkpoints.find_all(self._engine.directory):
            saved.setdefault(found.path.model_id, []).append(found)
        trained = self._sessions.runs()
        everything = [
            self._training_run(model_id, trained.get(model_id), saved.get(model_id, []))
            for model_id in {**trained, **saved}
            if page.project_id in (None, _project_of(trained.get(model_id), saved.get(model_id)))
        ]
        known = [run for run in everything if run is not None]
        known.sort(key=lambda run: run.last_request_time, reverse=True)
        runs, cursor = page.cut(known)
        return TrainingRunsResponse(training_runs=list(runs), cursor=cursor)

    def get_training_run(self, training_run_id: str) -> TrainingRun:
        """Answers ``GET training_runs/<id>``."""
        saved = checkpoints.find_all(self._engine.directory, training_run_id)
        run = self._training_run(training_run_id, self._sessions.runs().get(training_run_id), saved)
        if run is None:
            raise _no_run(training_run_id)
        return run

    def list_checkpoints_of(self, training_run_id: str) -> CheckpointsListResponse:
        """Answers ``GET training_runs/<id>/checkpoints``, with all of them."""
        found = checkpoints.find_all(self._engine.directory, training_run_id)
        if not found and training_run_id not in self._engine.models:
            raise _no_run(training_run_id)
        return CheckpointsListResponse(checkpoints=[_listed(one) for one in found])

    def list_checkpoints(self, page: Page) -> CheckpointsListResponse:
        """Answers ``GET checkpoints``, with those of all runs."""
        found, cursor = page.cut(checkpoints.find_all(self._engine.directory))
        return CheckpointsListResponse(checkpoints=[_listed(one) for one in found], cursor=cursor)

    def delete(self, path: CheckpointPath) -> None:
        """Answers ``DELETE training_runs/<id>/checkpoints/<kind>/<name>``."""
        checkpoints.remove(self._engine.directory, path)

    def publish(self, path: CheckpointPath, public: bool) -> None:
        """Answers ``training_runs/<id>/checkpoints/<kind>/<name>/publish``, POST and DELETE.

        It is only noted, because whoever may use this trainer may load all of its checkpoints.
        """
        self._change(path, lambda tags: msgspec.structs.replace(tags, public=public))

    def set_ttl(self, path: CheckpointPath, ttl_seconds: int | None) -> None:
        """Answers ``PUT training_runs/<id>/checkpoints/<kind>/<name>/ttl``; None is for ever."""
        check_ttl(ttl_seconds)
        expires = None if ttl_seconds is None else checkpoints.time.time() + ttl_seconds
        self._change(path, lambda tags: msgspec.structs.replace(tags, expires=expires))

    def _change(self, path: CheckpointPath, make: Callable[[Tags], Tags]) -> None:
        with self._changing:
            checkpoints.change(self._engine.directory, path, make)

    def _training_run(
        self, model_id: str, run: Run | None, saved: Sequence[Found]
    ) -> TrainingRun | None:
        """Describes a run; None where nothing is left of it."""
        model = self._engine.models.get(model_id)
        if run is not None and model is not None:
            base_model, lora_config = model.config.name, model.lora_config
            metadata, last = run.user_metadata, run.last_request
        elif saved:
            newest = saved[0].description
            base_model, lora_config = newest.base_model, newest.lora_config
            metadata, last = newest.run_metadata, saved[0].created
        else:
            return None
        kinds = ("weights", "sampler_weights")
        newest_of = {one.path.kind: _listed(one) for one in reversed(saved)}
        training, sampler = (newest_of.get(kind) for kind in kinds)
        return TrainingRun(
            training_run_id=model_id,
            base_model=base_model,
            model_owner=OWNER,
            is_lora=True,
            last_request_time=_time(last),
            lora_rank=lora_config.rank,
            last_checkpoint=training,
            last_sampler_checkpoint=sampler,
            user_metadata=None if metadata is None else dict(metadata),
        )


def check_ttl(ttl_seconds: int | None) -> None:
    """Refuses a time that is too short or too long.

    Raises:
        DataError: it is not an hour to ten years.
    """
    if ttl_seconds is not None and not HOUR <= ttl_seconds <= TEN_YEARS:
        raise DataError(
            f"{ttl_seconds} is not in an hour, {HOUR}, to ten years, {TEN_YEARS}",
            field="ttl_seconds",
        )


def _project_of(run: Run | None, saved: Sequence[Found] | None) -> str | None:
    if run is not None:
        return run.project_id
    return saved[0].description.project_id if saved else None


def _listed(found: Found) -> Checkpoint:
    path, description, tags, size, created = found
    return Checkpoint(
        checkpoint_id=f"{path.kind}/{path.name}",
        checkpoint_type="training" if path.kind == "weights" else "sampler",
        time=_time(created),
        tinker_path=str(path),
        size_bytes=size,
        public=tags.public,
        user_metadata=description.user_metadata,
        expires_at=None if tags.expires is None else _time(tags.expires),
    )


def _time(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def _no_run(training_run_id: Any) -> NotFoundError:
    return NotFoundError(404, f"training_run_id: there is no run {training_run_id!r}")
