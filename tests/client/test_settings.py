"""Where requests go, who signs them, and who gets to see the key."""

from __future__ import annotations

import logging
import os
import traceback

import httpx
import pytest

from mintjax.client import ServiceClient
from mintjax.client.settings import DEFAULT_BASE_URL, RetryPolicy, resolve
from mintjax.errors import ConfigError, DataError, MintjaxError
from mintjax.types import AdamParams

from .data import DATA
from .double import ADDRESS, KEY, QUICK, Answer, Lose


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    for name in ("API_KEY", "BASE_URL", "BASE_MODEL"):
        monkeypatch.delenv(f"MINT_{name}", raising=False)
        monkeypatch.delenv(f"TINKER_{name}", raising=False)


def where(base_url=None, api_key=None, **options):
    url, key = resolve(base_url, api_key, **{"allow_insecure_http": False, **options})
    return str(url), key._key


def test_arguments_win_over_mint_over_tinker_over_the_default(monkeypatch):
    assert where(api_key="sk-0") == (DEFAULT_BASE_URL + "/", "sk-0")
    monkeypatch.setenv("TINKER_BASE_URL", "https://tinker.example")
    monkeypatch.setenv("TINKER_API_KEY", "tml-1")
    assert where() == ("https://tinker.example/", "tml-1")
    monkeypatch.setenv("MINT_BASE_URL", "https://mint.example/base/")
    monkeypatch.setenv("MINT_API_KEY", "sk-2")
    assert where() == ("https://mint.example/base", "sk-2")
    assert where("https://arg.example", "sk-3") == ("https://arg.example/", "sk-3")


def test_an_empty_variable_is_none(monkeypatch):
    monkeypatch.setenv("MINT_API_KEY", "")
    monkeypatch.setenv("TINKER_API_KEY", "tml-1")
    assert where("https://t.example")[1] == "tml-1"


def test_the_base_model_may_come_from_the_environment(service, trainer, monkeypatch):
    with pytest.raises(DataError, match="TINKER_BASE_MODEL"):
        service.create_lora_training_client()
    monkeypatch.setenv("TINKER_BASE_MODEL", "from-the-environment")
    service.create_lora_training_client()
    assert trainer.bodies("create_model")[0]["base_model"] == "from-the-environment"


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:8000", "http://localhost", "http://[::1]:1", "http://a.localhost"]
)
def test_a_trainer_on_this_machine_needs_neither_https_nor_a_key(url):
    assert where(url)[1] == ""


@pytest.mark.parametrize(
    ("url", "key", "message"),
    [
        ("http://trainer.example", "sk-1", "clear text"),
        ("http://127.0.0.1.evil.example", "sk-1", "clear text"),
        ("http://10.0.0.1", "sk-1", "clear text"),
        ("https://trainer.example", None, "MINT_API_KEY"),
        (None, "tml-1", "Tinker key"),
        ("ftp://trainer.example", "sk-1", "https://"),
        ("trainer.example", "sk-1", "https://"),
        ("https://", "sk-1", "host"),
        ("https://user:pw@trainer.example", "sk-1", "no user"),
        ("https://trainer.example?key=1", "sk-1", "query"),
        ("https://trainer.example:port", "sk-1", "no URL"),
        ("https://trainer.example", "sk-\n1", "API key"),
    ],
)
def test_what_is_refused(url, key, message):
    with pytest.raises(ConfigError, match=message) as caught:
        where(url, key)
    assert key is None or key not in str(caught.value)


def test_plain_http_can_be_allowed():
    assert where("http://trainer.example", "sk-1", allow_insecure_http=True)[1] == "sk-1"


def test_a_timeout_must_be_positive():
    with pytest.raises(ConfigError, match="timeout"):
        ServiceClient(ADDRESS, timeout=0)


def test_every_request_is_signed_and_named(client, trainer):
    client.forward(DATA).result(5)
    for path, _, headers in trainer.requests:
        assert headers["x-api-key"] == KEY, path
        assert headers["user-agent"].startswith("mintjax/")
        assert headers["content-type"] == "application/json"


def shown(error):
    """All that an error shows: message, notes, attributes, and those of what it came from."""
    text = []
    while error is not None:
        text += traceback.format_exception(error)
        text.append(repr(vars(error)))
        error = error.__cause__ or error.__context__
    return "".join(text)


def locals_of_ours(error):
    """The local variables of the package's own frames, as a debugging tool would print them."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    ours = [frame for frame in frames if f"{os.sep}mintjax{os.sep}" in frame.f_code.co_filename]
    assert ours
    return repr([frame.f_locals for frame in ours])


FAULTS = [
    Lose("unsent"),
    Lose("before"),
    Answer(401, {"detail": f"{KEY} is no key"}),
    Answer(422, {"detail": [{"loc": ["header", KEY], "msg": KEY}]}),
    Answer(500, {"detail": KEY}),
    Answer(401, {"detail": "no"}),
    Answer(200, {"request_id": [KEY], "error": KEY}),
    Answer(307, headers={"location": f"https://elsewhere.example/{KEY}"}),
]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("path", ["optim_step", "retrieve_future"])
def test_the_key_is_in_no_error_repr_or_log(connect, trainer, fault, path, caplog):
    with caplog.at_level(logging.DEBUG):
        service = connect()
        client = service.create_lora_training_client("tiny")
        trainer.faults[path] = [fault] * 1000
        with pytest.raises(MintjaxError) as caught:
            client.optim_step(AdamParams()).result(5)
    texts = [shown(caught.value), caplog.text, repr(service), repr(client)]
    texts.append(repr(vars(service)) + repr(vars(service._connection)))
    texts.append(repr(vars(service._connection.transport)))
    if KEY not in repr(fault):
        texts.append(locals_of_ours(caught.value))
    assert [text for text in texts if KEY in text] == []


def test_a_failed_request_carries_the_key_in_no_error(trainer):
    failed = {"error": f"{KEY} was refused", "category": "user"}
    transport = httpx.ASGITransport(trainer)
    with ServiceClient(ADDRESS, KEY, transport=transport, retry_policy=QUICK) as service:
        client = service.create_lora_training_client("tiny")
        trainer.faults["retrieve_future"] = [Answer(200, failed)]
        with pytest.raises(MintjaxError) as caught:
            client.optim_step(AdamParams()).result(5)
    assert KEY not in shown(caught.value)


@pytest.mark.parametrize("port", [-1, 0, 65536, 99999])
def test_a_port_is_one_that_there_is(port):
    with pytest.raises(ConfigError, match=f"within 1 and 65535, not {port}"):
        where(f"http://localhost:{port}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timeout": "5"}, "timeout must be above 0 seconds, not '5'"),
        ({"timeout": None}, "timeout must be above 0 seconds, not None"),
        ({"timeout": float("nan")}, "timeout must be above 0 seconds, not nan"),
        ({"max_response_bytes": 0}, "max_response_bytes=0 must be above 0"),
        ({"retry_policy": 5}, "retry_policy is 5"),
        ({"reduction": "sum"}, "reduction is 'sum'"),
        ({"on_progress": 5}, "on_progress is 5"),
        ({"api_key": 5}, "api_key must be a string, not int"),
    ],
)
def test_an_option_of_another_kind_is_told(options, message):
    with pytest.raises(ConfigError, match=message):
        ServiceClient("http://localhost:1", **options)


def test_a_policy_holds_numbers():
    with pytest.raises(ConfigError, match=r"RetryPolicy\(blocking='x'\) must be at least 0"):
        RetryPolicy(blocking="x")
