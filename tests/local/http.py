"""A bare HTTP client of the trainer, which sends whatever a test wants sent."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import httpx

from mintjax.local import Engine
from mintjax.local.app import application
from mintjax.protocol import messages


class Http:
    """Requests to the trainer's application, without a socket."""

    def __init__(self, app: Any, api_key: str | None) -> None:
        headers = {} if api_key is None else {"X-API-Key": api_key}
        self._runner = asyncio.Runner()
        self._client = httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://localhost", headers=headers
        )

    @property
    def headers(self) -> httpx.Headers:
        """Sent with every request."""
        return self._client.headers

    def close(self) -> None:
        self._runner.run(self._client.aclose())
        self._runner.close()

    def send(self, method: str, path: str, **options: Any) -> httpx.Response:
        return self._runner.run(self._client.request(method, f"/api/v1/{path}", **options))

    def post(self, path: str, message: Any, **headers: str) -> httpx.Response:
        """POST a struct, a dict or raw bytes."""
        body = message if isinstance(message, bytes) else messages.encode(message)
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.send(
            "POST", path, content=body, headers={"Content-Type": "application/json", **headers}
        )

    def result(self, accepted: httpx.Response) -> dict[str, Any]:
        """What ``retrieve_future`` gives for a request that was accepted."""
        assert accepted.status_code == 200, accepted.text
        while True:
            answer = self.post("retrieve_future", {"request_id": accepted.json()["request_id"]})
            assert answer.status_code == 200, answer.text
            if answer.json().get("type") != "try_again":
                return answer.json()

    def call(self, path: str, message: Any) -> dict[str, Any]:
        """POST a request and wait for its result."""
        return self.result(self.post(path, message))


@contextmanager
def serving(engine: Engine, api_key: str | None = None, **options: Any) -> Generator[Http]:
    """A client of an application around the engine."""
    with application(engine, api_key=api_key, **options) as app:
        http = Http(app, api_key)
        try:
            yield http
        finally:
            http.close()


def as_json(message: Any) -> Any:
    """A struct as the JSON that would be sent, to be spoilt before it is."""
    return json.loads(messages.encode(message))
