"""The protocol's passes as protocol buffers: the same structs as in JSON, as bytes.

What is written is put together here, in one copy: through the message classes it takes three to
five. What is read goes through them, for it may be anybody's: they need the extra ``protobuf``.
"""

from mintjax.protobuf.decoding import decode_output, decode_request, number_of, require
from mintjax.protobuf.encoding import (
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
    "encode_datum",
    "encode_output",
    "encode_request",
    "encode_sample",
    "number_of",
    "require",
]

MEDIA_TYPE = "application/x-protobuf"
