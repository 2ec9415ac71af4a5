"""Answers of a trainer, read within limits, and the words in them made safe to show."""

from __future__ import annotations

import re
import zlib
from collections.abc import Awaitable, Callable
from typing import Any, cast

import httpx
import msgspec

from mintjax.errors import APIError, DataError
from mintjax.protocol import protobuf

CODING = "gzip"
"""The one content coding that is asked for."""

_LEAST_UNFOLDED = 64 << 20  # bytes that any answer may unfold to
_MOST_UNFOLDED = 100  # times what came, beyond that
_MAX_WORDS = 2000  # characters


async def _nothing() -> None: ...


class Reply(msgspec.Struct):
    """An HTTP answer, read to its end.

    Args:
        status: of HTTP.
        headers: of HTTP.
        body: the content, with its coding taken off.
        is_ours: it repeats the request's idempotency key; None where it has no such header.
        hang_up: closes the connection that it came by.
    """

    status: int
    headers: httpx.Headers
    body: bytes
    is_ours: bool | None = None
    hang_up: Callable[[], Awaitable[object]] = _nothing

    @property
    def is_protobuf(self) -> bool:
        """Tells whether its content type is that of a protocol buffer."""
        return self.headers.get("content-type", "").lower().startswith(protobuf.MEDIA_TYPE)

    @property
    def has_an_end(self) -> bool:
        """Tells whether HTTP says where it ends, so that one that was cut is noticed."""
        return "content-length" in self.headers or "transfer-encoding" in self.headers

    @property
    def detail(self) -> str:
        """The words of its ``detail``, as trainers refuse; empty where there is none."""
        return text_of(_answer(self.body).get("detail"))

    @property
    def words(self) -> str:
        """Whatever it says, for the user to read; empty where it says nothing."""
        answer = _answer(self.body)
        return self.detail or text_of(answer.get("error") or answer.get("message"))


def largest_content(received: int, allowed: int) -> int:
    """Returns how many bytes an answer may unfold to.

    Args:
        received: how many bytes came.
        allowed: how many are ever allowed.
    """
    return min(allowed, max(_LEAST_UNFOLDED, _MOST_UNFOLDED * received))


def unfold(body: bytes, coding: str, limit: int) -> bytes:
    """Takes the content coding off a body, and holds no more than the limit at any time.

    Raises:
        APIError: the content is beyond the limit, or in another coding than was asked for.
        DataError: it is not coded as it says.
    """
    if coding == "identity":
        return body
    if coding != CODING:
        raise APIError(f"an answer in {printable(coding)!r}, which was not asked for")
    parts: list[bytes] = []
    room = limit
    while body:
        member = zlib.decompressobj(16 + zlib.MAX_WBITS)
        try:
            parts.append(member.decompress(body, room + 1))
        except zlib.error as error:
            raise DataError(f"no {CODING}: {error}") from None
        room -= len(parts[-1])
        if room < 0:
            raise APIError(
                f"an answer of {len(body):,} bytes unfolds to more than the limit of {limit:,}"
            )
        if not member.eof:
            raise DataError(f"{CODING} that ends too early")
        body = member.unused_data
    return b"".join(parts)


class _Shape(msgspec.Struct):
    shape: list[int] | None = None


class _Shapes(msgspec.Struct):
    loss_fn_outputs: list[dict[str, _Shape]]


def check_sparse(body: bytes, limit: int) -> None:
    """Refuses sparse tensors that would take more memory than the limit once they are dense.

    Args:
        body: the result of a pass, in JSON.
        limit: in bytes, for all of them together.

    Raises:
        APIError: they would.
    """
    if b"sparse_" not in body:
        return
    try:
        outputs = msgspec.json.decode(body, type=_Shapes).loss_fn_outputs
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return  # whoever decodes it says what is wrong
    size = 0
    for tensor in (tensor for one in outputs for tensor in one.values()):
        numbers = 1
        for length in tensor.shape or ():
            numbers *= max(length, 0)
        size += 8 * numbers
    if size > limit:
        raise APIError(
            f"an answer of {len(body):,} bytes unfolds to {size:,}, beyond the limit of {limit:,}"
        )


def text_of(value: Any) -> str:
    """Puts what a trainer says into words: a text, or FastAPI's list of validation errors."""
    try:
        if isinstance(value, list):
            value = "; ".join(map(_validation_error, cast("list[Any]", value)))
        return str(value)[:_MAX_WORDS] if value else ""
    except RecursionError:
        return "words that are nested too deeply to be shown"


def _validation_error(item: Any) -> str:
    if not isinstance(item, dict):
        return str(item)
    error = cast("dict[str, Any]", item)
    location, words = error.get("loc"), str(error.get("msg", error))
    if not isinstance(location, list):
        return words
    return f"{'.'.join(map(str, cast('list[Any]', location)))}: {words}"


def printable(text: str) -> str:
    """Escapes what would steer a terminal or forge a line of a log.

    Line ends stay, and each new line is indented.
    """
    return _UNSAFE.sub(_escape, text).replace("\n", "\n  ")


def _escape(match: re.Match[str]) -> str:
    character = match[0]
    if character.isprintable() or character in "\n\t":
        return character
    return character.encode("unicode_escape").decode()


_UNSAFE = re.compile(r"[^\x20-\x7e\n\t]")


def _answer(body: bytes) -> dict[str, Any]:
    try:
        return msgspec.json.decode(body, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return {}
