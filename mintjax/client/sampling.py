"""Sampling from a model, trained or not."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import msgspec
import numpy as np

from mintjax.client.connection import Connection
from mintjax.client.futures import APIFuture, MadeClient, awaited
from mintjax.client.passes import MAX_LOGPROB
from mintjax.errors import APIResponseError, DataError
from mintjax.protocol import messages
from mintjax.tensors import ArrayLike, TensorData, to_tensor
from mintjax.types import (
    ImageChunk,
    ModelInput,
    SampleResponse,
    SamplingParams,
    as_model_input,
    as_params,
)


class SamplingSession:
    """Holds the sampling session that clients send requests to; it may move on to another.

    Args:
        sampling_session_id: the trainer's name of it.
        order: sessions that were asked for later have a larger one.
    """

    def __init__(self, sampling_session_id: str, order: int = 0) -> None:
        self._order = order
        self._at = sampling_session_id, itertools.count(1)

    def move_on(self, sampling_session_id: str, order: int) -> None:
        """Sends the requests from now on to another session, unless this one is later."""
        if order > self._order:
            self._order = order
            self._at = sampling_session_id, itertools.count(1)

    def place(self) -> tuple[str, int]:
        """Gives the session, and the number there, of the next request."""
        sampling_session_id, numbers = self._at
        return sampling_session_id, next(numbers)


class SamplingClient(MadeClient):
    """Samples from one set of weights, which stays as it was when this was made.

    One of ``kind="inflight"`` samples from the weights that were last saved in this way instead.

    Made by :meth:`ServiceClient.create_sampling_client` and
    :meth:`TrainingClient.save_weights_and_get_sampling_client`. Requests run side by side.
    """

    def __init__(self, connection: Connection, session: SamplingSession) -> None:
        self._connection = connection
        self._session = session

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
        opened = await open_sampling(connection, model_path, base_model)
        return cls(connection, SamplingSession(opened))

    def sample(
        self,
        prompt: ModelInput,
        num_samples: int,
        sampling_params: SamplingParams,
        include_prompt_logprobs: bool = False,
        topk_prompt_logprobs: int = 0,
        topk_sample_logprobs: int = 0,
        target_prompt_logprobs: ArrayLike | None = None,
        prompt_alt_tokens_k: int = 0,
        prompt_logprobs_last_n: int | None = None,
    ) -> APIFuture[SampleResponse]:
        """Samples continuations of a prompt, and scores the prompt.

        A teacher's likeliest tokens become the candidates that a student is trained on so::

            whole = mintjax.ModelInput.from_ints(tokens)  # of prompt and answer
            once = mintjax.SamplingParams(max_tokens=1)
            scored = teacher.sample(whole, 1, once, topk_prompt_logprobs=20).result()
            candidates = scored.topk_prompt_logprobs_np
            datum = mintjax.Datum(
                mintjax.ModelInput.from_ints(tokens[:-1]),
                {
                    "target_tokens": candidates.token_ids[1:],  # [T, K]
                    "teacher_logprobs": candidates.logprobs[1:],
                },
            )

        Args:
            prompt: n >= 1 tokens.
            num_samples: how many continuations.
            sampling_params: how to sample.
            include_prompt_logprobs: return the prompt's own logprobs too.
            topk_prompt_logprobs: return the k likeliest tokens at each token of the prompt.
            topk_sample_logprobs: return the k likeliest tokens at each new token.
            target_prompt_logprobs: token ids, int64 of shape ``[n - 1, K]``, -1 for none: return
                the logprobs of those in row i in place of the prompt's token i + 1.
            prompt_alt_tokens_k: draw k tokens from the model in place of each token of the prompt
                but the first.
            prompt_logprobs_last_n: leave out the logprobs, and the likeliest tokens, of all but the
                last so many tokens of the prompt.

        Raises:
            DataError: an argument that no trainer can use.
            APIResponseError: the trainer returned nothing of what was asked for; it may not know
                how. In the result.
        """
        request = self._request(prompt, num_samples, sampling_params, include_prompt_logprobs)
        counts = {
            "topk_prompt_logprobs": topk_prompt_logprobs,
            "topk_sample_logprobs": topk_sample_logprobs,
            "prompt_alt_tokens_k": prompt_alt_tokens_k,
        }
        for name, count in counts.items():
            if count < 0:
                raise DataError(f"{count} is below 0", field=name)
            setattr(request, name, count or msgspec.UNSET)
        _set_last(request, prompt_logprobs_last_n)
        if target_prompt_logprobs is not None:
            targets = _targets(target_prompt_logprobs, request.prompt.length)
            request.target_prompt_logprobs = targets
        check = partial(_check_answer, request)
        return self._connection.start_cancellable("asample", request, SampleResponse, check)

    sample_async = awaited(sample, SampleResponse)

    def compute_logprobs(
        self, prompt: ModelInput, prompt_logprobs_last_n: int | None = None
    ) -> APIFuture[list[float | None]]:
        """Computes the logprob of each token of a prompt, in nats; the first is None.

        Args:
            prompt: at least one token.
            prompt_logprobs_last_n: None for all but the last so many tokens.

        Raises:
            DataError: the prompt has no token, or not so many.
        """
        request = self._request(prompt, 1, SamplingParams(max_tokens=1), True)
        _set_last(request, prompt_logprobs_last_n)

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
        if isinstance(params.stop, str):  # every trainer takes a list, and SkyRL nothing else
            params = msgspec.structs.replace(params, stop=[params.stop])
        _check(prompt, num_samples, params)
        session_id, number = self._session.place()
        return messages.SampleRequest(
            prompt, params, session_id, number, num_samples, prompt_logprobs
        )


async def open_sampling(
    connection: Connection, model_path: str | None = None, base_model: str | None = None
) -> str:
    """Opens a sampling session as :meth:`SamplingClient.open` does, and returns its id."""
    path = "create_sampling_session"
    session, number = await connection.session(), next(connection.sampling_numbers)
    request = messages.CreateSamplingSessionRequest(session, number, base_model, model_path, path)
    answer = await connection.made(path, request, messages.CreateSamplingSessionResponse)
    return answer.sampling_session_id


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
    _check_wanted(request, answer)
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


def _set_last(request: messages.SampleRequest, last: int | None) -> None:
    field, length = "prompt_logprobs_last_n", request.prompt.length
    if last is None:
        return
    if not 1 <= last < length:
        raise DataError(f"{last} is not in 1 to {length - 1}", field=field)
    if not request.prompt_logprobs:
        raise DataError("set include_prompt_logprobs too, because it is about these", field=field)
    request.prompt_logprobs_last_n = last


def _targets(targets: ArrayLike, length: int) -> messages.PromptTargets:
    field = "target_prompt_logprobs"
    tokens = to_tensor(field, targets)
    if tokens.ndim != 2 or len(tokens) != length - 1:
        raise DataError(f"shape {list(tokens.shape)} is not [{length - 1}, K]", field=field)
    if tokens.dtype != np.int64 or (tokens < -1).any():
        raise DataError("it must hold token ids, int64, or -1 for none", field=field)
    return messages.PromptTargets(data=tokens.data, shape=list(tokens.shape))


def _check_wanted(request: messages.SampleRequest, answer: SampleResponse) -> None:
    """Checks that what was asked for of tokens is there, for as many tokens."""
    length = request.prompt.length
    wanted: list[tuple[str, Any, Sequence[int]]] = []
    if request.topk_prompt_logprobs:
        wanted.append(("topk_prompt_logprobs", answer.topk_prompt_logprobs, [length]))
    if request.topk_sample_logprobs:
        wanted += [
            ("topk_sample_logprobs", one.topk_logprobs, [len(one.tokens)])
            for one in answer.sequences
        ]
    if request.target_prompt_logprobs:
        shape = request.target_prompt_logprobs.shape
        wanted.append(("target_prompt_logprobs", answer.target_prompt_logprobs, shape))
    if k := request.prompt_alt_tokens_k or 0:
        drawn = answer.prompt_alt_tokens
        for row in (None, None) if drawn is None else (drawn.tokens, drawn.logprobs):
            wanted.append(("prompt_alt_tokens_k", row, [length - 1, k]))
    for name, found, shape in wanted:
        if found is None:
            raise APIResponseError(
                f"the trainer returned nothing for {name}; it may not know how to"
            )
        given = [*np.shape(found)] if isinstance(found, TensorData) else [len(found)]
        if given != list(shape):
            raise APIResponseError(f"the trainer returned {name} of shape {given}, not {shape}")
    last = request.prompt_logprobs_last_n or length
    for name in ("prompt_logprobs", "topk_prompt_logprobs"):
        rows = cast("list[object]", getattr(answer, name) or [])
        if any(row is not None for row in rows[: length - last]):
            raise APIResponseError(
                f"the trainer returned {name} before the last {last} tokens; it may not know "
                "prompt_logprobs_last_n"
            )


def _check_probable(logprobs: Sequence[float]) -> None:
    for one in logprobs:
        if not one <= MAX_LOGPROB:
            raise APIResponseError(
                f"the trainer returned a logprob of {one:g}, which is no logarithm of a probability"
            )


def _check(prompt: ModelInput, num_samples: int, params: SamplingParams) -> None:
    if not any(isinstance(chunk, ImageChunk) or chunk.tokens for chunk in prompt.chunks):
        raise DataError("it needs at least one token", field="prompt")
    if num_samples < 1:
        raise DataError(f"{num_samples}; ask for at least one", field="num_samples")
    if not (math.isfinite(params.temperature) and params.temperature >= 0):
        raise DataError(f"{params.temperature}; it must be finite and >= 0", field="temperature")
    if not 0 < params.top_p <= 1:
        raise DataError(f"{params.top_p}; it must be in (0, 1]", field="top_p")
    if params.max_tokens is not None and params.max_tokens < 1:
        raise DataError(f"{params.max_tokens}; it must be at least 1", field="max_tokens")
    if "" in (params.stop or ()):
        raise DataError("an empty text is never found; leave it out", field="stop")
