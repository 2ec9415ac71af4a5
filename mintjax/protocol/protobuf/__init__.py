"""The protocol's passes as protocol buffers: the same structs as in JSON, as bytes.

Numbers are most of them: they are copied once where a message is written, and not at all where an
answer is read, where the message classes would copy them two to five times. Requests, which only a
trainer reads, go through those classes, and they need the extra ``protobuf``.
"""

from mintjax.protocol.protobuf.answers import decode_output, decode_sample
from mintjax.protocol.protobuf.decoding import decode_request, number_of, require
from mintjax.protocol.protobuf.encoding import (
    EncodedData,
    encode_datum,
    encode_output,
    encode_request,
    encode_sample,
)

__all__ = [
    "MEDIA_TYPE",
    "EncodedData",
    "decode_output",
    "decode_request",
    "decode_sample",
    "encode_datum",
    "encode_output",
    "encode_request",
    "encode_sample",
    "number_of",
    "require",
]

MEDIA_TYPE = "application/x-protobuf"
