"""Sampling from a model, trained or not."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import partial

from mintjax.client.connection import Connection
from mintjax.client.futures import APIFuture, MadeClient, awaited
from mintjax.client.passes import MAX_LOGPROB
from mintjax.errors import APIResponseError, DataError
from mintjax.protocol import messages
from mintjax.types import (
    ModelInput,
    SampleResponse,
    SamplingParams,
    as_model_input,
    as_params,
)


class SamplingClient(MadeClient):
    """Samples from one set of weights, which stays as it was when this was made.

    Made by :meth:`ServiceClient.create_sampling_client` and
    :meth:`TrainingClient.save_weights_and_get_sampling_client`. Requests run side by side.
    """

    def __init__(self, connection: Connection, sampling_session_id: str) -> None:
        self._connection = connection
        self._session = sampling_session_id
        self._numbers = itertools.count(1)

    @classmethod
    async def open(
        cls, connection: Connection, model_path: str | None = None, base_model: str | None = None
    ) -> SamplingClient:
        """Opens a sampling session, within the client's loop, for saved weights or a base model.

        Args:
            connection: the service client's.
            model_path: of the saved weights, or None.
            base_model: its name, where there is no path.
        """
        path = "create_sampling_session"
        session, number = await connection.session(), next(connection.sampling_numbers)
        request = messages.CreateSamplingSessionRequest(
            session, number, base_model, model_path, path
        )
        answer = await connection.made(path, request, messages.CreateSamplingSessionResponse)
        return cls(connection, answer.sampling_session_id)

    def sample(
        self,
        prompt: ModelInput,
        num_samples: int,
        sampling_params: SamplingParams,
        include_prompt_logprobs: bool = False,
    ) -> APIFuture[SampleResponse]:
        """Samples continuations of a prompt.

        Args:
            prompt: at least one token.
            num_samples: how many continuations.
            sampling_params: how to sample.
            include_prompt_logprobs: return the prompt's own logprobs too.

        Raises:
            DataError: an argument that no trainer can use.
        """
        request = self._request(prompt, num_samples, sampling_params, include_prompt_logprobs)
        check = partial(_check_answer, request)
        return self._connection.start(
            self._connection.run, "asample", request, SampleResponse, check
        )

    sample_async = awaited(sample, SampleResponse)

    def compute_logprobs(self, prompt: ModelInput) -> APIFuture[list[float | None]]:
        """Computes the logprob of each token of a prompt, in nats; the first is None.

        Raises:
            DataError: the prompt has no token.
        """
        request = self._request(prompt, 1, SamplingParams(max_tokens=1), True)

        async def run() -> list[float | None]:
            check = partial(_check_answer, request)
            answer = await self._connection.run("asample", request, SampleResponse, check)
            return answer.prompt_logprobs or []

        return self._connection.start(run)

    compute_logprobs_async = awaited(compute_logprobs, list[float | None])

    def _request(
        self, prompt: ModelInput, num_samples: int, params: SamplingParams, prompt_logprobs: bool
    ) -> messages.SampleRequest:
        prompt, params = as_model_input(prompt), as_params(SamplingParams, params)
        _check(prompt, num_samples, params)
        number = next(self._numbers)
        return messages.SampleRequest(
            prompt, params, self._session, number, num_samples, prompt_logprobs
        )


def _check_answer(request: messages.SampleRequest, answer: SampleResponse) -> None:
    """Checks that an answer can be that to a request.

    SkyRL's JAX backend leaves out the first prompt token, which has no logprob, so one entry fewer
    than tokens is completed by a None in front.

    Raises:
        APIResponseError: it is not for as many samples or tokens, or a logprob is none.
    """
    if len(answer.sequences) != request.num_samples:
        raise APIResponseError(
            f"the trainer returned {len(answer.sequences)} sequences for {request.num_samples}"
        )
    for i, sequence in enumerate(answer.sequences):
        if sequence.logprobs is not None and len(sequence.logprobs) != len(sequence.tokens):
            raise APIResponseError(
                f"sequence {i}: the trainer returned {len(sequence.logprobs)} logprobs for "
                f"{len(sequence.tokens)} tokens"
            )
        _check_probable(sequence.logprobs or ())
    if request.prompt_logprobs:
        logprobs = answer.prompt_logprobs or []
        if len(logprobs) == request.prompt.length - 1 and None not in logprobs:
            logprobs = answer.prompt_logprobs = [None, *logprobs]
        if len(logprobs) != request.prompt.length:
            raise APIResponseError(
                f"the trainer returned {len(logprobs)} prompt logprobs for "
                f"{request.prompt.length} tokens"
            )
        _check_probable([one for one in logprobs if one is not None])


def _check_probable(logprobs: Sequence[float]) -> None:
    for one in logprobs:
        if not one <= MAX_LOGPROB:
            raise APIResponseError(
                f"the trainer returned a logprob of {one:g}, which is no logarithm of a probability"
            )


def _check(prompt: ModelInput, num_samples: int, params: SamplingParams) -> None:
    tokens = prompt.to_ints()
    if not tokens or min(tokens) < 0:
        raise DataError("it needs at least one token, and none below 0", field="prompt")
    if num_samples < 1:
        raise DataError(f"{num_samples}; ask for at least one", field="num_samples")
    if not (math.isfinite(params.temperature) and params.temperature >= 0):
        raise DataError(f"{params.temperature}; it must be finite and >= 0", field="temperature")
    if not 0 < params.top_p <= 1:
        raise DataError(f"{params.top_p}; it must be in (0, 1]", field="top_p")
    if params.max_tokens is not None and params.max_tokens < 1:
        raise DataError(f"{params.max_tokens}; it must be at least 1", field="max_tokens")
