"""Training examples, and how they are made of tokens and of another library's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import msgspec
import numpy as np
import numpy.typing as npt

from mintjax.errors import DataError
from mintjax.model_input import ModelInput, as_model_input
from mintjax.tensors import TensorData, to_tensor


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
