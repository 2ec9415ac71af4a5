"""A trainer for tests: it keeps the protocol to the letter, except where it is told not to.

A model here is the list of what was applied to it. Faults are queued by path, and each request to
that path uses one up.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

from mintjax.client import RetryPolicy

QUICK = RetryPolicy(
    first_delay=0.001,
    longest_delay=0.004,
    deadline=0.25,
    first_contact=0.05,
    poll_timeout=1.0,
    silence=0.5,
    heartbeat=30.0,
)
ADDRESS = "http://127.0.0.1:9"
KEY = "sk-this-is-the-secret"

ASYNCHRONOUS = {
    "forward",
    "forward_backward",
    "optim_step",
    "save_weights",
    "load_weights",
    "save_weights_for_sampler",
    "create_model",
    "unload_model",
    "asample",
    "mint/forward_backward_reverse_kl",
    "mint/checkpoints/interpolate",
}


@dataclass
class Answer:
    """Answer so, without acting (or after acting)."""

    status: int = 200
    body: Any = b""
    headers: dict[str, str] = field(default_factory=dict)
    act: bool = False


@dataclass
class Lose:
    """Let the connection break: before the request arrives, before it is acted on, or after."""

    when: str = "unsent"


class Hold:
    """Act, and answer once :meth:`release` was called, from any thread."""

    def __init__(self) -> None:
        self._released = False
        self._wakers: list[Callable[[], object]] = []

    async def released(self) -> None:
        loop, event = asyncio.get_running_loop(), asyncio.Event()
        self._wakers.append(lambda: loop.call_soon_threadsafe(event.set))
        if not self._released:  # asked once the waker can be seen, so that it is not missed
            await event.wait()

    def release(self) -> None:
        self._released = True
        for wake in self._wakers:
            with contextlib.suppress(RuntimeError):  # that loop has been closed
                wake()


async def _send(send: Any, answer: Answer) -> None:
    content = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
    headers = [(k.encode(), v.encode()) for k, v in answer.headers.items()]
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": content})


@dataclass(repr=False)
class Trainer:
    """The double; an ASGI application."""

    key: str | None = None
    config: dict[str, Any] | None = field(
        default_factory=lambda: {"mintjax_reduction": {}}  # it sums, and need not be measured
    )
    faults: dict[str, list[Any]] = field(default_factory=lambda: defaultdict(list))
    requests: list[tuple[str, dict[str, Any], dict[str, str]]] = field(default_factory=list)
    models: dict[str, list[Any]] = field(default_factory=dict)
    refuse: Callable[[str, dict[str, Any]], Any] = lambda path, body: None
    output: Callable[[str, dict[str, Any], dict[str, Any]], dict[str, Any]] = (
        lambda path, body, result: result
    )

    def __post_init__(self) -> None:
        self.results: dict[str, Any] = {}
        self.query = b""
        self.in_protobuf = 0  # requests that it could not read
        self.by_key: dict[str, str] = {}
        self.by_seq: dict[tuple[str, int], str] = {}
        self.waiting: dict[str, dict[int, tuple[str, str, dict[str, Any]]]] = defaultdict(dict)
        self.next_seq: dict[str, int] = defaultdict(lambda: 1)

    def paths(self, *only: str) -> list[str]:
        return [path for path, _, _ in self.requests if not only or path in only]

    def bodies(self, path: str) -> list[dict[str, Any]]:
        return [body for at, body, _ in self.requests if at == path]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        raw = b""
        while True:
            message = await receive()
            raw += message.get("body", b"")
            if not message.get("more_body"):
                break
        path = scope["path"].removeprefix("/api/v1/")
        self.query = scope["query_string"]
        headers = {k.decode().lower(): v.decode() for k, v in scope["headers"]}
        if headers.get("content-type") == "application/x-protobuf":  # it reads JSON only
            self.in_protobuf += 1
            await _send(send, Answer(422, {"detail": "body: Input should be JSON"}))
            return
        body = json.loads(raw, parse_constant=_refuse_constant) if raw else {}
        queue = self.faults[path] or self.faults[f"{path}/{body.get('request_id')}"]
        fault = queue.pop(0) if queue else None
        if isinstance(fault, Lose) and fault.when == "unsent":
            raise httpx.ConnectError("refused by the test")
        self.requests.append((path, body, headers))
        if isinstance(fault, Lose) and fault.when == "before":
            raise httpx.ReadError("broken by the test")
        answer = (
            fault if isinstance(fault, Answer) and not fault.act else self.act(path, body, headers)
        )
        if isinstance(fault, Lose):
            raise httpx.ReadError("broken by the test")
        if isinstance(fault, Hold):
            await fault.released()
        if isinstance(fault, Answer):
            answer = fault
        await _send(send, answer)

    def act(self, path: str, body: dict[str, Any], headers: dict[str, str]) -> Answer:
        if self.key is not None and headers.get("x-api-key") != self.key:
            return Answer(401, {"detail": f"unknown key {headers.get('x-api-key')}"})
        refusal = self.refuse(path, body)
        if refusal is not None:
            return refusal
        if path == "client/config":
            return Answer(404) if self.config is None else Answer(200, self.config)
        if path == "create_session":
            return Answer(200, {"session_id": "session-1"})
        if path == "session_heartbeat":
            return Answer(200, {})
        if path == "get_server_capabilities":
            return Answer(200, {"supported_models": [{"model_name": "tiny"}]})
        if path == "get_info":
            data = {"model_name": "tiny"}
            return Answer(200, {"model_id": body["model_id"], "model_data": data, "lora_rank": 4})
        if path == "weights_info":
            return Answer(200, {"base_model": "tiny", "is_lora": True, "lora_rank": 4})
        if path == "create_sampling_session":
            return Answer(200, {"sampling_session_id": "sampling-1"})
        if path == "retrieve_future":
            return self.retrieve(body)
        if path in ASYNCHRONOUS:
            return self.accept(path, body, headers)
        return Answer(404, {"detail": f"no {path}"})

    def accept(self, path: str, body: dict[str, Any], headers: dict[str, str]) -> Answer:
        key = headers["x-idempotency-key"]
        model, seq = body.get("model_id"), body.get("seq_id")
        known = self.by_key.get(key) or self.by_seq.get((model or "", seq or 0))
        if known is not None:
            return Answer(200, {"request_id": known})
        request_id = f"request-{len(self.by_key)}"
        self.by_key[key] = request_id
        if model is None or path == "unload_model":
            self.results[request_id] = self.run(path, body)
        else:
            self.by_seq[(model, seq)] = request_id
            self.waiting[model][seq] = (request_id, path, body)
            while self.next_seq[model] in self.waiting[model]:
                ready, at, what = self.waiting[model].pop(self.next_seq[model])
                self.results[ready] = self.run(at, what)
                self.next_seq[model] += 1
        return Answer(200, {"request_id": request_id})

    def retrieve(self, body: dict[str, Any]) -> Answer:
        result = self.results.get(body["request_id"])
        if body["request_id"] not in self.by_key.values():
            return Answer(404, {"detail": "no such request"})
        if result is None:
            return Answer(200, {"type": "try_again", "request_id": body["request_id"]})
        return Answer(200, result)

    def run(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        if path == "create_model":
            model = f"model-{body['model_seq_id']}"
            self.models[model] = []
            return {"model_id": model}
        if path == "asample":
            tokens = _tokens(body["prompt"])
            return {
                "sequences": [{"tokens": [1, 2], "logprobs": [-1.0, -2.0], "stop_reason": "length"}]
                * body["num_samples"],
                "prompt_logprobs": [None, *(-0.5 for _ in tokens[1:])],
            }
        if path == "mint/checkpoints/interpolate":
            return {"path": "tinker://mixed", **body}
        model = self.models[body["model_id"]]
        if path == "unload_model":
            del self.models[body["model_id"]]
            return {"model_id": body["model_id"]}
        if path in ("forward", "forward_backward"):
            given = body[f"{path}_input"]
            if path == "forward_backward":
                weights = [
                    d["loss_fn_inputs"].get("weights", {}).get("data") for d in given["data"]
                ]
                model.append((path, given["loss_fn"], weights))
            return self.output(path, body, _pass(given))
        model.append((path, body.get("adam_params") or body.get("path")))
        if path == "optim_step":
            return {"metrics": None}
        if path == "save_weights_for_sampler" and body.get("path") is None:
            return {"sampling_session_id": "sampling-2"}
        if path == "mint/forward_backward_reverse_kl":
            loss = {"data": [0.5], "dtype": "float32", "shape": [1]}
            return {"outputs": [{"loss": loss} for _ in body["data"]], "metrics": {"kl:mean": 0.5}}
        return {"path": f"tinker://{body['model_id']}/weights/{body['path']}"}


def logprob(token: int, target: int) -> float:
    """What this trainer takes every model to think."""
    return -1.0 - (3 * token + target) % 7 / 8


def _tokens(model_input: dict[str, Any]) -> list[int]:
    """All tokens; an image counts as so many zeros as it has."""
    return [
        token
        for chunk in model_input["chunks"]
        for token in (chunk["tokens"] if "tokens" in chunk else [0] * chunk["expected_tokens"])
    ]


def _loss(loss_fn: str, logprobs: list[float], columns: dict[str, list[float]]) -> float:
    """The sum of a loss; of ``ppo``, with the bounds that it has by default."""
    if loss_fn != "ppo" or "advantages" not in columns:
        weights = columns.get("weights", [1.0] * len(logprobs))
        return -sum(w * lp for w, lp in zip(weights, logprobs, strict=True))
    total = 0.0
    rows = zip(logprobs, columns["logprobs"], columns["advantages"], strict=True)
    for lp, sampling, advantage in rows:
        ratio = math.exp(lp - sampling)
        total -= min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage)
    return total


def _pass(given: dict[str, Any]) -> dict[str, Any]:
    outputs, total = [], 0.0
    for datum in given["data"]:
        targets = datum["loss_fn_inputs"]["target_tokens"]["data"]
        logprobs = [
            logprob(token, target)
            for token, target in zip(_tokens(datum["model_input"]), targets, strict=True)
        ]
        columns = {name: column["data"] for name, column in datum["loss_fn_inputs"].items()}
        total += _loss(given["loss_fn"], logprobs, columns)
        tensor = {"data": logprobs, "dtype": "float32", "shape": [len(logprobs)]}
        outputs.append({"logprobs": tensor})
    return {
        "loss_fn_output_type": "ArrayRecord",
        "loss_fn_outputs": outputs,
        "metrics": {"loss:sum": total, "plain": 1.0},
    }


def _refuse_constant(name: str) -> float:
    raise AssertionError(f"{name} is no JSON")
