"""The encoding of passes, JSON or protocol buffers: found out once for each connection."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, cast

import msgspec

from mintjax.client.transport import Request
from mintjax.errors import APIError, APIStatusError, NonFiniteError
from mintjax.protocol import messages, protobuf, zstd
from mintjax.protocol.protobuf import EncodedData, encode_datum
from mintjax.tensors import check_finite
from mintjax.types import Datum

logger = logging.getLogger("mintjax.client")

_PASSES = (messages.ForwardRequest, messages.ForwardBackwardRequest)
_MAY_MEAN_JSON = frozenset({400, 404, 415, 422})


class Encoding:
    """Writes requests as the trainer reads them.

    A trainer that asks for protocol buffers in ``client/config`` gets them. Elsewhere passes go as
    JSON until one is refused and the trainer takes it as a protocol buffer. Once it has taken one
    as JSON, no refusal is put down to the encoding any more.

    Args:
        limits: the trainer's.
        address: of the trainer, for the log.

    Attributes:
        in_protobuf: passes are written as protocol buffers.
    """

    def __init__(
        self, limits: messages.ClientConfigResponse | None = None, address: str = "the trainer"
    ) -> None:
        self.limits = limits or messages.ClientConfigResponse()
        self.in_protobuf = self.limits.proto_write_fwdbwd
        self._address = address
        self._reads_json = False

    def request(
        self, path: str, message: Any, model_id: str, mutates: bool, *, in_protobuf: bool
    ) -> Request:
        """Writes a request; one that is no pass is always JSON.

        Args:
            path: below ``/api/v1/``.
            message: what to send, with its number.
            model_id: of the model.
            mutates: whether it changes the model.
            in_protobuf: the encoding of a pass.

        Raises:
            ConfigError: compressed, and the extra ``protobuf``, which can, is not installed.
        """
        if not in_protobuf or not isinstance(message, _PASSES):
            return Request(path, messages.encode(message), model_id, mutates)
        body = protobuf.encode_request(_as_protobuf(message))
        headers = {"Content-Type": protobuf.MEDIA_TYPE}
        if self.limits.proto_compress_fwdbwd:
            body, headers["Content-Encoding"] = zstd.compress(body), "zstd"
        return Request(path, body, model_id, mutates, "forward_backward", headers=headers)

    def may_be_refused_as_json(self, request: Request, refusal: APIError) -> bool:
        """Tells whether a refusal may be one of JSON, so that a protocol buffer is worth a try."""
        return (
            request.path in ("forward", "forward_backward")
            and not request.headers
            and not request.in_doubt
            and not self._reads_json
            and isinstance(refusal, APIStatusError)
            and refusal.status_code in _MAY_MEAN_JSON
            and (refusal.status_code != 404 or _is_no_endpoint(request.path, refusal))
        )

    def accepted(self, request: Request) -> None:
        """Notes that the trainer has taken a request."""
        if request.path in ("forward", "forward_backward") and not request.headers:
            self._reads_json = True

    def switch(self, refusal: APIError) -> None:
        """Writes passes as protocol buffers from now on, and says so."""
        if self.in_protobuf:  # another model's pass has found it out
            return
        self.in_protobuf = True
        logger.warning(
            "%s reads passes as protocol buffers and not as JSON, so they are sent so from now on "
            "(%s)",
            self._address,
            refusal,
        )


def is_refusal_of_json(path: str, refusal: APIError) -> bool:
    """Tells whether a trainer certainly reads no JSON, or has no endpoint for a forward pass.

    A trainer whose passes are protocol buffers only has no ``forward``.
    """
    if not isinstance(refusal, APIStatusError):
        return False
    return refusal.status_code == 415 or _is_no_endpoint(path, refusal)


def encoded(datum: Datum, position: int, in_protobuf: bool) -> bytes:
    """Writes a datum.

    Args:
        datum: one.
        position: of it in its batch, for the errors' sake.
        in_protobuf: as a protocol buffer, else as JSON.

    Raises:
        NonFiniteError: a number that no encoding carries; the message names its place.
        DataError: a token that the encoding does not carry.
    """
    try:
        return encode_datum(datum, position) if in_protobuf else messages.encode(datum)
    except NonFiniteError:
        for name, column in datum.loss_fn_inputs.items():
            check_finite(column, position, f"input {name!r}")
        raise


def joined(parts: Sequence[bytes], in_protobuf: bool) -> msgspec.Raw | EncodedData:
    """Joins what :func:`encoded` wrote to the data of a request."""
    return EncodedData(b"".join(parts)) if in_protobuf else msgspec.Raw(b"[%b]" % b",".join(parts))


def _as_protobuf(
    message: messages.ForwardRequest | messages.ForwardBackwardRequest,
) -> messages.ForwardRequest | messages.ForwardBackwardRequest:
    """Writes data anew that were handed over as JSON, before the encoding was known."""
    is_forward = isinstance(message, messages.ForwardRequest)
    given = message.forward_input if is_forward else message.forward_backward_input
    if isinstance(given.data, EncodedData):
        return message
    data = messages.decode(cast("msgspec.Raw", given.data), list[Datum])
    given = msgspec.structs.replace(given, data=data)
    return type(message)(given, message.model_id, message.seq_id)


def _is_no_endpoint(path: str, refusal: APIStatusError) -> bool:
    """Tells a missing endpoint from a missing model, by the words of Starlette and FastAPI."""
    return path == "forward" and refusal.status_code == 404 and refusal.message == "Not Found"
