"""Rows of different lengths as one pytree, with padding that cannot be reached."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, ParamSpec, TypeAlias, TypeVar, cast, overload

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from mintjax.errors import MintjaxError
from mintjax.ragged import alignment, idioms, padding, reductions, tiling
from mintjax.ragged.operators import Operators
from mintjax.ragged.tiling import Layout, Sealed
from mintjax.ragged.tokenwise import check_tokenwise
from mintjax.ragged.transfers import transfers_allowed

Array: TypeAlias = Any  # a NumPy array, a JAX array or a tracer
Operand: TypeAlias = "Ragged | Array | float"
P = ParamSpec("P")
T = TypeVar("T")


class RowAccessError(MintjaxError, TypeError):
    """A single row was asked for where row lengths are traced, so that no row has a static shape.

    ``value_and_logprob_grads`` catches this and goes on with exact lengths; under a ``jit`` of your
    own, use the row reductions instead of a loop.
    """

    def __init__(self) -> None:
        super().__init__(
            "rows cannot be taken one by one while their lengths are traced; use the row "
            "reductions (x.sum(), x.dot(w), x.mean(), x[0::2], ...), which give one value per row"
        )


def _moves_data(method: Callable[P, T]) -> Callable[P, T]:
    """Lets a method bring its own arrays and constants to the device under a transfer guard."""

    @functools.wraps(method)
    def allowed(*args: P.args, **kwargs: P.kwargs) -> T:
        with transfers_allowed():
            return method(*args, **kwargs)

    return allowed


def _reduces_rows(method: Callable[P, T]) -> Callable[P, T]:
    """Lets a reduction be asked for by the axis that it takes anyway, and moves data as above."""

    @functools.wraps(method)
    def reduced(*args: P.args, **kwargs: P.kwargs) -> T:
        if kwargs.keys() & {"axis", "dim", "keepdim", "keepdims"}:
            trailing = cast("Ragged", args[0]).trailing_shape
            kwargs = cast("Any", idioms.without_axes(kwargs, trailing))
        return method(*args, **kwargs)

    return _moves_data(reduced)


class _Name:
    """The name of a leaf in JAX's messages."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __str__(self) -> str:
        return self._name

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Name) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(self._name)


_TILES = _Name(".tiles")
_ROWS = _Name(
    ".layout (the rows of a mintjax.Ragged cannot be split over devices: give shard_map the padded "
    "arrays, and call Ragged.from_padded inside)"
)


@jax.tree_util.register_pytree_with_keys_class
class Ragged(Operators, metaclass=idioms.NotAnArray):
    """Rows of different lengths, each of shape ``[T_i]`` or ``[T_i, K]``, as one value.

    Arithmetic and comparison work number by number with another ``Ragged`` of the same lengths,
    with a scalar, and with an array of shape ``[B]``: one value per row. Reductions take each row
    as a whole and give a JAX array of shape ``[B]``; :meth:`total` takes everything. No operation
    can see padding. It is a sequence of its rows too: ``len``, iteration, unpacking,
    ``zip`` and slices work, single rows only where the lengths are not traced.

    Build one with :meth:`from_rows`, :meth:`from_packed` or :meth:`from_padded`.

    Example:
        >>> from mintjax import Ragged
        >>> logprobs = Ragged.from_rows([[-1.0, -2.0], [-3.0]])
        >>> (logprobs * 2).sum()
        Array([-6., -6.], dtype=float32)
        >>> [row.tolist() for row in logprobs - logprobs.mean()]
        [[0.5, -0.5], [0.0]]
    """

    __slots__ = ("_place", "_rows", "_tiles")

    def __init__(
        self, tiles: Array | None, layout: Layout | Sealed, rows: tuple[Array, ...] | None = None
    ) -> None:
        self._tiles = tiles
        self._place = layout
        self._rows = rows

    @property
    def _layout(self) -> Layout:
        if isinstance(self._place, Sealed):
            layout, tiles = self._place.open(), self._tiles
            if getattr(tiles, "shape", (0,))[0] != self._place.tiles:
                raise ValueError(
                    "the tiles of this Ragged were split, so its rows are not known; split batches "
                    "before they are made"
                )
            self._place = layout
        return self._place

    # Construction and conversion

    @classmethod
    def from_rows(cls, rows: Sequence[Array]) -> Ragged:
        """Makes one of an array per row, NumPy or JAX, of one dtype; nothing is copied yet.

        Args:
            rows: at least one array, each of shape ``[T_i]`` or ``[T_i, K]`` with the same K.

        Raises:
            ValueError: no rows, a row that is a scalar, or rows that differ in dtype or in K.
        """
        arrays = tuple(map(padding.as_array, rows))
        if not arrays:
            raise ValueError("a Ragged needs at least one row")
        if arrays[0].dtype.kind in "OSUMm":
            raise ValueError(f"rows hold numbers, not {arrays[0].dtype}; is one of them None?")
        for i, row in enumerate(arrays):
            if row.ndim == 0 or row.shape[1:] != arrays[0].shape[1:]:
                raise ValueError(
                    f"row {i} has shape {row.shape}; every row needs an axis of its own length "
                    f"and then the trailing shape of row 0, {arrays[0].shape[1:]}"
                )
            if row.dtype != arrays[0].dtype:
                raise ValueError(f"row {i} is {row.dtype}, row 0 is {arrays[0].dtype}")
        return cls(None, tiling.layout_of([row.shape[0] for row in arrays]), arrays)

    @classmethod
    def from_packed(
        cls, values: npt.NDArray[Any], offsets: npt.NDArray[Any] | Sequence[int]
    ) -> Ragged:
        """Makes one of rows that lie one after another; the rows are views, nothing is copied yet.

        Args:
            values: shape ``[N]`` or ``[N, K]``.
            offsets: where each row begins, and N: integers ``[B + 1]``, never falling.

        Raises:
            ValueError: the offsets do not cut ``values`` into at least one row.
        """
        cuts = np.asarray(offsets)
        if (
            cuts.ndim != 1
            or cuts.size < 2
            or cuts.dtype.kind not in "iu"
            or cuts[0] != 0
            or cuts[-1] != len(values)
            or (np.diff(cuts) < 0).any()
        ):
            raise ValueError(
                f"offsets must be integers that rise from 0 to {len(values)}, the number of "
                "values, in one axis"
            )
        bounds: list[int] = cuts.tolist()
        rows = [values[a:b] for a, b in itertools.pairwise(bounds)]
        return cls.from_rows(rows)

    @classmethod
    @_moves_data
    def from_padded(cls, values: Array, mask: Array = None, *, lengths: Array = None) -> Ragged:
        """Takes the tokens of a padded array; no operation can see the padding.

        It works under ``jit`` and ``vmap``, within ``shard_map``, and on sharded arrays. Lengths
        and masks may be traced. The derivative by ``values`` is 0 at padding, whatever stands
        there, NaN among it.

        Args:
            values: ``[B, T]`` or ``[B, T, K]``.
            mask: marks the tokens: bool, or 0 and 1 in an integer dtype, ``[B, T]``. A row is what
                it marks, in order: padding may stand on the left, or between tokens. Integers
                ``[B]`` are taken for ``lengths``.
            lengths: the number of tokens at the beginning of each row, integers ``[B]``. Where they
                are traced it is faster than a mask, which could mark any positions.

        Returns:
            A ``Ragged`` of B rows, one of no tokens where nothing is marked. A row whose traced
            length is negative or above T is NaN, if the dtype has one.

        Raises:
            ValueError: a shape or dtype does not fit, or a length is negative or above T.

        Example:
            >>> import numpy as np
            >>> from mintjax import Ragged
            >>> padded = np.array([[-1.0, -2.0, np.nan], [-3.0, np.nan, np.nan]], np.float32)
            >>> Ragged.from_padded(padded, lengths=np.array([2, 1])).sum()
            Array([-3., -3.], dtype=float32)
        """
        array = padding.check_padded(values)
        where = padding.places(array.shape[:2], mask, lengths)
        return cls(padding.to_tiles(array, where), where.layout)

    @_moves_data
    def to_padded(self, mask: Array = None, *, length: int | None = None, fill: Any = 0) -> Array:
        """Gives the rows as a padded array, ``[B, T]`` or ``[B, T, K]``.

        Args:
            mask: where the tokens are to stand, ``[B, T]``, as :meth:`from_padded` had it; None
                puts them at the beginning of each row.
            length: T, where there is no mask. None: that of the padded arrays that the rows came
                from, or that of the longest row.
            fill: what stands at padding.

        Returns:
            A NumPy array if everything is NumPy's. A row whose traced length does not fit is NaN.

        Raises:
            ValueError: a row does not fit the length or the mask.
            TypeError: lengths are traced, and either T is not known, or a row that does not fit
                could not be NaN, because the dtype has none.
        """
        return padding.from_tiles(self.tiles, self._layout, mask=mask, length=length, fill=fill)

    def to_rows(self) -> list[Array]:
        """Lists one array per row, in order; views where the values are NumPy's.

        Raises:
            RowAccessError: the lengths are traced.
        """
        return list(self._row_tuple())

    def to_packed(self) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
        """Returns all values, ``[N]`` or ``[N, K]``, and offsets ``[B + 1]``, as NumPy.

        Raises:
            RowAccessError: the lengths are traced.
        """
        rows = [np.asarray(row) for row in self._row_tuple()]
        offsets = np.cumsum([0, *(len(row) for row in rows)], dtype=np.int64)
        return np.concatenate(rows), offsets

    @_moves_data
    def tree_flatten(self) -> tuple[tuple[Array, Array], tuple[int, int, bool, int | None]]:
        """Gives the leaves, for JAX: the tiled values, and the lengths of rows.

        The lengths are an array of JAX's key type, so that a function mapped over all leaves, such
        as a norm, is a TypeError instead of a number that counts lengths.
        """
        tiles, place = self.tiles, self._place
        if isinstance(tiles, np.ndarray):
            tiles = jax.device_put(tiles)
        sealed = place if isinstance(place, Sealed) else tiling.seal(place)
        return (tiles, sealed.keys), sealed[1:]

    def tree_flatten_with_keys(
        self,
    ) -> tuple[tuple[tuple[_Name, Array], ...], tuple[int, int, bool, int | None]]:
        """Gives the leaves with the names that they have in JAX's messages."""
        leaves, aux = self.tree_flatten()
        return tuple(zip((_TILES, _ROWS), leaves, strict=True)), aux

    @classmethod
    def tree_unflatten(
        cls, aux: tuple[int, int, bool, int | None], children: tuple[Array, Array]
    ) -> Ragged:
        """Undoes :meth:`tree_flatten`."""
        tiles, keys = children
        return cls(tiles, Sealed(keys, *aux))

    # What it is

    @property
    def tiles(self) -> Array:
        """The buffer ``[tiles, 128, ...]`` that the rows lie in, for code that builds on this."""
        if self._tiles is None:
            rows = cast("tuple[Array, ...]", self._rows)
            if all(isinstance(row, np.ndarray) for row in rows):
                self._tiles = tiling.pack_anew(rows, self._layout, rows[0].dtype)
            else:
                self._tiles = _concatenate(rows, self._layout)
        return self._tiles

    @property
    def layout(self) -> Layout:
        """The places of the rows in :attr:`tiles`; for code that builds on this."""
        return self._layout

    @property
    def num_rows(self) -> int:
        """The number of rows, B."""
        return int(self._layout.lengths.shape[0])

    @property
    def lengths(self) -> Array:
        """The first axis of each row: int32 ``[B]``."""
        return self._layout.lengths

    @property
    def row_mask(self) -> Array:
        """Marks the rows that are real: bool ``[B]``.

        All are, except inside mintjax's own objectives, for which the batch may be padded with
        empty rows.
        """
        if self._layout.row_mask is None:
            return np.ones(self.num_rows, bool)
        return self._layout.row_mask

    @property
    def dtype(self) -> Any:
        """The dtype of the values."""
        return self._rows[0].dtype if self._rows is not None else self.tiles.dtype

    @property
    def trailing_shape(self) -> tuple[int, ...]:
        """The shape of what stands at one token: ``()``, or ``(K,)``."""
        if self._rows is not None:
            return tuple(self._rows[0].shape[1:])
        return tuple(self.tiles.shape[2:])

    def __repr__(self) -> str:
        try:
            lengths = self._layout.lengths
        except ValueError:
            return "Ragged(of unknown rows)"
        traced = isinstance(lengths, jax.core.Tracer)
        shown = "traced" if traced else np.array2string(np.asarray(lengths), threshold=8)
        return f"Ragged(rows={self.num_rows}, lengths={shown}, dtype={self.dtype})"

    # As a sequence of rows

    def __len__(self) -> int:
        return self.num_rows

    def __iter__(self) -> Iterator[Array]:
        return iter(self._row_tuple())

    @overload
    def __getitem__(self, index: int) -> Array: ...
    @overload
    def __getitem__(self, index: slice) -> Ragged: ...
    def __getitem__(self, index: int | slice) -> Array | Ragged:
        """Takes a row, or a ``Ragged`` of the rows of a slice (at least one)."""
        if isinstance(index, slice):
            return self._select(index)
        if not hasattr(index, "__index__") or isinstance(index, Ragged | bool | np.bool_):
            idioms.refuse_index(index)
        return self._row_tuple()[operator.index(index)]

    @_moves_data
    def _select(self, index: slice) -> Ragged:
        chosen = np.arange(self.num_rows)[index]
        if not chosen.size:
            raise ValueError(f"{index} selects none of {self.num_rows} rows")
        rows = None if self._rows is None else self._rows[index]
        if rows is not None and self._tiles is None:
            return Ragged(None, tiling.layout_of([row.shape[0] for row in rows]), rows)
        layout = tiling.select_rows(self._layout, chosen)
        return Ragged(tiling.hide_others(self.tiles, layout), layout, rows)

    @_moves_data
    def _row_tuple(self) -> tuple[Array, ...]:
        if self._rows is None:
            if isinstance(self._layout.lengths, jax.core.Tracer):
                raise RowAccessError
            flat = self.tiles.reshape(-1, *self.trailing_shape)
            starts: list[int] = np.asarray(self._layout.row_start).tolist()
            lengths: list[int] = np.asarray(self._layout.lengths).tolist()
            self._rows = tuple(flat[s : s + n] for s, n in zip(starts, lengths, strict=True))
        return self._rows

    # Number by number

    def map(self, fn: Callable[..., Array], *others: Operand) -> Ragged:
        """Applies an element-wise function to this and others of the same lengths.

        Args:
            fn: takes arrays of shape ``[..., K]`` or ``[...]`` and returns one with the same
                leading axes. It must treat every token by itself.
            others: each a ``Ragged`` of the same lengths, a scalar, or one value per row ``[B]``.

        Returns:
            A ``Ragged`` of what ``fn`` returns.

        Raises:
            TypeError: ``fn`` changed the leading axes, or sums, sorts or the like along them,
                which would mix rows.
            ValueError: the lengths differ, or an array is not of shape ``[B]``.
        """
        result = self.map_terms(lambda *tiles: {"": fn(*tiles)}, *others)[""]
        check_tokenwise(fn, self.tiles, lambda: map(self._lift, others))
        return result

    @_moves_data
    def map_terms(
        self, fn: Callable[..., Mapping[str, Array]], *others: Operand
    ) -> dict[str, Ragged]:
        """Applies an element-wise function that gives several numbers per token, by name.

        The function is called once, so that what its results share is computed once.

        Args:
            fn: as in :meth:`map`, and returns a dict of arrays.
            others: as in :meth:`map`.

        Returns:
            A ``Ragged`` for each name.

        Raises:
            TypeError: as :meth:`map`.
            ValueError: as :meth:`map`.
        """
        tiles = self.tiles
        terms: dict[str, Ragged] = {}
        for name, term in fn(tiles, *(self._lift(other) for other in others)).items():
            result = self._poison(jnp.asarray(term), *others)
            if result.shape[:2] != tiles.shape[:2]:
                raise TypeError(
                    f"{repr(name) + ' of ' if name else ''}map needs a function that keeps one "
                    "result per token; this one turned the "
                    f"leading axes {tiles.shape[:2]} into {result.shape[:2]}. For one value per "
                    "row use a reduction such as sum() or mean()."
                )
            terms[name] = Ragged(result, self._layout)
        check_tokenwise(fn, tiles, lambda: map(self._lift, others))
        return terms

    @_moves_data
    def astype(self, dtype: Any) -> Ragged:
        """Converts the values to another dtype."""
        return Ragged(jnp.asarray(self.tiles).astype(dtype), self._layout)

    def _lift(self, other: Operand) -> Array:
        if isinstance(other, Ragged):
            return self._align(other)
        return alignment.lift(other, self.tiles, self._layout)

    def _align(self, other: Ragged) -> Array:
        return alignment.align(other.tiles, other._layout, self.tiles, self._layout)

    def _poison(self, result: Array, *others: Any) -> Array:
        for other in others:
            if isinstance(other, Ragged):
                result = alignment.poison(result, self._layout, other._layout)
        return result

    @_moves_data
    def _unary(self, op: Callable[[Array], Array]) -> Ragged:
        return Ragged(op(self.tiles), self._layout)

    @_moves_data
    def _binary(self, other: Operand, op: Callable[[Array, Array], Array]) -> Ragged:
        lifted = self._lift(other)
        mine = self.tiles
        if np.ndim(lifted) > mine.ndim:
            mine = tiling.widen(mine, lifted)
        return Ragged(self._poison(op(mine, lifted), other), self._layout)

    @_reduces_rows
    def cumsum(self, axis: int = -1) -> Ragged:
        """Computes running sums of each row: ``y[t] = x[0] + ... + x[t]``; -1 is the only axis."""
        idioms.without_axes({"axis": axis}, ())
        sums = reductions.running_sums(self._masked(None, 0), self._layout)
        return Ragged(sums, self._layout)

    # One value per row: [B]

    @_reduces_rows
    def sum(self, where: Ragged | None = None) -> Array:
        """Sums each row, ``[B]``, over what ``where`` marks; 0 if there is nothing."""
        return tiling.row_sums(reductions.wide(self._masked(where, 0)), self._layout)

    @_reduces_rows
    def count(self, where: Ragged | None = None) -> Array:
        """Counts the numbers of each row, or those that ``where`` marks: int32 ``[B]``."""
        where = self._checked(where)
        if where is None:
            return jnp.asarray(self._layout.lengths) * int(np.prod(self.trailing_shape, dtype=int))
        return self._ones().sum(where)

    @_reduces_rows
    def mean(self, where: Ragged | None = None) -> Array:
        """Takes the mean of each row, ``[B]``; 0 for a row with no numbers to take the mean of."""
        return self.sum(where) / jnp.maximum(self.count(where), 1).astype(self._float_dtype())

    @_reduces_rows
    def var(self, where: Ragged | None = None) -> Array:
        """Computes the variance of each row, ``[B]``: the mean square distance from the mean."""
        centred = self - self.mean(where)
        return (centred * centred).mean(where)

    @_reduces_rows
    def std(self, where: Ragged | None = None) -> Array:
        """Computes the standard deviation of each row, ``[B]``: the root of :meth:`var`.

        As in JAX it divides by the number of values n, where torch divides by n - 1. Where all
        values are equal, as in a row of one token, its derivative is 0, not infinite.
        """
        var = self.var(where)
        return jnp.where(var > 0, jnp.sqrt(jnp.where(var > 0, var, 1)), var)

    @_reduces_rows
    def max(self, where: Ragged | None = None) -> Array:
        """Finds the largest number of each row, ``[B]``; -inf (or the least integer) if none."""
        tiles = self._masked(where, reductions.least(self.dtype))
        per_tile = tiles.reshape(tiles.shape[0], -1).max(axis=1)
        return jax.ops.segment_max(per_tile, self._layout.tile_row, self.num_rows)

    @_reduces_rows
    def min(self, where: Ragged | None = None) -> Array:
        """Finds the smallest number of each row, ``[B]``; inf (or the largest integer) if none."""
        tiles = self._masked(where, reductions.greatest(self.dtype))
        per_tile = tiles.reshape(tiles.shape[0], -1).min(axis=1)
        return jax.ops.segment_min(per_tile, self._layout.tile_row, self.num_rows)

    @_reduces_rows
    def logsumexp(self, where: Ragged | None = None) -> Array:
        """Computes ``log(sum(exp(row)))``, ``[B]``, without overflow; -inf for no numbers."""
        top = jax.lax.stop_gradient(self.max(where))
        shift = jnp.where(jnp.isfinite(top), top, 0)
        centred = Ragged(self._masked(where, -jnp.inf), self._layout) - shift
        return jnp.log(centred.map(jnp.exp).sum()) + shift

    @_moves_data
    def dot(self, other: Ragged, where: Ragged | None = None) -> Array:
        """Sums ``row * other's row`` over each row, ``[B]``.

        Where ``other`` is 0 it hides what it meets: an infinite logprob behind a weight of 0 adds 0
        to the value, and has gradient 0.
        """
        return self._binary(other, reductions.weigh).sum(where)

    @_moves_data
    def first(self) -> Array:
        """Takes what stands at the first token of each row, ``[B, ...]``.

        Returns:
            In an empty row whose length is traced: NaN, or 0 of an integer dtype.

        Raises:
            ValueError: a row has no token.
        """
        return self._at(self._layout.row_start)

    @_moves_data
    def last(self) -> Array:
        """Takes what stands at the last token of each row, ``[B, ...]``; as :meth:`first`."""
        layout = self._layout
        return self._at(layout.row_start + jnp.maximum(layout.lengths, 1) - 1)

    def _at(self, position: Array) -> Array:
        return reductions.token_at(self.tiles, self._layout, position, self.row_mask)

    # One value for all

    @_moves_data
    def total(self, where: Ragged | None = None) -> Array:
        """Sums all numbers of all rows: a scalar."""
        return self.total_terms({"": self}, where)[""]

    @_moves_data
    def total_terms(
        self, terms: Mapping[str, Ragged], where: Ragged | None = None
    ) -> dict[str, Array]:
        """Computes :meth:`total` of several Ragged of these rows, by name: scalars.

        All are summed together, which costs less than one after another.

        Args:
            terms: at least one, of one dtype, as :meth:`map_terms` gives them.
            where: marks what counts.
        """
        tiles = [reductions.wide(term._masked(where, 0)) for term in terms.values()]
        return dict(zip(terms, tiling.totals(tiles), strict=True))

    @_moves_data
    def total_count(self, where: Ragged | None = None) -> Array:
        """Counts the numbers of all rows, or those that ``where`` marks: an int32 scalar."""
        return jnp.sum(self.count()) if where is None else self._ones().total(where)

    def _ones(self) -> Ragged:
        return Ragged(jnp.ones_like(self.tiles, jnp.int32), self._layout)

    @_moves_data
    def quantile(self, q: Any, where: Ragged | None = None) -> Array:
        """Finds the ``q``-th quantile of all numbers, as ``jnp.quantile`` interpolates it.

        Args:
            q: a number in [0, 1], or an array of such.
            where: marks what counts.

        Returns:
            One number for each ``q``; NaN where there is no number, one of them is NaN, or a ``q``
            that is traced is outside [0, 1].

        Raises:
            ValueError: a ``q`` is outside [0, 1].
        """
        floats = Ragged(jnp.asarray(self.tiles, self._float_dtype()), self._layout)
        numbers = floats._masked(where, jnp.inf).ravel()
        return reductions.quantile(q, numbers, self.total_count(where))

    def _checked(self, where: Any) -> Ragged | None:
        """Reads a mask; None where torch's ``.sum(-1)`` means what a reduction does anyway."""
        if isinstance(where, Ragged) and jnp.issubdtype(where.dtype, jnp.inexact):
            raise TypeError(
                f"where= marks what counts, and is boolean or integer, not {where.dtype}, because "
                "a weight is no mask: where=weights != 0, or x.dot(weights) / weights.sum() for a "
                "mean by weight"
            )
        if where is None or isinstance(where, Ragged):
            return where
        if isinstance(where, int) and where == -1 and not self.trailing_shape:
            return None
        raise TypeError(
            f"a reduction of a Ragged takes each row as a whole, and as its argument a Ragged that "
            f"marks what counts, not {type(where).__name__}: x.sum(), x.sum(where=mask), or "
            "x.map(lambda t: t.sum(-1)) over the candidates of each token"
        )

    def _masked(self, where: Ragged | None, fill: Any) -> Array:
        where, tiles = self._checked(where), self.tiles
        keep = tiling.widen(tiling.mask(self._layout), tiles)
        if where is not None:
            keep = keep & tiling.widen(jnp.asarray(self._align(where)).astype(bool), tiles)
        dtype = jax.dtypes.canonicalize_dtype(tiles.dtype)
        kept = jnp.where(keep, tiles, jnp.asarray(fill, dtype))
        return kept if where is None else self._poison(kept, where)

    def _float_dtype(self) -> Any:
        return jax.dtypes.canonicalize_dtype(jnp.promote_types(self.dtype, jnp.float32))

    # What it is not

    if not TYPE_CHECKING:  # so that a type checker still knows what there is

        def __getattr__(self, name: str) -> NoReturn:
            known = idioms.advice(name) or ("" if name.startswith("_") else idioms.NOT_AN_ARRAY)
            raise AttributeError(
                f"a Ragged has no attribute {name!r}{known and ': ' + known}", name=name, obj=self
            )

    @classmethod
    def __torch_function__(
        cls, function: Any, _types: Any, _args: Any = (), _kwargs: Any = None
    ) -> NoReturn:
        idioms.refuse_function(getattr(function, "__name__", str(function)), idioms.NOT_AN_ARRAY)

    def __array__(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        raise TypeError(idioms.NOT_AN_ARRAY)


def _concatenate(rows: Sequence[Array], layout: Layout) -> Array:
    """Tiles rows that may be traced, whose lengths are known; differentiable in the rows."""
    alignment.check_devices(*rows, whole=True)
    size = layout.tile_row.shape[0] * tiling.TILE
    lengths = [row.shape[0] for row in rows]
    flat = jnp.concatenate(tiling.pieces(rows, lengths, size, rows[0].dtype))
    return tiling.fill(flat.reshape(-1, tiling.TILE, *rows[0].shape[1:]), layout)
