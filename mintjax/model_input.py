"""The model's input: chunks of tokens and images."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

import msgspec
import numpy as np
import numpy.typing as npt

from mintjax.errors import DataError
from mintjax.tensors import numbers_of


class EncodedTextChunk(msgspec.Struct, frozen=True):
    """A run of token ids.

    Args:
        tokens: the ids, each at least 0.
        type: what the protocol calls such a chunk.

    Raises:
        DataError: a negative token.
    """

    tokens: list[int]
    type: Literal["encoded_text"] = "encoded_text"

    def __post_init__(self) -> None:
        if self.tokens and min(self.tokens) < 0:
            at = next(i for i, token in enumerate(self.tokens) if token < 0)
            raise DataError(
                f"token {self.tokens[at]} at position {at} is negative", field="model_input"
            )

    @property
    def length(self) -> int:
        """The number of tokens."""
        return len(self.tokens)


class ImageChunk(msgspec.Struct, frozen=True):
    """An image in a prompt, which is sent to the trainer as it is.

    Args:
        data: the file's bytes; base64 text is decoded.
        format: what kind of file it is.
        expected_tokens: how many tokens the trainer makes of it, as the model's renderer says. A
            datum needs it, because each column has one entry for each of them too; the trainer
            refuses a wrong number.
        type: what the protocol calls such a chunk.

    Raises:
        DataError: no bytes, another format, or a number of tokens below 1.
    """

    data: bytes
    format: Literal["png", "jpeg"]
    expected_tokens: int | None = None
    type: Literal["image"] = "image"

    def __post_init__(self) -> None:
        data = cast("Any", self.data)
        if isinstance(data, str):
            try:
                data = base64.b64decode(data, validate=True)
            except (binascii.Error, ValueError):
                raise _no_image("its text is not base64") from None
            msgspec.structs.force_setattr(self, "data", data)
        if not isinstance(data, bytes) or not data:
            raise _no_image("it needs the bytes of a file")
        if self.format not in ("png", "jpeg"):
            raise _no_image(f"format {self.format!r} is neither 'png' nor 'jpeg'")
        if self.expected_tokens is None:
            return
        number = self.expected_tokens
        if isinstance(number, bool) or not hasattr(number, "__index__") or number < 1:
            raise _no_image(f"expected_tokens is {number!r}; it is a whole number of at least 1")
        msgspec.structs.force_setattr(self, "expected_tokens", int(number))

    def __repr__(self) -> str:
        about = f"format={self.format!r}, expected_tokens={self.expected_tokens}"
        return f"ImageChunk(<{len(self.data)} bytes>, {about})"

    @property
    def length(self) -> int:
        """The number of tokens that the trainer makes of it.

        Raises:
            DataError: ``expected_tokens`` is not set.
        """
        if self.expected_tokens is None:
            raise _no_image("set expected_tokens, because its number of tokens is not known")
        return self.expected_tokens


def _no_image(reason: str) -> DataError:
    return DataError(f"an image: {reason}", field="model_input")


ModelInputChunk: TypeAlias = EncodedTextChunk | ImageChunk


class _AnyChunk(msgspec.Struct):
    """A chunk as JSON has it; ``type`` may be missing, so it is no union that msgspec decodes."""

    type: Literal["encoded_text", "image"] = "encoded_text"
    tokens: list[int] | None = None
    data: str = ""
    format: Literal["png", "jpeg"] = "png"
    expected_tokens: int | None = None

    def own(self) -> ModelInputChunk:
        if self.type == "image":
            return ImageChunk(cast("Any", self.data), self.format, self.expected_tokens)
        if self.tokens is None:
            raise DataError("a chunk of text has no tokens", field="model_input")
        return EncodedTextChunk(self.tokens)


class ModelInput(msgspec.Struct, frozen=True):
    """The tokens that the model reads, in chunks.

    Args:
        chunks: the chunks of text and images, in order. The embedded trainer reads text only.
    """

    if TYPE_CHECKING:
        chunks: list[ModelInputChunk]
    else:
        chunks: list[_AnyChunk]

    def __post_init__(self) -> None:
        if any(type(chunk) is _AnyChunk for chunk in cast("list[object]", self.chunks)):
            decoded = [cast("_AnyChunk", chunk).own() for chunk in self.chunks]
            msgspec.structs.force_setattr(self, "chunks", decoded)

    @classmethod
    def from_ints(cls, tokens: Sequence[int] | npt.NDArray[np.integer[Any]]) -> ModelInput:
        """Makes one chunk of token ids, from a list, an integer array or a torch tensor ``[T]``.

        Raises:
            DataError: the tokens are not a flat sequence of integers of at least 0.
        """
        array = np.asarray(numbers_of(tokens))
        if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
            raise DataError(
                f"tokens must be a flat sequence of integers, not {array.dtype.name} of shape "
                f"{list(array.shape)}",
                field="model_input",
            )
        return cls([EncodedTextChunk(cast("list[int]", array.tolist()))])

    @classmethod
    def empty(cls) -> ModelInput:
        """Makes an input of no token."""
        return cls([])

    def append(self, chunk: ModelInputChunk) -> ModelInput:
        """Makes an input of the same chunks, and another ``chunk`` behind them."""
        return ModelInput([*self.chunks, _as_chunk(chunk)])

    def append_int(self, token: int) -> ModelInput:
        """Makes an input of the same chunks, and another ``token`` behind them."""
        return self.append(EncodedTextChunk([token]))

    def to_ints(self) -> list[int]:
        """Lists all tokens.

        Raises:
            DataError: there is an image among them, which has no token ids.
        """
        tokens: list[int] = []
        for chunk in self.chunks:
            if isinstance(chunk, ImageChunk):
                raise _no_image("it has no token ids, which are needed here")
            tokens += chunk.tokens
        return tokens

    @property
    def length(self) -> int:
        """The number of tokens."""
        if len(self.chunks) == 1:  # nearly always, and asked of every datum at every step
            return self.chunks[0].length
        return sum(chunk.length for chunk in self.chunks)


def as_model_input(value: Any) -> ModelInput:
    """Takes another library's model input, by its ``chunks``.

    Args:
        value: a :class:`ModelInput`, which stays itself, or what is built alike, such as the
            official SDK's.

    Returns:
        The same tokens and images; a chunk's list of tokens is shared.

    Raises:
        DataError: it has no chunks, or one of them is neither text nor an image's bytes.
    """
    if isinstance(value, ModelInput):
        return value
    chunks = getattr(value, "chunks", None)
    if chunks is None:
        raise DataError(
            f"{type(value).__name__} has no chunks of tokens; ModelInput.from_ints(tokens) makes a "
            "model input of a list",
            field="model_input",
        )
    return ModelInput([_as_chunk(chunk) for chunk in chunks])


def _as_chunk(chunk: Any) -> ModelInputChunk:
    if isinstance(chunk, EncodedTextChunk | ImageChunk):
        return chunk
    if getattr(chunk, "type", None) == "image":
        return ImageChunk(chunk.data, chunk.format, chunk.expected_tokens)
    tokens = getattr(chunk, "tokens", None)
    if tokens is None:
        raise DataError(
            f"a chunk is a {type(chunk).__name__}, which has no tokens; this client sends text "
            "and images. Train on it with the official SDK, which takes an objective of mintjax as "
            "forward_backward_custom(data, mintjax.interop.sdk_loss(objective))",
            field="model_input",
        )
    return EncodedTextChunk(cast("list[int]", tokens) if isinstance(tokens, list) else [*tokens])
