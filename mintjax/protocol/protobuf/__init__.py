"""The protocol's messages as protocol buffers: the same structs as in JSON, as bytes.

Nearly all of a message is numbers. Writing a message copies them once, and reading an answer copies
none, because the generated message classes would copy them two to five times. Only a trainer reads
requests. It uses the generated classes, which need the extra ``protobuf``.
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
