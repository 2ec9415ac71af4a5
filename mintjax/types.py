"""The values that travel between client and trainer, under the names of the Tinker SDK."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar, cast

import msgspec
import numpy as np
import numpy.typing as npt

from mintjax import runs
from mintjax.errors import DataError
from mintjax.left_out import NAMES, missing
from mintjax.tensors import TensorData, numbers_of, to_tensor

LossFnName = Literal["cross_entropy", "importance_sampling", "ppo", "cispo", "dro"]
LossFnType: TypeAlias = str
StopReason = Literal["stop", "length"]
TensorDtype = Literal["float32", "int64"]
ModelID: TypeAlias = str


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
        if self.expected_tokens is not None and self.expected_tokens < 1:
            raise _no_image(f"expected_tokens is {self.expected_tokens}; it is at least 1")

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
        """One chunk of token ids, from a list, an integer array or a torch tensor, shape ``[T]``.

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
        """No token."""
        return cls([])

    def append(self, chunk: ModelInputChunk) -> ModelInput:
        """The same tokens, and those of another ``chunk`` behind them."""
        return ModelInput([*self.chunks, _as_chunk(chunk)])

    def append_int(self, token: int) -> ModelInput:
        """The same tokens, and another ``token`` behind them."""
        return self.append(EncodedTextChunk([token]))

    def to_ints(self) -> list[int]:
        """All tokens as one list.

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


class Datum(msgspec.Struct, frozen=True, eq=False):
    """One training example: what the model reads, and what the loss reads.

    Args:
        model_input: T tokens; the official SDK's ``ModelInput`` is taken too.
        loss_fn_inputs: columns by name, each of shape ``[T]`` or ``[T, K]``: ``target_tokens`` (the
            token that follows each input token), ``weights``, ``advantages``, ``logprobs`` (of the
            sampling policy), or anything that an objective reads. Lists, NumPy, JAX and torch
            arrays and the official SDK's ``TensorData`` are taken; what is kept is a
            :class:`TensorData`, which shares their memory where the dtype allows.

    Raises:
        DataError: a column does not hold numbers, has no name or that of another, or the model
            input holds no tokens.
    """

    model_input: ModelInput
    loss_fn_inputs: dict[str, TensorData] = msgspec.field(default_factory=dict[str, TensorData])

    if TYPE_CHECKING:  # what it keeps is narrower than what it takes

        def __init__(
            self, model_input: ModelInput, loss_fn_inputs: Mapping[str, Any] | None = None
        ) -> None: ...

    def __post_init__(self) -> None:
        if type(self.model_input) is not ModelInput:
            msgspec.structs.force_setattr(self, "model_input", as_model_input(self.model_input))
        given = cast("Mapping[str, Any]", self.loss_fn_inputs)
        columns = {str(name): to_tensor(str(name), value) for name, value in given.items()}
        if len(columns) < len(given) or "" in columns:
            raise DataError(f"columns need different names, and none is empty: {[*given]}")
        msgspec.structs.force_setattr(self, "loss_fn_inputs", columns)


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


def as_datum(value: Any) -> Datum:
    """Takes another library's datum, by its ``model_input`` and ``loss_fn_inputs``.

    Args:
        value: a :class:`Datum`, which stays itself, or what is built alike, such as the official
            SDK's.

    Returns:
        The same tokens and columns; memory of columns is shared where the dtype allows.

    Raises:
        DataError: it is no datum, or says where its tokens come from, which this client cannot
            send.
    """
    if isinstance(value, Datum):
        return value
    model_input = getattr(value, "model_input", None)
    columns = getattr(value, "loss_fn_inputs", None)
    if model_input is None or columns is None:
        raise DataError(
            f"{type(value).__name__} is no datum; it needs a model_input and loss_fn_inputs, as "
            "mintjax.Datum(model_input, {'target_tokens': ...})"
        )
    if getattr(value, "model_input_spans", None) is not None:
        raise DataError(
            "this client does not send the provenance of tokens; leave with_provenance() out, or "
            "train with the official SDK, which takes an objective of mintjax as "
            "forward_backward_custom(data, mintjax.interop.sdk_loss(objective))",
            field="model_input_spans",
        )
    return Datum(model_input, columns)


def as_datums(data: Sequence[Any]) -> Sequence[Datum]:
    """Takes datums of this and other libraries.

    Args:
        data: datums, or what :func:`as_datum` takes.

    Returns:
        A list of datums, the given ones where they are mintjax's and hold tensors only. A column
        that was assigned later, as a list or another array, is made a tensor.

    Raises:
        DataError: one cannot be taken; names it.
    """
    if isinstance(cast("Any", data), Datum) or not isinstance(cast("Any", data), Iterable):
        raise DataError(f"pass a list of datums, not {type(data).__name__}")
    data = list(data)
    if all(isinstance(datum, Datum) for datum in data) and _hold_tensors(data):
        return data
    taken: list[Datum] = []
    for i, datum in enumerate(data):
        try:
            one = as_datum(datum)
            taken.append(
                one if _hold_tensors([one]) else Datum(one.model_input, one.loss_fn_inputs)
            )
        except DataError as error:
            raise DataError(error.reason, datum=i, field=error.field) from None
    return taken


def _hold_tensors(data: Sequence[Datum]) -> bool:
    return {type(column) for d in data for column in d.loss_fn_inputs.values()} <= {TensorData}


def datum(
    prompt: Sequence[int] | npt.NDArray[np.integer[Any]],
    answer: Sequence[int] | npt.NDArray[np.integer[Any]],
    *,
    per_datum: Mapping[str, float] | None = None,
    **columns: Any,
) -> Datum:
    """Makes a datum that trains on an answer to a prompt.

    The model reads all tokens but the last, T in all, and each target is the token that follows.
    ``weights`` are 1 at the answer's tokens and 0 before.

    Args:
        prompt: at least one token id.
        answer: n >= 1 token ids.
        per_datum: columns of a single number, such as a reward.
        columns: a number, which is repeated at each token of the answer; or one entry for each of
            the answer's n tokens, shape ``[n]`` or ``[n, K]``, with 0 before; or one for each of
            the T tokens. ``weights`` can be given so too.

    Returns:
        The datum, with ``target_tokens``, ``weights`` and the columns.

    Raises:
        DataError: text in place of tokens, no token, a column of another length, one that is given
            twice, or ``target_tokens``, which the answer says.

    Example:
        >>> made = datum([7, 8], [9, 5, 3], advantages=0.5, logprobs=[-1.0, -2.0, -3.0])
        >>> made.model_input.to_ints(), made.loss_fn_inputs["target_tokens"].tolist()
        ([7, 8, 9, 5], [8, 9, 5, 3])
        >>> made.loss_fn_inputs["logprobs"].tolist()
        [0.0, -1.0, -2.0, -3.0]
    """
    before, after = _token_ids("prompt", prompt), _token_ids("answer", answer)
    tokens = [*before, *after]
    given: dict[str, Any] = {"weights": 1.0, **columns}
    spread = {
        name: _over_answer(name, one, len(tokens) - 1, len(after)) for name, one in given.items()
    }
    inputs: dict[str, Any] = {"target_tokens": tokens[1:], **spread}
    if "target_tokens" in columns:
        raise DataError("the targets are the tokens themselves", field="target_tokens")
    for name, value in (per_datum or {}).items():
        if name in inputs:
            raise DataError("it has a number for each token already", field=name)
        number = to_tensor(name, value)
        if number.ndim:
            raise DataError(f"shape {list(number.shape)}, where it is one number", field=name)
        inputs[name] = number
    return Datum(ModelInput.from_ints(tokens[:-1]), inputs)


def _token_ids(name: str, tokens: Any) -> list[int]:
    if isinstance(tokens, (str, bytes)):
        raise DataError(
            "it is text; pass the token ids that the model's tokenizer makes of it, because one "
            "character may be several tokens",
            field=name,
        )
    try:
        ids = as_model_input(tokens) if hasattr(tokens, "chunks") else ModelInput.from_ints(tokens)
    except DataError as error:
        raise DataError(error.reason, field=name) from None
    if not ids.length:
        raise DataError("it has no token; it needs one", field=name)
    return ids.to_ints()


def _over_answer(name: str, value: Any, length: int, answer: int) -> npt.NDArray[Any]:
    array = np.asarray(to_tensor(name, value))
    if array.ndim == 0:
        array = np.full(answer, array)
    if len(array) == length:
        return array
    if len(array) != answer:
        raise DataError(
            f"{len(array)} entries for an answer of {answer} tokens; it needs one number, "
            f"{answer} entries, or {length} for the prompt too",
            field=name,
        )
    spread = np.zeros((length, *array.shape[1:]), array.dtype)
    spread[length - answer :] = array
    return spread


def with_column(data: Sequence[Datum], name: str, rows: Sequence[Any]) -> list[Datum]:
    """Adds a column to datums, in place of one of that name.

    ::

        data = with_column(data, "ref_logprobs", reference.logprobs(data))

    Args:
        data: B datums, which stay as they are.
        name: of the column.
        rows: one for each datum: an entry for each token, or a single number.

    Returns:
        New datums, which share all else with ``data``.

    Raises:
        DataError: another number of rows, or a row that does not fit its datum.
    """
    if isinstance(rows, Mapping) or not hasattr(rows, "__iter__"):
        raise DataError("it needs one row for each datum, or one number", field=name)
    datums, values = as_datums(data), list(rows)
    if len(values) != len(datums):
        raise DataError(f"{len(values)} rows for {len(datums)} datums", field=name)
    made: list[Datum] = []
    for i, (one, row) in enumerate(zip(datums, values, strict=True)):
        try:
            column = to_tensor(name, row)
        except DataError as error:
            raise DataError(error.reason, datum=i, field=name) from None
        length = one.model_input.length
        if column.ndim and len(column) != length:
            raise DataError(
                f"shape {list(column.shape)} does not fit the model input of {length} tokens",
                datum=i,
                field=name,
            )
        made.append(Datum(one.model_input, {**one.loss_fn_inputs, name: column}))
    return made


P = TypeVar("P", bound=msgspec.Struct)


def as_params(kind: type[P], value: Any) -> P:
    """Takes another library's parameters of the optimizer or of sampling, by their attributes.

    Args:
        kind: :class:`AdamParams` or :class:`SamplingParams`.
        value: one of these, which stays itself, or what has such attributes, such as the official
            SDK's.

    Returns:
        The same parameters; what ``value`` lacks has its default.

    Raises:
        DataError: it has none of them, or sets one that this client would not send.
    """
    if isinstance(value, kind):
        return value
    names = kind.__struct_fields__
    given = {name: getattr(value, name) for name in names if hasattr(value, name)}
    if not given:
        raise DataError(f"{value!r:.80} has nothing of {kind.__name__}; pass one of mintjax's")
    others = {
        name: one
        for name, one in _all_fields(value).items()
        if name not in given and one is not None
    }
    if others:
        raise DataError(
            f"{type(value).__name__} sets {', '.join(sorted(others))}, which this client does not "
            f"send; it has {', '.join(names)}"
        )
    return kind(**given)


def _all_fields(value: Any) -> dict[str, Any]:
    if hasattr(value, "model_dump"):  # pydantic's
        return value.model_dump()
    if isinstance(value, msgspec.Struct):
        return msgspec.structs.asdict(value)
    return dict(getattr(value, "__dict__", {}))


class AdamParams(msgspec.Struct, frozen=True, kw_only=True):
    """One AdamW step, with the update of ``torch.optim.AdamW``.

    Args:
        learning_rate: step size.
        beta1: decay of the running mean of gradients.
        beta2: decay of the running mean of squared gradients.
        eps: added to the denominator, outside the square root.
        weight_decay: decoupled: each weight loses ``learning_rate * weight_decay`` of itself.
        grad_clip_norm: the largest global gradient norm, in the units of the gradient; 0 for none.
    """

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


class LoraConfig(msgspec.Struct, frozen=True):
    """The low-rank adapters that a model is trained with.

    Args:
        rank: inner dimension of the two factors, at least 1.
        seed: of the adapters' initial values; the trainer chooses one if None.
        train_unembed: adapt the output projection.
        train_mlp: adapt the feed-forward layers.
        train_attn: adapt the attention projections.
    """

    rank: int
    seed: int | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


class ForwardBackwardOutput(msgspec.Struct, kw_only=True, eq=False):
    """The result of a forward or forward-backward pass.

    Args:
        loss_fn_outputs: one dict of arrays per datum, in the order of the data; ``"logprobs"`` has
            the shape of that datum's ``target_tokens``, in nats.
        metrics: numbers by name. A trainer's own end in how they combine (``"loss:sum"``). A custom
            step has the objective's, the loss as ``"loss"`` and ``"loss:sum"``, and the trainer's
            sum as ``"surrogate_loss:sum"``.
        loss_fn_output_type: what the trainer calls its records.
    """

    loss_fn_outputs: list[dict[str, TensorData]]
    metrics: dict[str, float] = msgspec.field(default_factory=dict[str, float])
    loss_fn_output_type: str = "ArrayRecord"

    @property
    def logprobs(self) -> list[npt.NDArray[np.float32]]:
        """The target tokens' log-probabilities: one float32 array per datum, in order.

        Raises:
            DataError: the trainer returned no logprobs for a datum.
        """
        try:
            return [output["logprobs"].view(np.ndarray) for output in self.loss_fn_outputs]
        except KeyError:
            lack = ["logprobs" not in output for output in self.loss_fn_outputs]
        raise DataError(
            "the trainer returned no logprobs", datum=lack.index(True), field="logprobs"
        )


Route = Literal["two_pass", "one_pass", "by_name", "server", "by_gradient"]
"""How a custom step reached the trainer: a forward and a backward pass; a backward pass alone, for
a gradient that does not depend on the logprobs; a loss of the trainer's own; a backward pass alone
with the objective itself, which the trainer runs as the graph that it was sent before; or requests
of the trainer's own that give the logprobs and take their gradient as it is, as hatchery has
them."""


class CustomStepOutput(ForwardBackwardOutput, kw_only=True, eq=False):
    """The result of a step with an objective, with its route and times.

    Args:
        metrics: the objective's, floats and arrays ``[B]``, and the trainer's.
        route: see :data:`Route`.
        forward_seconds: from the forward pass's sending to its result; 0 if there was none.
        client_seconds: for loss, gradient and the encoding of what carries it, here.
        backward_seconds: from the backward pass's sending to its result.
    """

    route: Route
    metrics: dict[str, Any] = msgspec.field(default_factory=dict[str, Any])
    forward_seconds: float
    client_seconds: float
    backward_seconds: float


class OptimStepResponse(msgspec.Struct, kw_only=True):
    """The result of an optimizer step.

    Args:
        metrics: numbers by name, or None where the trainer reports none.
    """

    metrics: dict[str, float] | None = None


class SaveWeightsResponse(msgspec.Struct, kw_only=True):
    """The path of a saved checkpoint.

    Args:
        path: ``tinker://<model>/weights/<name>``, or ``.../sampler_weights/<name>``.
    """

    path: str


class LoadWeightsResponse(msgspec.Struct, kw_only=True):
    """The path of a loaded checkpoint.

    Args:
        path: the checkpoint's path, where the trainer repeats it.
    """

    path: str | None = None


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """The parameters of sampling.

    Args:
        max_tokens: at most so many new tokens; as many as fit if None.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: keep the k likeliest tokens; -1 keeps all.
        top_p: keep the likeliest tokens until their probability reaches p.
        seed: the same seed, prompt and parameters give the same tokens.
        stop: end at one of these: strings, or token ids. What stopped it is part of the result.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    seed: int | None = None
    stop: str | Sequence[str | int] | None = None


TopkRow: TypeAlias = list[tuple[int, float]] | None
"""The likeliest tokens at one position, the likeliest first, with their logprobs in nats; None
where none were computed."""

NO_LOGPROB = -99999.0
"""The logprob of an empty cell of :class:`TopkLogprobs`, whose token is 0."""


class TopkLogprobs(msgspec.Struct, frozen=True, eq=False):
    """The likeliest tokens at each position as two matrices.

    A cell that is empty holds token 0 and logprob :data:`NO_LOGPROB`; where nothing was computed
    for a position, its whole row is empty.

    Args:
        token_ids: int32, shape ``[T, K]``, the likeliest first.
        logprobs: float32, shape ``[T, K]``, in nats.
    """

    token_ids: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]

    @classmethod
    def from_rows(cls, rows: Sequence[TopkRow]) -> TopkLogprobs:
        """Makes matrices of rows, as wide as the longest of them."""
        width = max((len(row) for row in rows if row), default=0)
        token_ids = np.zeros((len(rows), width), np.int32)
        logprobs = np.full((len(rows), width), NO_LOGPROB, np.float32)
        for i, row in enumerate(rows):
            if row:
                token_ids[i, : len(row)], logprobs[i, : len(row)] = zip(*row, strict=True)
        return cls(token_ids, logprobs)

    def to_rows(self) -> list[TopkRow]:
        """Makes rows of the matrices, without their empty cells."""
        filled = (self.token_ids != 0) | (self.logprobs != np.float32(NO_LOGPROB))
        rows = zip(self.token_ids.tolist(), self.logprobs.tolist(), filled.sum(1), strict=True)
        return [list(zip(ids[:n], lps[:n], strict=True)) if n else None for ids, lps, n in rows]


class SampledSequence(msgspec.Struct, kw_only=True):
    """One sampled continuation.

    Args:
        tokens: the new tokens.
        logprobs: of each, in nats, under the sampling distribution's model at temperature 1.
        stop_reason: ``"stop"`` (a stop string, stop token or end of text) or ``"length"``.
        topk_logprobs: if asked for, one :data:`TopkRow` per new token.
    """

    tokens: list[int]
    logprobs: list[float] | None = None
    stop_reason: StopReason = "length"
    topk_logprobs: list[TopkRow] | None = None

    @property
    def tokens_np(self) -> npt.NDArray[np.int32]:
        """The tokens as an array, shape ``[T]``."""
        return np.asarray(self.tokens, np.int32)

    @property
    def logprobs_np(self) -> npt.NDArray[np.float32] | None:
        """The logprobs as an array, shape ``[T]``, or None where the trainer gave none."""
        return None if self.logprobs is None else np.asarray(self.logprobs, np.float32)

    @property
    def topk_logprobs_np(self) -> TopkLogprobs | None:
        """The likeliest tokens as matrices ``[T, K]``, or None where none were asked for."""
        return None if self.topk_logprobs is None else TopkLogprobs.from_rows(self.topk_logprobs)


class PromptAltTokens(msgspec.Struct, kw_only=True, eq=False):
    """Tokens that were drawn from the model's distribution at each place of a prompt of n tokens.

    Args:
        tokens: int64, shape ``[n - 1, K]``; row i holds alternatives to the token at i + 1.
        logprobs: float32, of the same shape: of each under the model, in nats.
    """

    tokens: TensorData
    logprobs: TensorData


class SampleResponse(msgspec.Struct, kw_only=True):
    """The result of a request to sample.

    Args:
        sequences: one per sample asked for.
        prompt_logprobs: if asked for, one per prompt token, in nats; the first is None, and so are
            those that were left out.
        topk_prompt_logprobs: if asked for, one :data:`TopkRow` per prompt token, as above.
        target_prompt_logprobs: if asked for, float32 of the shape of the targets, ``[n - 1, K]``;
            0 where nothing was asked.
        prompt_alt_tokens: if asked for, draws at each place of the prompt.
        prompt_cache_hit_tokens: tokens of the prompt that a hosted trainer bills as cached.
    """

    sequences: list[SampledSequence]
    prompt_logprobs: list[float | None] | None = None
    topk_prompt_logprobs: list[TopkRow] | None = None
    target_prompt_logprobs: TensorData | None = None
    prompt_alt_tokens: PromptAltTokens | None = None
    prompt_cache_hit_tokens: int = 0

    @property
    def prompt_logprobs_np(self) -> npt.NDArray[np.float32] | None:
        """The prompt's logprobs as an array, shape ``[T]``, with NaN in place of None."""
        given = self.prompt_logprobs
        return None if given is None else np.asarray(given, np.float32)

    @property
    def topk_prompt_logprobs_np(self) -> TopkLogprobs | None:
        """The likeliest tokens as matrices ``[T, K]``, or None where none were asked for."""
        rows = self.topk_prompt_logprobs
        return None if rows is None else TopkLogprobs.from_rows(rows)


class ModelData(msgspec.Struct, kw_only=True):
    """The description of a model.

    Args:
        model_name: the base model.
        arch: its architecture, where the trainer says so.
        tokenizer_id: the tokenizer that its token ids belong to.
    """

    model_name: str
    arch: str | None = None
    tokenizer_id: str | None = None


class GetInfoResponse(msgspec.Struct, kw_only=True):
    """The trainer's description of one model in training.

    Args:
        model_id: the trainer's name of it.
        model_data: what it was made from.
        lora_rank: the rank of its adapters.
    """

    model_id: str
    model_data: ModelData
    lora_rank: int | None = None


class SupportedModel(msgspec.Struct, kw_only=True):
    """A base model that a trainer offers.

    Args:
        model_name: its name.
        max_context_length: in tokens, where the trainer says so.
    """

    model_name: str
    max_context_length: int | None = None


class ServerCapabilities(msgspec.Struct, kw_only=True):
    """The base models that a trainer offers.

    Args:
        supported_models: its base models.
    """

    supported_models: list[SupportedModel]


GetServerCapabilitiesResponse: TypeAlias = ServerCapabilities
SaveWeightsForSamplerResponse: TypeAlias = SaveWeightsResponse
Checkpoint: TypeAlias = runs.Checkpoint
CheckpointsListResponse: TypeAlias = runs.CheckpointsListResponse
CheckpointType: TypeAlias = runs.CheckpointType
Cursor: TypeAlias = runs.Cursor
GetSamplerResponse: TypeAlias = runs.GetSamplerResponse
GetSessionResponse: TypeAlias = runs.GetSessionResponse
ListSessionsResponse: TypeAlias = runs.ListSessionsResponse
ParsedCheckpointTinkerPath: TypeAlias = runs.ParsedCheckpointTinkerPath
TrainingRun: TypeAlias = runs.TrainingRun
TrainingRunsResponse: TypeAlias = runs.TrainingRunsResponse
WeightsInfoResponse: TypeAlias = runs.WeightsInfoResponse


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        raise missing("module 'mintjax.types'", name, NAMES)
