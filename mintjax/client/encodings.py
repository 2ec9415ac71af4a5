"""How a request is written: as JSON, or a pass as a protocol buffer where the trainer says so."""

from __future__ import annotations

from typing import Any, cast

import msgspec

from mintjax import compression, protobuf, wire
from mintjax.types import Datum

_PASSES = (wire.ForwardRequest, wire.ForwardBackwardRequest)


class Body(msgspec.Struct, frozen=True):
    """A request as it is sent.

    Args:
        path: where to; both kinds of pass go to one place as protocol buffers.
        content: the bytes.
        headers: what they are, where that is not JSON.
    """

    path: str
    content: bytes
    headers: dict[str, str] = msgspec.field(default_factory=dict[str, str])

    @property
    def accept(self) -> dict[str, str]:
        """The header by which its result is asked for."""
        return {"Accept": f"{protobuf.MEDIA_TYPE}, application/json"} if self.headers else {}

    def __str__(self) -> str:
        what = ", ".join(self.headers.values()) or "application/json"
        return f"{len(self.content):,} bytes of {what}"


def encode(path: str, message: Any, config: wire.ClientConfigResponse) -> Body:
    """Write a request as the trainer wants it.

    Raises:
        ConfigError: as a protocol buffer, and the extra ``protobuf`` is not installed.
    """
    if not config.proto_write_fwdbwd or not isinstance(message, _PASSES):
        return Body(path, wire.encode(message))
    protobuf.require()
    is_forward = isinstance(message, wire.ForwardRequest)
    given = message.forward_input if is_forward else message.forward_backward_input
    if not isinstance(given.data, protobuf.EncodedData):  # handed over before that was known
        data = wire.decode(cast("msgspec.Raw", given.data), list[Datum])
        given = msgspec.structs.replace(given, data=data)
        message = type(message)(given, message.model_id, message.seq_id)
    content = protobuf.encode_request(message)
    headers = {"Content-Type": protobuf.MEDIA_TYPE}
    if config.proto_compress_fwdbwd:
        content = compression.compress(content)
        headers["Content-Encoding"] = "zstd"
    return Body("forward_backward", content, headers)
