"""Training one model."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal, Self, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from mintjax.client.connection import Connection
from mintjax.client.custom_step import custom_step
from mintjax.client.custom_step import logprobs as logprobs_of
from mintjax.client.futures import APIFuture, Limited, MadeClient, both, submitted, wait
from mintjax.client.gradient_steps import GradientStep
from mintjax.client.gradients import AccumulatedGradients
from mintjax.client.lane import Lane, PlaceInLine
from mintjax.client.passes import Pass
from mintjax.client.reductions import Measure, check_sum, measured_anew
from mintjax.client.sampling import SamplingClient, SamplingSession, open_sampling
from mintjax.errors import APIResponseError, DataError, MintjaxError
from mintjax.gradients import Objective
from mintjax.gradients.torch import torch_if_written_for_it
from mintjax.left_out import refuse
from mintjax.protocol import messages
from mintjax.ragged.batch import Batch, as_batch
from mintjax.ragged.checks import check_data
from mintjax.step.carrier import FORWARD_LOSS_FN, carrier, forward_data
from mintjax.step.reduction import Reduction
from mintjax.step.routes import Backward
from mintjax.tensors import finite_floats
from mintjax.types import (
    AdamParams,
    CustomStepOutput,
    Datum,
    ForwardBackwardOutput,
    GetInfoResponse,
    LoadWeightsResponse,
    OptimStepResponse,
    SaveWeightsResponse,
    as_params,
)

T = TypeVar("T")

SECONDS_TO_UNLOAD = 30.0
"""Nobody waits longer for a model to be unloaded."""


class TrainingClient(MadeClient):
    """Trains one model.

    Made by :meth:`ServiceClient.create_lora_training_client`. Every method returns at once, and
    what was submitted takes effect in the order of submission, so that ``forward_backward``,
    ``optim_step`` and the next ``forward_backward`` can all be under way together. Data are read
    when a method is called; changing them later changes nothing. When a request that changes the
    model fails, those submitted before you saw the error and not yet sent end with NotSentError.

    As a context manager, it unloads the model when the block ends; what was not saved is gone.

    The methods ending in ``_async`` are those of the official SDK: awaited, they submit, and
    return the same future.

    Attributes:
        model_id: the trainer's name of the model.
    """

    def __init__(self, connection: Connection, model_id: str, measure: Measure) -> None:
        self.model_id = model_id
        self._connection = connection
        self._lane = Lane(connection, model_id)
        self._measure = measure
        self._gradients = AccumulatedGradients(connection, model_id, measure)
        self._inflight: SamplingSession | None = None

    @property
    def changes(self) -> int:
        """Counts the calls so far that change the model: its weights, or what accumulates."""
        return self._lane.changes

    def forward(
        self,
        data: Sequence[Datum] | Batch,
        loss_fn: str = "cross_entropy",
        loss_fn_config: Mapping[str, float] | None = None,
    ) -> APIFuture[ForwardBackwardOutput]:
        """Computes the logprobs of the targets, and the loss; the model stays as it is.

        Args:
            data: at least one datum, each with ``target_tokens`` and what the loss reads.
            loss_fn: a loss that the trainer serves.
            loss_fn_config: its hyperparameters, such as ``clip_low_threshold``.

        Returns:
            One output per datum, in order, and the trainer's metrics.

        Raises:
            DataError: the data cannot be used; nothing was sent.
        """
        return self._pass(data, loss_fn, loss_fn_config, backward=False)

    def forward_backward(
        self,
        data: Sequence[Datum] | Batch,
        loss_fn: str = "cross_entropy",
        loss_fn_config: Mapping[str, float] | None = None,
    ) -> APIFuture[ForwardBackwardOutput]:
        """Adds the gradient of a loss that the trainer serves to what is accumulated there.

        Args, returns and raises are those of :meth:`forward`.
        """
        return self._pass(data, loss_fn, loss_fn_config, backward=True)

    def forward_backward_custom(
        self,
        data: Sequence[Datum] | Batch,
        loss_fn: Objective,
        *,
        loss_type_input: Literal["logprobs"] | None = None,
        single_pass: bool = True,
        datums_in_step: int | None = None,
        step: int | None = None,
    ) -> APIFuture[CustomStepOutput]:
        """Adds the gradient of an objective, computed here, to what is accumulated in the trainer.

        A forward pass, ``jax.value_and_grad`` of the objective with respect to its logprobs in a
        worker thread, and a backward pass; the step keeps its place in the line meanwhile. Only
        ``target_tokens`` and what carries the gradient travel; the objective sees every input.

        A gradient that does not depend on the logprobs (cross-entropy, REINFORCE, a mean) needs no
        forward pass, nor does an objective that is a loss of the trainer's own: one request does
        it all, and loss and metrics come from the logprobs that it returns. A trainer that takes
        gradients of logprobs as they are, as hatchery does, is sent the gradient itself. The
        output's ``route`` says how it went.

        Args:
            data: at least one datum, each with ``target_tokens``.
            loss_fn: an objective, ``(data, logprobs) -> (scalar loss, dict of metrics)``: a pure
                function that JAX can trace, where ``logprobs`` holds one row per datum. One that
                names torch is called with a list of torch tensors, as
                :class:`mintjax.interop.torch_objective` does.
            loss_type_input: ``"logprobs"``, which is what an objective gets.
            single_pass: save the forward pass where it is not needed.
            datums_in_step: how many datums all passes before the next optimizer step have in all.
                Only a trainer that averages over them must be told, and only for several passes.
            step: read the objective's schedules at this step, as its ``at_step`` does.

        Returns:
            The backward pass's output. Its metrics are the objective's, and the loss as ``"loss"``
            and ``"loss:sum"``. The trainer's own come with them; its ``"loss:sum"``, of what
            carried the gradient, is ``"surrogate_loss:sum"``.

        Raises:
            DataError: the data cannot be used; nothing was sent.

        What the objective raises reaches the caller from the future, as it is; then there is no
        backward pass, no number is lost, and the next submission goes on.
        """
        refuse(loss_type_input=None if loss_type_input == "logprobs" else loss_type_input)
        batch = check_data(as_batch(data).snapshot(), ["target_tokens"])
        _check_weights(batch)
        objective = torch_if_written_for_it(loss_fn)
        if step is not None:
            objective = _at_step(objective, step)

        async def run(place: PlaceInLine) -> CustomStepOutput:
            return await custom_step(
                self._gradients,
                place,
                batch,
                objective,
                single_pass=single_pass,
                datums_in_step=datums_in_step,
            )

        return self._lane.submit(run, mutates=True)

    def logprobs(
        self, data: Sequence[Datum] | Batch, *, timeout: float | None = None
    ) -> list[npt.NDArray[np.float32]]:
        """Computes the logprobs of the target tokens, in nats; waits for them.

        Args:
            data: at least one datum, each with ``target_tokens``.
            timeout: seconds to wait for them at most; ``RetryPolicy(blocking=...)`` if None.

        Returns:
            One array per datum, in order, in the shape of its ``target_tokens``.
        """
        batch = check_data(data, ["target_tokens"])
        passed = self.forward(forward_data(batch), FORWARD_LOSS_FN)
        return logprobs_of(wait(self._connection.limit(passed, timeout)))

    def backward(
        self,
        data: Sequence[Datum] | Batch,
        logprobs: Sequence[npt.NDArray[Any]],
        grads: Sequence[npt.NDArray[Any]],
        *,
        timeout: float | None = None,
    ) -> ForwardBackwardOutput:
        """Adds a gradient with respect to logprobs to what is accumulated; waits for it.

        The trainer accumulates ``sum(grads * d logprobs / d weights)``.

        Args:
            data: as :meth:`logprobs` had it.
            logprobs: what that returned; the model must not have changed since.
            grads: the derivative of a loss by each of them, in their shapes.
            timeout: seconds to wait for it at most; ``RetryPolicy(blocking=...)`` if None.

        Raises:
            NonFiniteError: a gradient is not finite; nothing was sent.
        """
        batch = check_data(data, ["target_tokens"])

        async def run(place: PlaceInLine) -> ForwardBackwardOutput:
            encoding = self._connection.encoding
            reduction = await self._gradients.reduction(batch)
            if reduction is None:
                return await self._by_gradient(place, batch, grads)
            total = await self._gradients.datums_in_step(place, reduction, len(batch), None)
            carried = carrier(reduction, batch, logprobs, grads, total)
            place.begin()
            given = Pass(encoding, carried, reduction.loss_fn, backward=True)
            given.check_scaled_for(reduction)
            scaled_for = None if reduction.per_step is None else total
            output = await self._gradients.send(place, given, scaled_for=scaled_for)
            sent = Backward("two_pass", reduction.loss_fn, None, carried)
            check_sum(self._connection, sent, output)
            return output

        return wait(self._connection.limit(self._lane.submit(run, mutates=True), timeout))

    def _add_gradient(
        self, data: Sequence[Datum], grads: Sequence[npt.NDArray[Any]]
    ) -> ForwardBackwardOutput:
        """Adds a gradient by requests of the trainer's own, and waits for it."""
        batch = check_data(list(data), ["target_tokens"])

        async def run(place: PlaceInLine) -> ForwardBackwardOutput:
            return await self._by_gradient(place, batch, grads)

        return self._lane.submit(run, mutates=True).result()

    async def _by_gradient(
        self, place: PlaceInLine, batch: Batch, grads: Sequence[npt.NDArray[Any]]
    ) -> ForwardBackwardOutput:
        step = GradientStep(self._connection.encoding.limits, batch)
        place.begin()
        await self._gradients.ask_logprobs(place, step)
        return await self._gradients.send_gradient(place, step, grads)

    def optim_step(
        self, optim_params: AdamParams | None = None, *, adam_params: AdamParams | None = None
    ) -> APIFuture[OptimStepResponse]:
        """Updates the weights with the accumulated gradient, and forgets it.

        Args:
            optim_params: the hyperparameters of this step.
            adam_params: the same, by the name that older versions of the official SDK have.

        Raises:
            DataError: one of them is not finite, or not one of the two arguments was given; nothing
                was sent.
        """
        if (optim_params is None) == (adam_params is None):
            raise DataError("pass AdamParams, once; nothing was sent", field="optim_params")
        given = as_params(AdamParams, adam_params if optim_params is None else optim_params)
        params = finite_floats(msgspec.structs.asdict(given))
        request = messages.OptimStepRequest(self.model_id, AdamParams(**params))

        async def run(place: PlaceInLine) -> OptimStepResponse:
            return await self._gradients.optim_step(place, request)

        return self._lane.submit(run, mutates=True)

    def probe(self, *, timeout: float | None = None) -> Reduction:
        """Measures what the trainer makes of losses, on a throwaway model of the same base.

        As :meth:`ServiceClient.probe`; custom steps of all its models take it into account.

        Args:
            timeout: seconds to wait for it at most; ``RetryPolicy(blocking=...)`` if None.

        Raises:
            UnknownReductionError: it cannot be told; the message says what was measured.
        """
        return wait(
            self._connection.limited(timeout, measured_anew, self._connection, self._measure)
        )

    def save_state(
        self,
        name: str,
        ttl_seconds: int | None = None,
        overwrite: bool = False,
        user_metadata: dict[str, str] | None = None,
    ) -> APIFuture[SaveWeightsResponse]:
        """Saves weights and optimizer state under a name, to train on from.

        Args:
            name: of the checkpoint.
            ttl_seconds: after which the trainer may delete it; never if None.
            overwrite: replace a checkpoint of that name; else the trainer may refuse it.
            user_metadata: kept with it, where the trainer keeps such.
        """
        request = messages.SaveWeightsRequest(
            self.model_id,
            name,
            type="save_weights",
            ttl_seconds=ttl_seconds,
            overwrite=overwrite,
            user_metadata=user_metadata,
        )
        return self.submit("save_weights", request, SaveWeightsResponse, mutates=False)

    def load_state(
        self, path: str, weights_access_token: str | None = None
    ) -> APIFuture[LoadWeightsResponse]:
        """Loads the weights of a path that :meth:`save_state` gave; the optimizer starts afresh.

        Args:
            path: of the checkpoint.
            weights_access_token: lets a checkpoint of another account be read.
        """
        return self._load(path, weights_access_token, optimizer=False)

    def load_state_with_optimizer(
        self, path: str, weights_access_token: str | None = None
    ) -> APIFuture[LoadWeightsResponse]:
        """Loads weights and optimizer state of a path that :meth:`save_state` gave.

        Args:
            path: of the checkpoint.
            weights_access_token: lets a checkpoint of another account be read.
        """
        return self._load(path, weights_access_token, optimizer=True)

    def save_weights_for_sampler(
        self,
        name: str,
        ttl_seconds: int | None = None,
        user_metadata: dict[str, str] | None = None,
    ) -> APIFuture[SaveWeightsResponse]:
        """Saves the weights under a name, for :meth:`ServiceClient.create_sampling_client`.

        Args are those of :meth:`save_state`.
        """
        path = "save_weights_for_sampler"
        request = messages.SaveWeightsForSamplerRequest(
            self.model_id, name, type=path, ttl_seconds=ttl_seconds, user_metadata=user_metadata
        )
        return self.submit(path, request, SaveWeightsResponse, mutates=False)

    def _save_weights_and_get_sampling_client(
        self,
        name: str | None = None,
        retry_config: None = None,
        record_stability_info: Literal[False] = False,
        kind: Literal["snapshot", "inflight"] = "snapshot",
        *,
        timeout: float | None = None,
    ) -> Limited[SamplingClient]:
        """Makes a sampling client for the weights as they are once all submitted before is done.

        Args:
            name: keep the weights under this name; for this client only if None.
            retry_config: the official SDK's; left out.
            record_stability_info: the official SDK's; left out.
            kind: ``"snapshot"``: the client keeps the weights that it was made with.
                ``"inflight"``: all such clients of this model sample from the weights that were
                last saved in this way, those that were made before too. Such weights have no name.
            timeout: seconds to wait for it at most; ``RetryPolicy(blocking=...)`` if None.

        Raises:
            DataError: an argument that is left out, or a name for weights that change.
        """
        refuse(
            retry_config=retry_config,
            record_stability_info=record_stability_info,
            kind=None if kind in ("snapshot", "inflight") else kind,
        )
        if kind == "inflight" and name is not None:
            raise DataError("weights that change have no name", field="name")

        async def run(place: PlaceInLine) -> SamplingClient:
            place.begin()
            path, connection = "save_weights_for_sampler", self._connection
            order = next(connection.sampling_numbers)
            number = order if name is None else None
            request = messages.SaveWeightsForSamplerRequest(
                self.model_id, name, number, type=path, kind=kind
            )
            (saved,) = await place.request(
                path, [request], messages.SaveWeightsForSamplerResponse, mutates=False
            )
            opened = saved.sampling_session_id
            if opened is None and saved.path is None:
                raise APIResponseError(
                    f"the answer to {path} holds neither a path nor a sampling_session_id"
                )
            opened = opened or await open_sampling(connection, saved.path)
            if kind == "snapshot":
                return SamplingClient(connection, SamplingSession(opened))
            # Those that were made before move on, because some trainers know no kinds.
            self._inflight = self._inflight or SamplingSession(opened, order)
            self._inflight.move_on(opened, order)
            return SamplingClient(connection, self._inflight)

        return self._connection.limit(self._lane.submit(run), timeout)

    save_weights_and_get_sampling_client, save_weights_and_get_sampling_client_async = both(
        _save_weights_and_get_sampling_client, SamplingClient
    )

    def _create_sampling_client(
        self,
        model_path: str,
        retry_config: None = None,
        record_stability_info: Literal[False] = False,
        *,
        timeout: float | None = None,
    ) -> Limited[SamplingClient]:
        """Makes a sampling client for saved weights.

        Args:
            model_path: what a save for a sampler gave.
            retry_config: the official SDK's; left out.
            record_stability_info: the official SDK's; left out.
            timeout: seconds to wait for it at most; ``RetryPolicy(blocking=...)`` if None.
        """
        refuse(retry_config=retry_config, record_stability_info=record_stability_info)
        connection = self._connection
        return connection.limited(timeout, SamplingClient.open, connection, model_path)

    create_sampling_client, create_sampling_client_async = both(
        _create_sampling_client, SamplingClient
    )

    def _get_info(self, *, timeout: float | None = None) -> Limited[GetInfoResponse]:
        """Asks the trainer for the model's base model, tokenizer and rank.

        Args:
            timeout: seconds to wait for it at most; ``RetryPolicy(blocking=...)`` if None.
        """
        request = messages.ModelRequest(self.model_id, "get_info")
        ask = self._connection.ask
        return self._connection.limited(timeout, ask, "get_info", request, GetInfoResponse)

    get_info, get_info_async = both(_get_info, GetInfoResponse)

    def unload(self) -> APIFuture[None]:
        """Frees the model once all submitted before is done; what was not saved is gone."""

        async def run(place: PlaceInLine) -> None:
            place.begin()
            await place.alone()
            await self._connection.unload(self.model_id)

        future = self._lane.submit(run)
        self._lane.close()
        return future

    def submit(
        self,
        path: str,
        message: Any,
        as_type: type[T],
        *,
        mutates: bool,
    ) -> APIFuture[T]:
        """Takes the next place in the line for a request of a trainer's own.

        Args:
            path: below ``/api/v1/``.
            message: what to send: a msgspec struct with a ``seq_id``, which is filled in.
            as_type: what the result is.
            mutates: whether it changes the model.
        """

        async def run(place: PlaceInLine) -> T:
            place.begin()
            return (await place.request(path, [message], as_type, mutates=mutates))[0]

        return self._lane.submit(run, mutates=mutates)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with suppress(MintjaxError):  # a trainer may have no such endpoint, or the client be closed
            future = self.unload()
            if kind is None:
                future.result(SECONDS_TO_UNLOAD)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        await asyncio.to_thread(self.__exit__, kind)

    def __repr__(self) -> str:
        return f"TrainingClient({self.model_id!r})"

    forward_async = submitted(forward)
    forward_backward_async = submitted(forward_backward)
    forward_backward_custom_async = submitted(forward_backward_custom)
    optim_step_async = submitted(optim_step)
    save_state_async = submitted(save_state)
    load_state_async = submitted(load_state)
    load_state_with_optimizer_async = submitted(load_state_with_optimizer)
    save_weights_for_sampler_async = submitted(save_weights_for_sampler)

    def _pass(
        self,
        data: Sequence[Datum] | Batch,
        loss_fn: str,
        loss_fn_config: Mapping[str, float] | None,
        *,
        backward: bool,
    ) -> APIFuture[ForwardBackwardOutput]:
        config = None if loss_fn_config is None else finite_floats(loss_fn_config)
        batch, encoding = check_data(data), self._connection.encoding
        given = Pass(encoding, batch, loss_fn, config, backward=backward)

        async def run(place: PlaceInLine) -> ForwardBackwardOutput:
            place.begin()
            return await self._gradients.send(place, given)

        return self._lane.submit(run, mutates=backward)

    def _load(
        self, path: str, token: str | None, *, optimizer: bool
    ) -> APIFuture[LoadWeightsResponse]:
        path_of_load = "load_weights"
        request = messages.LoadWeightsRequest(
            model_id=self.model_id,
            path=path,
            seq_id=None,
            optimizer=optimizer,
            weights_access_token=token or msgspec.UNSET,
        )

        async def run(place: PlaceInLine) -> LoadWeightsResponse:
            place.begin()
            return await self._gradients.clear(place, path_of_load, request, LoadWeightsResponse)

        return self._lane.submit(run, mutates=True)


def _check_weights(batch: Batch) -> None:
    """Checks that weights, which may have any shape here, are finite.

    Raises:
        DataError: one is not; names the datum.
    """
    for i, datum in enumerate(batch):
        weights = datum.loss_fn_inputs.get("weights")
        if weights is not None and not np.isfinite(weights).all():
            raise DataError("a weight is not finite; nothing was sent", datum=i, field="weights")


def _at_step(objective: Objective, step: int) -> Objective:
    """Moves an objective's schedules to a step.

    Raises:
        DataError: it has none.
    """
    at_step = getattr(objective, "at_step", None)
    if at_step is None:
        raise DataError(
            "this objective has no schedules; only one with at_step takes a step", field="step"
        )
    return at_step(step)
