"""A batch of datums, by row and by column."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, cast, overload

import jax
import jax.numpy as jnp
import numpy as np

from mintjax.errors import DataError
from mintjax.ragged import padding, tiling
from mintjax.ragged.rows import Ragged, RowAccessError
from mintjax.ragged.tiling import Sealed
from mintjax.ragged.transfers import transfers_allowed
from mintjax.types import Datum, EncodedTextChunk, ImageChunk, ModelInput, as_datums

Column: TypeAlias = Any  # Ragged, or an array [B] where every datum holds one number

_DTYPE = operator.attrgetter("dtype")
_NDIM = operator.attrgetter("ndim")


class _Shape(NamedTuple):
    """The structure of a batch as a pytree.

    Args:
        num_rows: B.
        names: of the columns, in the order of their leaves.
        per_datum: the names of those that hold one number per datum.
        has_tokens: whether the tokens of the model inputs are a leaf too.
        sealed: the static part of the layout; None where every column holds one number per datum.
    """

    num_rows: int
    names: tuple[str, ...]
    per_datum: frozenset[str]
    has_tokens: bool
    sealed: tuple[Any, ...] | None


@jax.tree_util.register_pytree_node_class
class Batch(Sequence[Datum]):
    """Datums in order, whose ``loss_fn_inputs`` can be read as columns.

    ``data["weights"]`` is the column of that name: a :class:`~mintjax.Ragged` with one row per
    datum, or an array ``[B]`` if each datum holds a single number there. ``data[0]`` and iteration
    give the datums, ``data[::2]`` a smaller batch, ``"weights" in data`` says whether it is there.

    An objective gets one. Where it reads columns only, its gradient is compiled once; where it
    takes datums one by one, it is traced once for all lengths and evaluated with NumPy.

    It is a pytree, so that a compiled function takes it as an argument: one program for batches of
    other data, and of other lengths as long as they take as many tiles of 128 tokens. Within, it
    has columns only.

    Args:
        data: at least one datum. Those of the official SDK are taken too.

    Raises:
        DataError: there is no datum, or one that cannot be taken.
    """

    def __init__(self, data: Sequence[Datum]) -> None:
        data = as_datums(data)
        if not data:
            raise DataError("there is no datum; pass at least one")
        self._datums: Sequence[Datum] | None = data
        self._owned = False
        self._inputs = [datum.loss_fn_inputs for datum in data]
        self._num_rows = len(data)
        self._columns: dict[str, Column] = {}
        self._names: frozenset[str] | None = None
        self._read = self._read_datums
        self._lengths: list[int] | None = None
        self._layout: tiling.Layout | None = None
        self._sealed: Sealed | None = None
        self._tokens: Callable[[], Ragged] | None = self._read_tokens

    @classmethod
    def of_columns(
        cls, names: Iterable[str], num_rows: int, read: Callable[[str], Column]
    ) -> Batch:
        """Makes a batch that has columns only; taking a datum from it is a ``RowAccessError``.

        Args:
            names: of the columns there are.
            num_rows: B.
            read: called once for each column that is asked for.
        """
        batch = cls.__new__(cls)
        batch._datums = None
        batch._owned = False
        batch._inputs = []
        batch._num_rows = num_rows
        batch._columns = {}
        batch._names = frozenset(names)
        batch._read = read
        batch._lengths = None
        batch._layout = None
        batch._sealed = None
        batch._tokens = None
        return batch

    @classmethod
    def from_padded(
        cls, columns: Mapping[str, Any], mask: Any = None, *, lengths: Any = None
    ) -> Batch:
        """Makes a batch of padded arrays, for objectives on a model of one's own.

        Args:
            columns: by name: ``[B, T]``, ``[B, T, K]``, or ``[B]``, one number per datum.
            mask: marks the tokens, ``[B, T]``, as :meth:`Ragged.from_padded` has it.
            lengths: or the number of tokens at the beginning of each row, ``[B]``.

        Returns:
            A batch that has columns only. Its columns, and a Ragged made by the same mask or
            lengths, have the same rows.

        Raises:
            DataError: there is no column, or one does not fit; the message names it.
            ValueError: the mask or the lengths do not fit.
        """
        arrays = {name: padding.as_array(value) for name, value in columns.items()}
        wide = [array.shape for array in arrays.values() if array.ndim > 1]
        if not arrays:
            raise DataError("there is no column; a batch of padded arrays needs one")
        # Where every column is [B], there is nothing to lay out, so T may be anything.
        shape = wide[0][:2] if wide else (*next(iter(arrays.values())).shape, 0)
        with transfers_allowed():
            where = padding.places(shape, mask, lengths) if wide else None
            found = {name: _padded(name, array, shape, where) for name, array in arrays.items()}
        batch = cls.of_columns(found, shape[0], found.__getitem__)
        batch._layout = None if where is None else where.layout
        return batch

    @classmethod
    def of_mapping(cls, data: Mapping[str, Any], logprobs: Any) -> tuple[Batch, Ragged]:
        """Makes the batch and the logprobs of what an objective was called with.

        Args:
            data: columns by name, with ``"mask"`` or ``"lengths"`` among them where they are padded
                arrays; or lists of rows.
            logprobs: ``[B, T]`` or ``[B, T, K]``; a Ragged or a list of rows where the columns are
                such.

        Returns:
            A batch with columns only, and the logprobs, of the same layout. Floats of 16 bits are
            float32, because these are too few for sums.

        Raises:
            DataError: a column does not fit; the message names it.
            ValueError: the mask or the lengths do not fit.
        """
        columns = {name: value for name, value in data.items() if name not in ("mask", "lengths")}
        if _LOGPROBS in columns:
            raise DataError("a column needs a name, and one of these has none")
        mask, lengths = data.get("mask"), data.get("lengths")
        if not isinstance(logprobs, Ragged | list | tuple):
            with jax.numpy_dtype_promotion("standard"):
                given = {name: _at_least_32(value) for name, value in columns.items()}
            batch = cls.from_padded(
                {**given, _LOGPROBS: _at_least_32(logprobs)}, mask, lengths=lengths
            )
            batch._names = frozenset(columns)
            rows = batch[_LOGPROBS]
            if not isinstance(rows, Ragged):
                raise DataError("logprobs need an axis of tokens, [B, T]", field="logprobs")
            return batch, rows
        if mask is not None or lengths is not None:
            raise DataError(
                "a mask and lengths are for padded arrays, but the logprobs are rows; give "
                "logprobs as an array [B, T] too",
                field="mask" if lengths is None else "lengths",
            )
        if not isinstance(logprobs, Ragged):
            logprobs = Ragged.from_rows(cast("Sequence[Any]", logprobs))
        rows = logprobs
        found = {name: _rows_column(name, value, rows) for name, value in columns.items()}
        batch = cls.of_columns(found, len(rows), found.__getitem__)
        batch._layout = rows.layout
        return batch, rows

    def tree_flatten(self) -> tuple[tuple[list[Any], Any, Any], _Shape]:
        """Gives the leaves, for JAX: the columns, the tokens of the model inputs, the layout.

        Raises:
            DataError: only some of the datums have a column.
        """
        names = tuple(sorted(self.names))
        columns = [self[name] for name in names]
        tokens = None if self._tokens is None else self._tokens()
        ragged = [each for each in (*columns, tokens) if isinstance(each, Ragged)]
        sealed = None
        if ragged:
            (_, keys), static = ragged[0].tree_flatten()
            sealed = Sealed(keys, *static)
            for name, column in zip(names, columns, strict=True):
                if isinstance(column, Ragged) and not column.layout.agrees_with(ragged[0].layout):
                    raise DataError("its rows are laid out unlike those of others", field=name)
        leaves = [each.tiles if isinstance(each, Ragged) else each for each in columns]
        shape = _Shape(
            self._num_rows,
            names,
            frozenset(
                name
                for name, column in zip(names, columns, strict=True)
                if not isinstance(column, Ragged)
            ),
            tokens is not None,
            None if sealed is None else sealed[1:],
        )
        with transfers_allowed():
            put = [
                jax.device_put(leaf) if isinstance(leaf, np.ndarray) else leaf for leaf in leaves
            ]
            inputs = None if tokens is None else jax.device_put(tokens.tiles)
        return (put, inputs, None if sealed is None else sealed.keys), shape

    @classmethod
    def tree_unflatten(cls, shape: _Shape, children: tuple[list[Any], Any, Any]) -> Batch:
        """Undoes :meth:`tree_flatten`; datums are columns only from then on."""
        leaves, tokens, keys = children
        values = dict(zip(shape.names, leaves, strict=True))

        def ragged(tiles: Any) -> Ragged:
            if getattr(tiles, "shape", (0,))[0] != cast("Sealed", batch._sealed).tiles:
                raise ValueError(
                    "this Batch was split, so its rows are not known; split the datums before it "
                    "is made"
                )
            return Ragged(tiles, batch.layout)

        def read(name: str) -> Column:
            return values[name] if name in shape.per_datum else ragged(values[name])

        batch = cls.of_columns(shape.names, shape.num_rows, read)
        if shape.sealed is not None:
            batch._sealed = Sealed(keys, *shape.sealed)
        if shape.has_tokens:
            batch._tokens = lambda: ragged(tokens)
        return batch

    @property
    def has_datums(self) -> bool:
        """Tells whether datums can be taken one by one, which those of columns only cannot."""
        return self._datums is not None

    @property
    def tokens(self) -> Ragged:
        """The tokens of the model inputs, int32.

        Raises:
            RowAccessError: the batch was made of columns.
            DataError: a datum holds an image, which has no token ids.
        """
        if self._tokens is None:
            raise RowAccessError
        return self._tokens()

    def _read_tokens(self) -> Ragged:
        rows = tuple(np.asarray(datum.model_input.to_ints(), np.int32) for datum in self)
        return Ragged(None, self.layout, rows)

    @property
    def names(self) -> frozenset[str]:
        """The names of all columns, those that only some datums have among them."""
        if self._names is None:
            self._names = frozenset(itertools.chain.from_iterable(self._inputs))
        return self._names

    @property
    def lengths(self) -> list[int]:
        """The number of tokens of each datum.

        Raises:
            RowAccessError: the lengths are traced.
        """
        if self._lengths is None:
            if self._datums is None:
                raise RowAccessError
            self._lengths = [datum.model_input.length for datum in self._datums]
        return self._lengths

    @property
    def layout(self) -> tiling.Layout:
        """The places of the datums' tokens in a tiled buffer; for code that builds on this."""
        if self._layout is None:
            if self._sealed is not None:
                self._layout = self._sealed.open()
            else:
                self._layout = tiling.layout_of(self.lengths)
        return self._layout

    def snapshot(self) -> Batch:
        """Copies tokens and columns, so that later writes to the caller's arrays change nothing.

        Returns:
            A batch of new datums, whose arrays are read-only. A snapshot is its own snapshot.

        Raises:
            RowAccessError: the batch has columns only.
        """
        if self._owned:
            return self
        made = Batch([_copy(datum) for datum in self])
        made._owned = True
        return made

    def __len__(self) -> int:
        return self._num_rows

    def __contains__(self, item: object) -> bool:
        if isinstance(item, str):
            return item in self.names
        return any(item is datum for datum in self)

    def __iter__(self) -> Iterator[Datum]:
        if self._datums is None:
            raise RowAccessError
        return iter(self._datums)

    @overload
    def __getitem__(self, index: int) -> Datum: ...
    @overload
    def __getitem__(self, index: slice) -> Batch: ...
    @overload
    def __getitem__(self, index: str) -> Column: ...
    def __getitem__(self, index: int | slice | str) -> Datum | Batch | Column:
        """Takes a column by its name, a datum by its number, or the batch of a slice of the datums.

        Raises:
            DataError: no such column, or a datum lacks it; the message names both.
            RowAccessError: a datum was asked for where lengths are traced.
        """
        if isinstance(index, str):
            if self._datums is not None:  # whose arrays the caller may overwrite
                return self._read(index)
            if index not in self._columns:
                self._columns[index] = self._read(index)
            return self._columns[index]
        if isinstance(index, slice):
            if self._datums is not None:
                return Batch(self._datums[index])
            count = len(range(*index.indices(self._num_rows)))
            return Batch.of_columns(self.names, count, lambda name: self[name][index])
        if self._datums is None:
            raise RowAccessError
        return self._datums[index]

    def __repr__(self) -> str:
        return f"Batch({len(self)} datums, columns {sorted(self.names)})"

    def _read_datums(self, name: str) -> Column:
        rows = self.rows(name)
        if rows[0].ndim == 0:
            return np.stack(rows)
        return Ragged(None, self.layout, tuple(row.view(np.ndarray) for row in rows))

    def rows(self, name: str) -> list[Any]:
        """Lists one column's arrays, one per datum, of one dtype, as JAX holds it.

        A column that is an integer in one datum and a float in another is float32 in all.
        What needs no conversion shares the datums' memory.

        Raises:
            DataError: no such column, a datum lacks it, its first axis is not as long as that
                datum's model input, or its trailing axis differs from datum 0's.
            DataError: an integer of such a column is beyond 2**24, where float32 rounds.
            DataError: an integer does not fit the 32 bits that JAX has without ``jax_enable_x64``.
            RowAccessError: the batch has columns only.
        """
        rows = self.given_rows(name)
        if len(set(map(_DTYPE, rows))) > 1:
            _check_exact_as_float(name, rows)
            rows = [np.asarray(row, np.float32) for row in rows]
        if rows[0].dtype == np.int64 and jax.dtypes.canonicalize_dtype(np.int64) != np.int64:
            _check_fits_32_bits(name, rows)
        return rows

    def given_rows(self, name: str) -> list[Any]:
        """Returns one column's arrays as they are given, each in its own dtype.

        Raises:
            DataError: no such column, a datum lacks it, or a shape does not fit.
            RowAccessError: the batch has columns only.
        """
        if self._datums is None:
            raise RowAccessError
        try:
            rows: list[Any] = [inputs[name] for inputs in self._inputs]
        except KeyError:
            i, datum = next((i, d) for i, d in enumerate(self) if name not in d.loss_fn_inputs)
            have = ", ".join(sorted(datum.loss_fn_inputs)) or "nothing"
            raise DataError(
                f"it is needed, but this datum has only: {have}. Add it to loss_fn_inputs of every "
                "datum: one number per token, or a single number per datum",
                datum=i,
                field=name,
            ) from None
        check_shapes(name, rows, self.lengths)
        return rows


_LOGPROBS = ""  # their name among the columns, where "logprobs" are the sampling policy's


def _padded(name: str, array: Any, shape: tuple[int, int], where: padding.Places | None) -> Column:
    """Makes a column of a padded array."""
    if array.ndim not in (1, 2, 3) or array.shape[:2] != shape[: array.ndim]:
        raise DataError(
            f"shape {list(array.shape)} does not fit; a column of these padded arrays is [B, T] = "
            f"{list(shape)}, [B, T, K], or [B] with one number per datum",
            field=name or "logprobs",
        )
    try:
        array = padding.narrow(array, "it")
    except ValueError as error:
        raise DataError(str(error), field=name or "logprobs") from None
    if where is None or array.ndim == 1:
        return array
    return Ragged(padding.to_tiles(array, where), where.layout)


def _rows_column(name: str, value: Any, like: Ragged) -> Column:
    """Makes a column of rows, or of one number per datum, beside logprobs in rows."""
    if isinstance(value, list | tuple):
        rows = [padding.as_array(row) for row in cast("Sequence[Any]", value)]
        value = Ragged.from_rows(rows) if rows and rows[0].ndim else np.asarray(rows)
    if isinstance(value, Ragged):
        try:
            return like.map(_second, value)
        except ValueError as error:
            raise DataError(str(error), field=name) from None
    if value.shape != (len(like),):
        raise DataError(
            f"shape {list(value.shape)} does not fit; beside logprobs in {len(like)} rows a column "
            "is a Ragged, a list of rows, or [B] with one number per datum",
            field=name,
        )
    return value


def _second(_: Any, value: Any) -> Any:
    return value


def _at_least_32(value: Any) -> Any:
    array = padding.as_array(value)
    if jnp.issubdtype(array.dtype, jnp.floating) and array.dtype.itemsize < 4:
        return array.astype(jnp.float32)
    return array


def _check_exact_as_float(name: str, rows: Sequence[Any]) -> None:
    for i, row in enumerate(rows):
        if row.dtype.kind == "i" and ((row < -(2**24)) | (row > 2**24)).any():
            raise DataError(
                "it holds an integer beyond 2**24, which float32 would round, because "
                "another datum's column is of another kind; give all datums one dtype",
                datum=i,
                field=name,
            )


def _check_fits_32_bits(name: str, rows: Sequence[Any]) -> None:
    flat = np.concatenate([row.ravel() for row in rows])
    if flat.size and (flat.min() < -(2**31) or flat.max() >= 2**31):
        i = next(i for i, row in enumerate(rows) if ((row < -(2**31)) | (row >= 2**31)).any())
        raise DataError(
            "it holds an integer beyond 32 bits, which JAX would wrap; number the ids anew from 0, "
            'or call jax.config.update("jax_enable_x64", True)',
            datum=i,
            field=name,
        )


def _copy(datum: Datum) -> Datum:
    chunks = [
        chunk if isinstance(chunk, ImageChunk) else EncodedTextChunk(list(chunk.tokens))
        for chunk in datum.model_input.chunks
    ]
    columns = {name: value.copy() for name, value in datum.loss_fn_inputs.items()}
    for column in columns.values():
        column.flags.writeable = False
    return Datum(ModelInput(chunks), columns)


def as_batch(data: Sequence[Datum] | Batch) -> Batch:
    """Makes a ``Batch`` of the data; a batch stays itself.

    Raises:
        DataError: there is no datum.
    """
    return data if isinstance(data, Batch) else Batch(data)


def check_shapes(name: str, rows: Sequence[Any], lengths: Sequence[int]) -> None:
    """Checks that the rows of a column fit the datums.

    Args:
        name: of the column.
        rows: one array per datum: ``[T_i]``, ``[T_i, K]`` with one K, or ``[]`` throughout.
        lengths: T of each datum.

    Raises:
        DataError: a row does not fit; names it.
    """
    if set(map(_NDIM, rows)) == {1} and list(map(len, rows)) == lengths:
        return
    shapes = [row.shape for row in rows]
    trailing = shapes[0][1:]
    for i, (shape, length) in enumerate(zip(shapes, lengths, strict=True)):
        if not shapes[0]:
            if shape:
                raise DataError(
                    f"shape {list(shape)}, where datum 0 has a single number", datum=i, field=name
                )
        elif shape[:1] != (length,):
            raise DataError(
                f"shape {list(shape)} does not fit the model input of {length} tokens; it needs "
                "one entry for each",
                datum=i,
                field=name,
            )
        elif shape[1:] != trailing:
            raise DataError(
                f"shape {list(shape)}, where datum 0 has {list(shapes[0])}; all need the same "
                "trailing axis",
                datum=i,
                field=name,
            )
