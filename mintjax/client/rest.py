"""Runs, checkpoints and sessions on a trainer: listed, published, expired, deleted."""

from __future__ import annotations

import os
import urllib.parse
from typing import Any, TypeVar

import httpx

from mintjax.client.connection import Connection
from mintjax.client.futures import APIFuture, MadeClient, awaited
from mintjax.client.settings import RetryPolicy, Settings, resolve
from mintjax.client.transport import Request
from mintjax.errors import DataError
from mintjax.protocol import messages
from mintjax.runs import (
    AccessScope,
    CheckpointsListResponse,
    GetSamplerResponse,
    GetSessionResponse,
    ListSessionsResponse,
    ParsedCheckpointTinkerPath,
    TrainingRun,
    TrainingRunsResponse,
    WeightsInfoResponse,
)
from mintjax.types import ServerCapabilities

T = TypeVar("T")


class RestClient(MadeClient):
    """Lists and changes what a trainer keeps. It opens no session.

    Made by itself, or by :meth:`ServiceClient.create_rest_client`. A trainer may lack some of these
    requests; it then answers with 404, a :class:`~mintjax.errors.NotFoundError`.

    Args:
        base_url: the trainer's address; as :class:`ServiceClient` has it, like those that follow.
        api_key: the key.
        timeout: seconds for the answer to one request.
        retry_policy: how patiently to send requests again.
        allow_insecure_http: allow ``http://`` to another machine.
        transport: in place of the network.
        connection: a service client's, in place of all others.

    Raises:
        ConfigError: no usable address or key.
    """

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        timeout: float = 60.0,
        retry_policy: RetryPolicy | None = None,
        allow_insecure_http: bool = False,
        transport: httpx.AsyncBaseTransport | None = None,
        connection: Connection | None = None,
    ) -> None:
        if connection is not None:
            self._connection = connection
            return
        url, key = resolve(base_url, api_key, allow_insecure_http=allow_insecure_http)
        self._connection = Connection(
            Settings(
                url=url,
                key=key,
                policy=retry_policy or RetryPolicy(),
                timeout=timeout,
                transport=transport,
            )
        )

    def get_server_capabilities(self) -> APIFuture[ServerCapabilities]:
        """Asks which base models the trainer offers."""
        return self._connection.start(self._connection.capabilities)

    get_server_capabilities_async = awaited(get_server_capabilities, ServerCapabilities)

    def list_training_runs(
        self,
        limit: int = 20,
        offset: int = 0,
        access_scope: AccessScope = "owned",
        project_id: str | None = None,
    ) -> APIFuture[TrainingRunsResponse]:
        """Lists runs, the newest first.

        Args:
            limit: at most so many.
            offset: without so many of the first.
            access_scope: one's own, or all that one may see.
            project_id: only those of a project.
        """
        query = _page(limit, offset, access_scope=access_scope)
        if project_id is not None:
            query["project_id"] = project_id
        return self._get("training_runs", TrainingRunsResponse, query)

    list_training_runs_async = awaited(list_training_runs, TrainingRunsResponse)

    def get_training_run(
        self, training_run_id: str, access_scope: AccessScope = "owned"
    ) -> APIFuture[TrainingRun]:
        """Describes one run.

        Args:
            training_run_id: its ``model_id``.
            access_scope: one's own, or any that one may see.
        """
        return self._get(_of_run(training_run_id), TrainingRun, {"access_scope": access_scope})

    get_training_run_async = awaited(get_training_run, TrainingRun)

    def get_training_run_by_tinker_path(
        self, tinker_path: str, access_scope: AccessScope = "owned"
    ) -> APIFuture[TrainingRun]:
        """Describes the run of a checkpoint, as :meth:`get_training_run` does.

        Args:
            tinker_path: of the checkpoint.
            access_scope: one's own, or any that one may see.
        """
        parsed = ParsedCheckpointTinkerPath.from_tinker_path(tinker_path)
        return self.get_training_run(parsed.training_run_id, access_scope)

    get_training_run_by_tinker_path_async = awaited(get_training_run_by_tinker_path, TrainingRun)

    def get_weights_info_by_tinker_path(self, tinker_path: str) -> APIFuture[WeightsInfoResponse]:
        """Describes the model that can load a checkpoint.

        Args:
            tinker_path: of the checkpoint.
        """
        request = Request("weights_info", messages.encode(messages.WeightsInfoRequest(tinker_path)))
        return self._connection.start(self._connection.transport.call, request, WeightsInfoResponse)

    get_weights_info_by_tinker_path_async = awaited(
        get_weights_info_by_tinker_path, WeightsInfoResponse
    )

    def list_checkpoints(self, training_run_id: str) -> APIFuture[CheckpointsListResponse]:
        """Lists the checkpoints of a run, the newest first.

        Args:
            training_run_id: its ``model_id``.
        """
        return self._get(f"{_of_run(training_run_id)}/checkpoints", CheckpointsListResponse)

    list_checkpoints_async = awaited(list_checkpoints, CheckpointsListResponse)

    def list_user_checkpoints(
        self, limit: int = 100, offset: int = 0
    ) -> APIFuture[CheckpointsListResponse]:
        """Lists the checkpoints of all runs, the newest first.

        Args:
            limit: at most so many.
            offset: without so many of the first.
        """
        return self._get("checkpoints", CheckpointsListResponse, _page(limit, offset))

    list_user_checkpoints_async = awaited(list_user_checkpoints, CheckpointsListResponse)

    def delete_checkpoint(self, training_run_id: str, checkpoint_id: str) -> APIFuture[None]:
        """Deletes a checkpoint.

        Args:
            training_run_id: of its run.
            checkpoint_id: its name there, such as ``weights/<name>``.
        """
        return self._tell("DELETE", _of_checkpoint(training_run_id, checkpoint_id))

    delete_checkpoint_async = awaited(delete_checkpoint, None)

    def delete_checkpoint_from_tinker_path(self, tinker_path: str) -> APIFuture[None]:
        """Deletes a checkpoint, as :meth:`delete_checkpoint` does.

        Args:
            tinker_path: of the checkpoint.
        """
        return self._tell("DELETE", _of_path(tinker_path))

    delete_checkpoint_from_tinker_path_async = awaited(delete_checkpoint_from_tinker_path, None)

    def copy_weights(
        self,
        path: str,
        destination_project_id: str | None = None,
        *,
        ttl_seconds: int | None = None,
        weights_access_token: str | None = None,
    ) -> APIFuture[str]:
        """Copies a checkpoint into a project, as a run of its own that cannot be trained on.

        Args:
            path: of the checkpoint.
            destination_project_id: the project; ``TINKER_PROJECT_ID`` if None.
            ttl_seconds: when the copy may be removed, an hour to ten years from now; None to keep
                it for ever.
            weights_access_token: lets a checkpoint of another account be read.

        Returns:
            The path of the copy.

        Raises:
            DataError: no project was given.
        """
        project = destination_project_id or os.environ.get("TINKER_PROJECT_ID")
        if not project:
            raise DataError(
                "none was given, nor is TINKER_PROJECT_ID set", field="destination_project_id"
            )
        message = messages.CopyWeightsRequest(path, project, ttl_seconds=ttl_seconds)
        request = Request("copy_weights", messages.encode(message))
        if weights_access_token is not None:
            request.headers = {"X-Tinker-Weights-Access-Token": weights_access_token}

        async def run() -> str:
            answer = await self._connection.transport.call(request, messages.CopyWeightsResponse)
            return answer.tinker_path

        return self._connection.start(run)

    copy_weights_async = awaited(copy_weights, str)

    def publish_checkpoint_from_tinker_path(self, tinker_path: str) -> APIFuture[None]:
        """Lets everybody load a checkpoint.

        Args:
            tinker_path: of the checkpoint.
        """
        return self._tell("POST", f"{_of_path(tinker_path)}/publish")

    publish_checkpoint_from_tinker_path_async = awaited(publish_checkpoint_from_tinker_path, None)

    def unpublish_checkpoint_from_tinker_path(self, tinker_path: str) -> APIFuture[None]:
        """Lets nobody else load a checkpoint any longer.

        Args:
            tinker_path: of the checkpoint.
        """
        return self._tell("DELETE", f"{_of_path(tinker_path)}/publish")

    unpublish_checkpoint_from_tinker_path_async = awaited(
        unpublish_checkpoint_from_tinker_path, None
    )

    def set_checkpoint_ttl_from_tinker_path(
        self, tinker_path: str, ttl_seconds: int | None
    ) -> APIFuture[None]:
        """Says when a checkpoint may be removed.

        Args:
            tinker_path: of the checkpoint.
            ttl_seconds: from now on, an hour to ten years; None to keep it for ever.
        """
        body = messages.encode(messages.TimeToLiveRequest(ttl_seconds))
        return self._tell("PUT", f"{_of_path(tinker_path)}/ttl", body)

    set_checkpoint_ttl_from_tinker_path_async = awaited(set_checkpoint_ttl_from_tinker_path, None)

    def list_sessions(
        self, limit: int = 20, offset: int = 0, access_scope: AccessScope = "owned"
    ) -> APIFuture[ListSessionsResponse]:
        """Lists the ids of sessions, the newest first.

        Args:
            limit: at most so many.
            offset: without so many of the first.
            access_scope: one's own, or all that one may see.
        """
        query = _page(limit, offset, access_scope=access_scope)
        return self._get("sessions", ListSessionsResponse, query)

    list_sessions_async = awaited(list_sessions, ListSessionsResponse)

    def assign_session_project(self, session_id: str, project_id: str) -> APIFuture[None]:
        """Moves a session, with its runs and samplers, into a project.

        Args:
            session_id: of the session.
            project_id: of the project.
        """
        body = messages.encode(messages.AssignProjectRequest(project_id))
        return self._tell("PUT", f"sessions/{_quoted(session_id)}/project", body)

    assign_session_project_async = awaited(assign_session_project, None)

    def get_session(
        self, session_id: str, access_scope: AccessScope = "owned"
    ) -> APIFuture[GetSessionResponse]:
        """Describes a session: its models and samplers.

        Args:
            session_id: of the session.
            access_scope: one's own, or any that one may see.
        """
        path = f"sessions/{_quoted(session_id)}"
        return self._get(path, GetSessionResponse, {"access_scope": access_scope})

    get_session_async = awaited(get_session, GetSessionResponse)

    def get_sampler(self, sampler_id: str) -> APIFuture[GetSamplerResponse]:
        """Describes what a sampling session samples from.

        Args:
            sampler_id: of the sampling session.
        """
        return self._get(f"samplers/{_quoted(sampler_id)}", GetSamplerResponse)

    get_sampler_async = awaited(get_sampler, GetSamplerResponse)

    def close(self) -> None:
        """Ends the thread, and every open future with ClosedError; a service client's, too."""
        self._connection.close()

    def __repr__(self) -> str:
        return f"RestClient({self._connection.transport.address!r})"

    def _get(
        self, path: str, as_type: type[T], query: dict[str, Any] | None = None
    ) -> APIFuture[T]:
        address = f"{path}?{urllib.parse.urlencode(query)}" if query else path
        request = Request(path, method="GET", address=address)
        return self._connection.start(self._connection.transport.call, request, as_type)

    def _tell(self, method: str, path: str, body: bytes = b"") -> APIFuture[None]:
        request = Request(path, body, method=method)
        return self._connection.start(self._connection.transport.tell, request)


def _page(limit: int, offset: int, **more: str) -> dict[str, Any]:
    for name, value, least in (("limit", limit, 1), ("offset", offset, 0)):
        if value < least:
            raise DataError(f"{value} is below {least}", field=name)
    return {"limit": limit, "offset": offset, **more}


def _of_run(training_run_id: str) -> str:
    return f"training_runs/{_quoted(training_run_id)}"


def _of_checkpoint(training_run_id: str, checkpoint_id: str) -> str:
    name = "/".join(map(_quoted, checkpoint_id.split("/")))
    return f"{_of_run(training_run_id)}/checkpoints/{name}"


def _of_path(tinker_path: str) -> str:
    parsed = ParsedCheckpointTinkerPath.from_tinker_path(tinker_path)
    return _of_checkpoint(parsed.training_run_id, parsed.checkpoint_id)


def _quoted(name: str) -> str:
    """Quotes a part of an address; one that is empty or dots would be part of another's."""
    if name in ("", ".", ".."):
        raise DataError(f"{name!r} is no name")
    return urllib.parse.quote(name, safe=":")
