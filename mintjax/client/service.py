"""The way to a trainer, and to the models on it."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Literal, Self, TypeVar

import httpx
import msgspec

from mintjax.client.connection import Connection, SessionStatus
from mintjax.client.futures import APIFuture, Limited, NotCopyable, awaited, both, wait
from mintjax.client.models import make_model, measure_on
from mintjax.client.reductions import measured_anew
from mintjax.client.rest import RestClient
from mintjax.client.sampling import SamplingClient
from mintjax.client.settings import Progress, RetryPolicy, Settings, from_environment, resolve
from mintjax.client.training import TrainingClient
from mintjax.errors import APIStatusError, ConfigError, DataError
from mintjax.left_out import SdkMethods, refuse
from mintjax.protocol import messages
from mintjax.runs import WeightsInfoResponse
from mintjax.step.reduction import Reduction
from mintjax.types import GetInfoResponse, LoraConfig, ServerCapabilities

T = TypeVar("T")


class ServiceClient(NotCopyable, SdkMethods):
    """A session with a trainer; makes training and sampling clients.

    It starts one thread, which does everything that goes over the network; the session is opened
    by the first call that needs it. Use it from any number of threads and event loops. As a context
    manager, it ends the session, and its thread, when the block ends.

    Args:
        base_url: the trainer's address; ``MINT_BASE_URL``, else ``TINKER_BASE_URL``, else MinT's.
        api_key: ``MINT_API_KEY``, else ``TINKER_API_KEY``. A trainer on this machine may need none.
        timeout: seconds for the answer to one request; results may take longer.
        retry_policy: how patiently to send requests again and to ask for results.
        pipelined: send requests before those in front of them have their results; False for a
            trainer that does not keep the order of ``seq_id``.
        max_response_bytes: refuse larger answers.
        user_metadata: sent with the session.
        project_id: of the session, where the trainer knows projects; ``TINKER_PROJECT_ID`` if None.
        display_name: of the session, where the trainer shows one.
        on_progress: called in the client's thread with each :class:`Progress`; must not block.
        allow_insecure_http: allow ``http://`` to another machine, where anyone on the way can read
            the key.
        reduction: what the trainer divides losses by, where you know it; it is not measured then.
        measure: measure that before the first custom step, by a few steps on a throwaway model,
            where nobody says it. If False, gradients of custom losses are sent as if losses were
            summed, and arrive falsified where they are not.
        transport: in place of the network, such as ``httpx.ASGITransport(app)``.

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
        pipelined: bool = True,
        max_response_bytes: int = 1 << 30,
        user_metadata: dict[str, str] | None = None,
        project_id: str | None = None,
        display_name: str | None = None,
        on_progress: Callable[[Progress], object] | None = None,
        allow_insecure_http: bool = False,
        reduction: Reduction | None = None,
        measure: bool = True,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        if base_url is not None and not isinstance(base_url, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigError(
                "base_url must be a string; where the official SDK takes user_metadata first, pass "
                "ServiceClient(user_metadata=...)"
            )
        url, key = resolve(base_url, api_key, allow_insecure_http=allow_insecure_http)
        settings = Settings(
            url=url,
            key=key,
            policy=retry_policy or RetryPolicy(),
            timeout=timeout,
            pipelined=pipelined,
            max_response_bytes=max_response_bytes,
            user_metadata=user_metadata,
            project_id=project_id or os.environ.get("TINKER_PROJECT_ID"),
            display_name=display_name,
            transport=transport,
            on_progress=on_progress,
            reduction=reduction,
            measure=measure,
        )
        self._connection = Connection(settings)

    @property
    def base_url(self) -> str:
        """The trainer's address."""
        return self._connection.transport.address

    def _create_lora_training_client(
        self,
        base_model: str | None = None,
        rank: int = 32,
        seed: int | None = None,
        train_mlp: bool = True,
        train_attn: bool = True,
        train_unembed: bool = True,
        user_metadata: dict[str, str] | None = None,
        optimizer: Any = None,
        *,
        timeout: float | None = None,
    ) -> Limited[TrainingClient]:
        """Makes a model with fresh low-rank adapters.

        Args:
            base_model: name of the base model; ``TINKER_BASE_MODEL`` if None.
            rank: of the adapters, at least 1.
            seed: of their initial values; the trainer chooses one if None.
            train_mlp: adapt the feed-forward layers.
            train_attn: adapt the attention projections.
            train_unembed: adapt the output projection.
            user_metadata: sent with the model.
            optimizer: the official SDK's; AdamW is the one there is.
            timeout: seconds to wait for it at most; ``RetryPolicy(blocking=...)`` if None.

        Raises:
            DataError: an argument that no trainer can use.
            APIError: the trainer cannot be reached, or refuses.
            APITimeoutError: it takes longer than the timeout.
        """
        _refuse_optimizer(optimizer)
        base_model = base_model or from_environment("BASE_MODEL")
        if not base_model:
            raise DataError("none was given, nor is TINKER_BASE_MODEL set", field="base_model")
        rank, seed = _integer("rank", rank), None if seed is None else _integer("seed", seed)
        if rank < 1:
            raise DataError(f"{rank}; it must be at least 1", field="rank")
        if not (train_mlp or train_attn or train_unembed):
            raise DataError("nothing is left to train; let at least one of the three be True")
        config = LoraConfig(rank, seed, train_unembed, train_mlp, train_attn)
        connection = self._connection
        return connection.limited(
            timeout, make_model, connection, base_model, config, user_metadata
        )

    create_lora_training_client, create_lora_training_client_async = both(
        _create_lora_training_client, TrainingClient
    )

    def _create_training_client_from_state(
        self,
        path: str,
        base_model: str | None = None,
        user_metadata: dict[str, str] | None = None,
        weights_access_token: str | None = None,
        optimizer: Any = None,
        *,
        timeout: float | None = None,
    ) -> Limited[TrainingClient]:
        """Makes a model with the weights of a path that ``save_state`` gave, and a fresh optimizer.

        Args:
            path: ``tinker://<model>/weights/<name>``.
            base_model: in place of the checkpoint's own, where the two go together.
            user_metadata: sent with the model.
            weights_access_token: lets a checkpoint of another account be read.
            optimizer: the official SDK's; AdamW is the one there is.
            timeout: seconds to wait for it at most; ``RetryPolicy(blocking=...)`` if None.

        Raises:
            APIError: the trainer cannot be reached, or knows no such path.
        """
        _refuse_optimizer(optimizer)
        run = self._from_state(path, base_model, user_metadata, weights_access_token, False)
        return self._connection.limited(timeout, run)

    create_training_client_from_state, create_training_client_from_state_async = both(
        _create_training_client_from_state, TrainingClient
    )

    def _create_training_client_from_state_with_optimizer(
        self,
        path: str,
        base_model: str | None = None,
        user_metadata: dict[str, str] | None = None,
        weights_access_token: str | None = None,
        *,
        timeout: float | None = None,
    ) -> Limited[TrainingClient]:
        """Makes a model with the weights and the optimizer's state of a path.

        Args:
            path: ``tinker://<model>/weights/<name>``.
            base_model: in place of the checkpoint's own, where the two go together.
            user_metadata: sent with the model.
            weights_access_token: lets a checkpoint of another account be read.
            timeout: seconds to wait for it at most; ``RetryPolicy(blocking=...)`` if None.
        """
        run = self._from_state(path, base_model, user_metadata, weights_access_token, True)
        return self._connection.limited(timeout, run)

    (
        create_training_client_from_state_with_optimizer,
        create_training_client_from_state_with_optimizer_async,
    ) = both(_create_training_client_from_state_with_optimizer, TrainingClient)

    def _create_sampling_client(
        self,
        model_path: str | None = None,
        base_model: str | None = None,
        retry_config: None = None,
        record_stability_info: Literal[False] = False,
        *,
        timeout: float | None = None,
    ) -> Limited[SamplingClient]:
        """Makes a client that samples from saved weights, or from a base model.

        Args:
            model_path: a path that ``save_weights_for_sampler`` gave.
            base_model: name of a base model, if there is no path.
            retry_config: the official SDK's; left out.
            record_stability_info: the official SDK's; left out.
            timeout: seconds to wait for it at most; ``RetryPolicy(blocking=...)`` if None.

        Raises:
            DataError: neither was given.
        """
        refuse(retry_config=retry_config, record_stability_info=record_stability_info)
        if model_path is None and base_model is None:
            raise DataError("pass model_path, or base_model", field="model_path")
        connection = self._connection
        return connection.limited(timeout, SamplingClient.open, connection, model_path, base_model)

    create_sampling_client, create_sampling_client_async = both(
        _create_sampling_client, SamplingClient
    )

    def _get_server_capabilities(
        self, *, timeout: float | None = None
    ) -> Limited[ServerCapabilities]:
        """Asks which base models the trainer offers.

        Args:
            timeout: seconds to wait for it at most; ``RetryPolicy(blocking=...)`` if None.
        """
        return self._connection.limited(timeout, self._connection.capabilities)

    get_server_capabilities, get_server_capabilities_async = both(
        _get_server_capabilities, ServerCapabilities
    )

    def _get_client_config(
        self, *, timeout: float | None = None
    ) -> Limited[messages.ClientConfigResponse]:
        """Asks what the trainer wants clients to send; returns defaults if it does not say.

        Args:
            timeout: seconds to wait for it at most; ``RetryPolicy(blocking=...)`` if None.
        """
        return self._connection.limited(timeout, self._client_config)

    get_client_config, get_client_config_async = both(
        _get_client_config, messages.ClientConfigResponse
    )

    def copy_weights(
        self,
        path: str,
        *,
        ttl_seconds: int | None = None,
        weights_access_token: str | None = None,
    ) -> APIFuture[str]:
        """Copies a checkpoint into this client's project, as :meth:`RestClient.copy_weights` does.

        Args:
            path: of the checkpoint.
            ttl_seconds: when the copy may be removed; None to keep it for ever.
            weights_access_token: lets a checkpoint of another account be read.

        Raises:
            DataError: this client has no project.
        """
        return self.create_rest_client().copy_weights(
            path,
            self._connection.settings.project_id,
            ttl_seconds=ttl_seconds,
            weights_access_token=weights_access_token,
        )

    copy_weights_async = awaited(copy_weights, str)

    def create_rest_client(self) -> RestClient:
        """Makes a client that lists and changes what the trainer keeps."""
        return RestClient(connection=self._connection)

    def probe(self, base_model: str | None = None, *, timeout: float | None = None) -> Reduction:
        """Measures, by a few steps on a throwaway model, what the trainer makes of losses.

        Custom steps of all models of this client take it into account from then on: a gradient
        then arrives as it is, whatever the trainer divides by.

        Args:
            base_model: of the throwaway model; if None, ``TINKER_BASE_MODEL``, else the first that
                the trainer offers. What holds for one holds for all models of a trainer.
            timeout: seconds to wait for it at most; ``RetryPolicy(blocking=...)`` if None.

        Returns:
            The amounts that it divides by.

        Raises:
            UnknownReductionError: it cannot be told; the message says what was measured.
            DataError: no base model was given, and the trainer names none.
            APITimeoutError: it takes longer than the timeout.
        """
        return wait(self._connection.limited(timeout, self._probe, base_model))

    async def _probe(self, base_model: str | None) -> Reduction:
        name = base_model or from_environment("BASE_MODEL")
        if not name:
            answer = await self._connection.capabilities()
            if not answer.supported_models:
                raise DataError("the trainer names none; pass one", field="base_model")
            name = answer.supported_models[0].model_name
        return await measured_anew(self._connection, partial(measure_on, self._connection, name))

    def submit(self, path: str, message: Any, as_type: type[T]) -> APIFuture[T]:
        """Sends a request of a trainer's own that concerns no model in training.

        Args:
            path: below ``/api/v1/``.
            message: what to send: a msgspec struct.
            as_type: what the result is.
        """
        return self._connection.start(self._connection.run, path, message, as_type)

    def close(
        self, status: SessionStatus = "success", detail: str | None = None
    ) -> APIFuture[None]:
        """Ends the thread, and every open future with ClosedError, within a second.

        The trainer is told that the session has ended, if it takes that at once. What serves this
        session alone may then be gone: its models in training, and samplers without a name.

        Args:
            status: how the session has ended.
            detail: the same in words.

        Returns:
            A future that is done, because the official SDK returns one.
        """
        self._connection.finish(status, detail)
        closed = APIFuture[None](self._connection.background.thread, None)
        closed.set_result(None)
        return closed

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close("success")
        else:
            self.close("errored" if issubclass(kind, Exception) else "interrupted")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.__exit__(kind)

    def __repr__(self) -> str:
        return f"ServiceClient({self.base_url!r})"

    async def _client_config(self) -> messages.ClientConfigResponse:
        await self._connection.session()
        encoding = self._connection.encoding
        return msgspec.structs.replace(encoding.limits, proto_write_fwdbwd=encoding.in_protobuf)

    def _from_state(
        self,
        path: str,
        base_model: str | None,
        user_metadata: dict[str, str] | None,
        token: str | None,
        optimizer: bool,
    ) -> Callable[[], Coroutine[Any, Any, TrainingClient]]:
        if base_model is not None and not isinstance(base_model, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise DataError(
                "it must be a name; an older official SDK takes user_metadata here, which is now "
                "passed as user_metadata=...",
                field="base_model",
            )

        async def run() -> TrainingClient:
            info = await self._weights_info(path)
            flags = (info.train_unembed, info.train_mlp, info.train_attn)
            config = LoraConfig(info.lora_rank or 32, None, *(flag is not False for flag in flags))
            name = base_model or info.base_model
            client = await make_model(self._connection, name, config, user_metadata)
            load = client.load_state_with_optimizer if optimizer else client.load_state
            await load(path, token)
            return client

        return run

    async def _weights_info(self, path: str) -> WeightsInfoResponse:
        ask = self._connection.ask
        await self._connection.session()
        try:
            request = messages.WeightsInfoRequest(path)
            return await ask("weights_info", request, WeightsInfoResponse)
        except APIStatusError as error:
            model_id = path.removeprefix("tinker://").partition("/")[0]
            if error.status_code not in (404, 405) or model_id == path:
                raise
        # A trainer without that endpoint may still hold the model that the checkpoint is of.
        request = messages.ModelRequest(model_id, "get_info")
        info = await ask("get_info", request, GetInfoResponse)
        return WeightsInfoResponse(base_model=info.model_data.model_name, lora_rank=info.lora_rank)


def _refuse_optimizer(optimizer: Any) -> None:
    refuse(optimizer=None if getattr(optimizer, "type", None) == "adamw" else optimizer)


def _integer(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise DataError(f"{value!r} is no integer", field=name) from None
