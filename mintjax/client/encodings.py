"""Writes requests as JSON, or passes as protocol buffers where the trainer says so."""

from __future__ import annotations

from typing import Any, cast

import msgspec

from mintjax.client.transport import Request
from mintjax.protocol import messages, protobuf, zstd
from mintjax.types import Datum

_PASSES = (messages.ForwardRequest, messages.ForwardBackwardRequest)


def encode(
    path: str, message: Any, config: messages.ClientConfigResponse, model_id: str, mutates: bool
) -> Request:
    """Writes a request as the trainer wants it.

    Raises:
        ConfigError: compressed, and the extra ``protobuf``, which can, is not installed.
    """
    if not config.proto_write_fwdbwd or not isinstance(message, _PASSES):
        return Request(path, messages.encode(message), model_id, mutates)
    is_forward = isinstance(message, messages.ForwardRequest)
    given = message.forward_input if is_forward else message.forward_backward_input
    if not isinstance(given.data, protobuf.EncodedData):  # handed over before that was known
        data = messages.decode(cast("msgspec.Raw", given.data), list[Datum])
        given = msgspec.structs.replace(given, data=data)
        message = type(message)(given, message.model_id, message.seq_id)
    body, headers = protobuf.encode_request(message), {"Content-Type": protobuf.MEDIA_TYPE}
    if config.proto_compress_fwdbwd:
        body, headers["Content-Encoding"] = zstd.compress(body), "zstd"
    return Request(path, body, model_id, mutates, "forward_backward", headers=headers)
