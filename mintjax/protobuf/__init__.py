"""The protocol's passes as protocol buffers: the same structs as in JSON, as bytes.

What is written is put together here, in one copy: through the message classes it takes three to
five. What is read goes through them, for it may be anybody's: they need the extra ``protobuf``.
"""

from mintjax.protobuf.decoding import decode_output as decode_output
from mintjax.protobuf.decoding import decode_request as decode_request
from mintjax.protobuf.decoding import require as require
from mintjax.protobuf.encoding import EncodedData as EncodedData
from mintjax.protobuf.encoding import encode_datum as encode_datum
from mintjax.protobuf.encoding import encode_output as encode_output
from mintjax.protobuf.encoding import encode_request as encode_request

MEDIA_TYPE = "application/x-protobuf"
