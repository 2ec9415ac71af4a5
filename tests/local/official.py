"""The requests of the official client 0.38, as it sends them, over a socket."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import httpx

from mintjax.local import running_server

from .conftest import BASE_MODEL

ADAM = {"type": "adamw"}
LORA = {"rank": 4, "seed": 1, "train_unembed": True, "train_mlp": True, "train_attn": True}


class Client:
    """The official client's requests, as they go over the wire."""

    def __init__(self, http: httpx.Client) -> None:
        self.http = http
        self.session_id = self.ask(
            "create_session",
            {
                "tags": [],
                "user_metadata": {"owner": "me"},
                "sdk_version": "0.38.0",
                "project_id": None,
                "display_name": "a name",
                "type": "create_session",
            },
        )["session_id"]
        self._models = 0
        self._requests: dict[str, int] = {}

    def send(self, path: str, body: Any, method: str = "POST") -> httpx.Response:
        return self.http.request(method, f"/api/v1/{path}", json=body)

    def ask(self, path: str, body: Any = None, method: str = "POST", **params: Any) -> Any:
        """The answer to a request that is answered at once."""
        answer = self.http.request(method, f"/api/v1/{path}", json=body, params=params)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def result(self, accepted: httpx.Response) -> Any:
        assert accepted.status_code == 200, accepted.text
        while True:
            question = {"request_id": accepted.json()["request_id"], "allow_metadata_only": True}
            result = self.ask("retrieve_future", question)
            if result.get("type") != "try_again":
                return result

    def call(self, path: str, body: Any) -> Any:
        return self.result(self.send(path, body))

    def of_model(self, endpoint: str, model_id: str, **body: Any) -> Any:
        """The result of the next request of a model."""
        number = self._requests[model_id] = self._requests.get(model_id, 0) + 1
        request = {"model_id": model_id, "seq_id": number, "type": endpoint}
        return self.call(endpoint, request | body)

    def create_model_request(self, **changes: Any) -> dict[str, Any]:
        self._models += 1
        return {
            "session_id": self.session_id,
            "model_seq_id": self._models - 1,
            "base_model": BASE_MODEL,
            "lora_config": LORA,
            "optimizer_config": ADAM,
            "type": "create_model",
        } | changes

    def create_model(self, **changes: Any) -> str:
        return self.call("create_model", self.create_model_request(**changes))["model_id"]

    def load_request(self, saved: str, **changes: Any) -> tuple[str, dict[str, Any]]:
        """The id that the client takes for granted, and the request that makes the model."""
        self._models += 1
        number = self._models - 1
        body = {
            "session_id": self.session_id,
            "model_seq_id": number,
            "path": saved,
            "optimizer": True,
            "type": "load_weights",
        }
        return f"{self.session_id}:train:{number}", body | changes

    def step(self, model_id: str, **adam_params: float) -> dict[str, Any]:
        datum = {
            "model_input": {"chunks": [{"tokens": [1, 2, 3], "type": "encoded_text"}]},
            "loss_fn_inputs": {
                "target_tokens": {"data": [2, 3, 4], "dtype": "int64", "shape": [3]},
                "weights": {"data": [1.0, 1.0, 1.0], "dtype": "float32", "shape": [3]},
            },
        }
        given = {"data": [datum], "loss_fn": "cross_entropy"}
        done = self.of_model("forward_backward", model_id, forward_backward_input=given)
        self.of_model("optim_step", model_id, adam_params={"learning_rate": 1e-2, **adam_params})
        return done["metrics"]


@contextmanager
def clients(engine, **options) -> Generator[Client]:
    with running_server(engine, **options) as url, httpx.Client(base_url=url, timeout=60) as http:
        yield Client(http)


def sample_request(opened: str, number: int, **params: Any) -> dict[str, Any]:
    return {
        "sampling_session_id": opened,
        "seq_id": number,
        "num_samples": 1,
        "prompt": {"chunks": [{"tokens": [1, 2, 3], "type": "encoded_text"}]},
        "sampling_params": {"max_tokens": 2, "temperature": 1.0, "top_k": -1, "top_p": 1.0}
        | params,
        "prompt_logprobs": False,
        "topk_prompt_logprobs": 0,
        "topk_sample_logprobs": 0,
        "prompt_alt_tokens_k": 0,
        "type": "sample",
    }
