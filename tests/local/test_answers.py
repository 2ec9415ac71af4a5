"""Each answer repeats its request's key, refusals and unknown paths too."""

from __future__ import annotations

import pytest

from .http import serving


@pytest.fixture(scope="module")
def http(engine):
    with serving(engine) as http:
        yield http


@pytest.mark.parametrize("path", ["create_session", "retrieve_future", "no_such_path"])
def test_an_answer_repeats_the_key_of_its_request(http, path):
    answer = http.post(path, {"sdk_version": "1"}, x_idempotency_key="this one")
    assert answer.headers["X-Idempotency-Key"] == "this one"
    assert "X-Idempotency-Key" not in http.post(path, {"sdk_version": "1"}).headers
