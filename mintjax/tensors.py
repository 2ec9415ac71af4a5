"""NumPy arrays that know their wire form."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
import numpy.typing as npt

from mintjax.errors import DataError, NonFiniteError


@runtime_checkable
class SupportsArray(Protocol):
    """Anything NumPy can read without a copy of its own: JAX arrays, pandas columns, ..."""

    def __array__(self) -> npt.NDArray[Any]:
        """Returns the values as a NumPy array."""
        ...


@runtime_checkable
class SupportsToNumpy(Protocol):
    """The official SDK's ``TensorData``, and what imitates it."""

    def to_numpy(self) -> npt.NDArray[Any]:
        """Returns the values as a NumPy array."""
        ...


@runtime_checkable
class SupportsDetach(Protocol):
    """A ``torch.Tensor``, of any device and dtype."""

    def detach(self) -> Any:
        """Returns the values without their graph."""
        ...


ArrayLike = npt.NDArray[Any] | SupportsArray | SupportsToNumpy | SupportsDetach | Sequence[Any]
"""What a column of ``loss_fn_inputs`` may be given as."""


class TensorData(np.ndarray):
    """A NumPy array that knows its wire form, ``{"data", "dtype", "shape"}``.

    It *is* an array: ``jnp.dot(logprobs, datum.loss_fn_inputs["weights"])`` needs no conversion.
    Floating types become float32 and integers int64, the two types of the protocol. Booleans stay
    what they are here, so that ``~`` negates them, and travel as int64.

    Args:
        data: numbers, flat or already in shape; a NumPy or JAX array, a torch tensor, the official
            SDK's ``TensorData``, or nested lists. Memory is shared where the dtype allows.
        dtype: ``"float32"`` or ``"int64"``; inferred from the data if absent.
        shape: the shape to give to flat data; for sparse data, the dense shape.
        sparse_crow_indices: row pointers of a CSR matrix, shape ``[rows + 1]``. The array is made
            dense here.
        sparse_col_indices: column indices of a CSR matrix, one for each number of ``data``.

    Raises:
        DataError: not numbers, a ragged nested list, a shape that does not fit, or indices that
            describe no matrix.
    """

    def __new__(
        cls,
        data: ArrayLike,
        dtype: str | None = None,
        shape: Sequence[int] | None = None,
        sparse_crow_indices: Sequence[int] | None = None,
        sparse_col_indices: Sequence[int] | None = None,
    ) -> TensorData:
        array = _as_wire_array(numbers_of(data), dtype)
        if sparse_crow_indices is not None or sparse_col_indices is not None:
            array = _dense(array, sparse_crow_indices, sparse_col_indices, shape)
        elif shape is not None and array.shape != tuple(shape):
            try:
                array = array.reshape(tuple(shape))
            except ValueError:
                raise DataError(
                    f"{array.size} numbers do not fill the shape {list(shape)}"
                ) from None
        return array.view(cls)

    @classmethod
    def from_numpy(cls, array: npt.NDArray[Any]) -> TensorData:
        """Takes an array's numbers, shape and (wire) dtype; shares memory where it can."""
        return cls(array)

    @classmethod
    def from_torch(cls, tensor: Any) -> TensorData:
        """Takes a torch ``tensor`` of any device and dtype; torch itself is not imported."""
        return cls(tensor)

    def to_numpy(self) -> npt.NDArray[Any]:
        """Returns the same memory as a plain ``np.ndarray``."""
        return self.view(np.ndarray)

    def to_torch(self) -> Any:
        """Makes a ``torch.Tensor`` that shares no memory with this one. Needs torch."""
        import torch  # pyright: ignore[reportMissingImports]

        return torch.tensor(self.to_numpy())  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]

    @property
    def data(self) -> list[Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The numbers as a flat list, in row-major order."""
        return self.to_numpy().ravel().tolist()


def numbers_of(value: Any) -> Any:
    """Takes the numbers out of another library's tensor, by what it offers.

    Memory is shared where a NumPy array can hold the numbers as they are. No library is imported.

    Args:
        value: a torch tensor of any device (it offers ``detach``), the official SDK's
            ``TensorData`` (``to_numpy``; sparse ones have ``sparse_crow_indices``), or anything
            else.

    Returns:
        An array, or the value itself where it is of none of these.

    Raises:
        DataError: sparse indices that describe no matrix, a tensor that NumPy cannot hold, or an
            array of ``numpy.ma`` that hides a number.
    """
    if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(cast("Any", value)):
        raise DataError(
            "a masked array hides some of its numbers, and what lies behind its mask would be "
            "taken for a number: give array.filled(0), and the mask as weights of 0 or as a column"
        )
    if isinstance(value, (np.ndarray, list)):
        return cast("Any", value)
    if hasattr(value, "detach"):
        try:
            return _of_torch(value)
        except (TypeError, RuntimeError) as error:  # sparse, quantized, on the meta device
            raise DataError(f"NumPy cannot hold this torch tensor: {error}") from None
    if getattr(value, "sparse_crow_indices", None) is not None:
        crow, col = value.sparse_crow_indices, value.sparse_col_indices
        return TensorData(value.data, value.dtype, value.shape, crow, col)
    if hasattr(value, "to_numpy"):
        return value.to_numpy()
    return value


def _of_torch(tensor: Any) -> npt.NDArray[Any]:
    try:
        return tensor.numpy(force=True)  # without its graph, from any device
    except TypeError:  # NumPy has no bfloat16, nor any of 8 bits
        return tensor.float().numpy(force=True)


def _as_wire_array(data: ArrayLike, dtype: str | None) -> npt.NDArray[Any]:
    try:
        array = np.asarray(data)
    except ValueError:
        raise DataError("a column must be rectangular; this nested list is ragged") from None
    except (TypeError, RuntimeError) as error:  # keys of JAX, lists of tensors with a graph
        raise DataError(f"NumPy cannot hold this: {error}") from None
    name = _AS_THEY_ARE.get(array.dtype)
    if name is not None and dtype in (None, name):  # as nearly always
        return array
    if dtype is None:
        kind = array.dtype.kind
        if kind == "f" or array.dtype.name == "bfloat16":
            dtype = "float32"
        elif kind in "iu":
            dtype = "int64"
        else:
            raise _not_numbers(array)
    if dtype not in _WIRE_DTYPES:
        raise DataError(f"dtype must be 'float32' or 'int64', not {dtype!r}")
    if array.dtype.kind not in "fiub" and array.dtype.name != "bfloat16" and array.size:
        raise _not_numbers(array)
    if dtype == "int64" and array.dtype.kind == "f" and array.size:
        # At 2**53 and beyond, a float may stand for its neighbours as well.
        whole = (np.trunc(array) == array) & (np.abs(array) < 2**53)
        if not whole.all():
            raise DataError(f"int64 was asked for, but {array[~whole].ravel()[0]} is no integer")
    if dtype == "int64" and array.dtype == np.uint64 and (array > np.iinfo(np.int64).max).any():
        raise DataError(f"{array.max()} is beyond int64")
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes inf; validation names it
        return np.asarray(array, dtype=dtype)


def _not_numbers(array: npt.NDArray[Any]) -> DataError:
    none = array.dtype.kind == "O" and any(one is None for one in array.flat)
    given = "None, such as a sampler gives for the first token" if none else array.dtype.name
    return DataError(f"a column must hold numbers, not {given}")


def _dense(
    values: npt.NDArray[Any],
    crow: Sequence[int] | None,
    col: Sequence[int] | None,
    shape: Sequence[int] | None,
) -> npt.NDArray[Any]:
    if crow is None or col is None or shape is None or len(shape) != 2:
        raise DataError(
            "sparse data needs sparse_crow_indices, sparse_col_indices and a shape of two numbers"
        )
    pointers, columns = np.asarray(crow, np.int64), np.asarray(col, np.int64)
    rows, width = shape
    if rows * width > _LARGEST_DENSE:
        raise DataError(f"a sparse matrix of shape {list(shape)} is too large to be made dense")
    counts = np.diff(pointers)
    if (
        pointers.shape != (rows + 1,)
        or pointers[0] != 0
        or (counts < 0).any()
        or pointers[-1] != values.size
        or columns.shape != values.shape
        or (columns.size and (columns.min() < 0 or columns.max() >= width))
    ):
        raise DataError(f"the sparse indices do not describe a matrix of shape {list(shape)}")
    places = np.repeat(np.arange(rows), counts) * width + columns
    if (np.diff(places) <= 0).any():
        raise DataError("the column indices of a sparse matrix must rise within each row")
    dense = np.zeros((rows, width), values.dtype)
    dense.ravel()[places] = values
    return dense


def as_travels(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Gives a column the dtype it has in the protocol, which knows no booleans."""
    return values.astype(np.int64) if values.dtype == np.bool_ else values.view(np.ndarray)


def first_not_finite(values: npt.NDArray[Any]) -> int | None:
    """Finds the flat position of the first NaN or infinity, or None."""
    if values.dtype.kind != "f":
        return None
    finite = np.isfinite(values)
    return None if finite.all() else int(np.argmin(finite))


def first_row_not_finite(rows: Sequence[npt.NDArray[Any]]) -> tuple[int, int] | None:
    """Finds the first row that holds a NaN or an infinity, and its flat position there, or None.

    Rows that were cut from one buffer, and are most of it, are looked at together, with what lies
    between them.

    Args:
        rows: at least one array.
    """
    shared = rows[0].base
    if (
        not isinstance(shared, np.ndarray)
        or shared.dtype != rows[0].dtype
        or set(map(id, map(_BASE, rows))) != {id(shared)}
        or shared.size > 2 * sum(map(_SIZE, rows))
    ):
        shared = np.concatenate([row.ravel() for row in rows])
    if np.isfinite(shared).all():
        return None
    found = ((i, first_not_finite(row)) for i, row in enumerate(rows))
    return next(((i, at) for i, at in found if at is not None), None)


def check_finite(values: npt.NDArray[Any], datum: int, what: str) -> None:
    """Refuses to send a NaN or an infinity.

    Args:
        values: a tensor that is to travel.
        datum: position of the datum that it belongs to.
        what: it is, for the message.

    Raises:
        NonFiniteError: there is one; the message names datum and position.
    """
    position = first_not_finite(values)
    if position is not None:
        raise NonFiniteError(
            f"datum {datum}, position {position}, {what}: {values.ravel()[position]} cannot be "
            "sent; nothing was. Mask the position, or find out where it comes from",
            datum=datum,
            position=position,
        )


def finite_floats(given: Mapping[str, Any]) -> dict[str, float]:
    """Takes hyperparameters of any numeric type, such as NumPy's and JAX's, as floats.

    Raises:
        DataError: one is no number, or not finite.
    """
    result: dict[str, float] = {}
    for name, value in given.items():
        try:
            if isinstance(value, str):
                raise TypeError
            result[name] = float(value)
        except (TypeError, ValueError):
            raise DataError(f"{value!r} is no number; nothing was sent", field=name) from None
        if not math.isfinite(result[name]):
            raise DataError(f"{result[name]} is not finite; nothing was sent", field=name)
    return result


_WIRE_DTYPES = ("float32", "int64")
_AS_THEY_ARE = {np.dtype(name): name for name in (*_WIRE_DTYPES, "bool")}
_BASE, _SIZE = operator.attrgetter("base"), operator.attrgetter("size")
_LARGEST_DENSE = 2**28  # numbers; what a peer may make us allocate by a few of its own
_INTEGER_COLUMNS = frozenset({"target_tokens"})
_FLOAT_COLUMNS = frozenset({"weights", "advantages", "logprobs", "ref_logprobs"})


def to_tensor(name: str, value: Any) -> TensorData:
    """Makes the tensor that is kept of a column of a datum.

    Args:
        name: of the column; the usual ones have a dtype of their own.
        value: numbers in any form that :class:`TensorData` takes; what has ``to_ints`` gives its
            tokens.

    Raises:
        DataError: it does not hold numbers; names the column.
    """
    try:
        given: Any = value
        if not isinstance(value, (np.ndarray, list)) and hasattr(value, "to_ints"):
            given = value.to_ints()  # a ModelInput: the official SDK's examples pass targets so
        dtype = "int64" if name in _INTEGER_COLUMNS else None
        if name in _FLOAT_COLUMNS:
            dtype = "float32"
        if isinstance(given, TensorData) and given.dtype.name in (
            (*_WIRE_DTYPES, "bool") if dtype is None else (dtype,)
        ):
            return given
        return TensorData(given, dtype)
    except DataError as error:
        raise DataError(error.reason, field=name) from None
