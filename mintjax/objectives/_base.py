"""The base of all objectives, and the factory that makes one of a loss function."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias, TypeVar, cast

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from mintjax.errors import DataError
from mintjax.losses._settings import check_bounds, check_positive, check_settings
from mintjax.ragged import Ragged, tiling
from mintjax.ragged.batch import Batch, as_batch
from mintjax.ragged.transfers import transfers_allowed
from mintjax.types import Datum, LossFnName

Array: TypeAlias = Any  # a NumPy array, a JAX array or a tracer
Metrics: TypeAlias = Mapping[str, Array]
Loss: TypeAlias = Callable[..., jax.Array]


class LossObjective:
    """A loss as a function of a batch and the logprobs of its tokens.

    It is a value: frozen, comparable, printable, and a JAX pytree whose numbers are leaves. They
    are traced, so an objective with another threshold runs the same compiled program.
    """

    loss: ClassVar[Loss]
    """The function of arrays that it applies."""
    settings: ClassVar[tuple[str, ...]] = ()
    """The fields that it passes to the loss, as keyword arguments."""
    reads: ClassVar[tuple[str, ...]] = ()
    """The parameters of the loss that it fills from the batch, after the logprobs."""
    positive: ClassVar[tuple[str, ...]] = ()
    """The settings that must be above 0."""
    served_as: ClassVar[LossFnName | None] = None
    """The name under which trainers serve the loss."""
    pad_rows_to: ClassVar[int | None] = 1
    """Pads the row count of a batch to a multiple of this; None disables padding. See
    ``Ragged.row_mask``."""

    _add: ClassVar[Callable[[Any, Any], LossObjective]]
    _scale: ClassVar[Callable[[Any, Any], LossObjective]]
    """They make weighted sums, and come from the module of these, which needs this one."""
    __array_ufunc__ = None  # so that a NumPy number times an objective is an objective

    if TYPE_CHECKING:

        def __init__(self, **settings: Any) -> None: ...

        def __getattr__(self, name: str) -> Any: ...

    def __post_init__(self) -> None:
        me = type(self).__name__
        defaults = {f.name: f.default for f in dataclasses.fields(cast("Any", self))}
        for name, default in defaults.items():
            value = getattr(self, name)
            if callable(value):
                raise TypeError(
                    f"{name} of {me} must be a number, not {value!r}: what changes from step "
                    "to step is passed anew each step (another number runs the same compiled "
                    "program), and the weight of a term of weighted_sum may be a schedule"
                )
            numeric = isinstance(default, int | float) and not isinstance(default, bool)
            if numeric and (value is None or isinstance(value, str | bytes | complex)):
                raise TypeError(f"{name} of {me} must be a number, not {value!r}")
        # A loss of a user's own may mean something else by these names.
        module = str(getattr(getattr(type(self), "loss", None), "__module__", ""))
        ours = module.startswith("mintjax.losses.")
        check_settings(
            {name: getattr(self, name) for name in defaults if ours or name not in self.settings},
            of=me,
        )
        check_positive(me, **{name: getattr(self, name) for name in self.positive})
        if {"clip_low_threshold", "clip_high_threshold"} <= set(self.settings):
            check_bounds(self.clip_low_threshold, self.clip_high_threshold)

    def __repr__(self) -> str:
        fields = dataclasses.fields(cast("Any", self))
        shown = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in fields
            if field.name in (*self.settings, "aggregation")
            or getattr(self, field.name) is not field.default
        ]
        return f"{type(self).__name__}({', '.join(shown)})"

    @property
    def couples_datums(self) -> str | None:
        """Says why the objective is not a sum over datums of what each alone makes of it.

        None if it is one, so that a trainer that runs losses can add them up itself.
        """
        return f"{type(self).__name__} is not known to be a sum over datums"

    @property
    def builtin(self) -> tuple[LossFnName, dict[str, float]] | None:
        """The name and config under which a trainer computes the same loss, if there are such."""
        config = {name: getattr(self, name) for name in self.settings}
        plain = all(isinstance(value, int | float) for value in config.values())
        if self.served_as is None or not plain:
            return None
        return self.served_as, {name: float(value) for name, value in config.items()}

    def __call__(
        self,
        data: Batch | Sequence[Datum] | Mapping[str, Any],
        logprobs: Ragged | Sequence[Array] | Array,
    ) -> tuple[Array, dict[str, Array]]:
        """Computes the loss of a batch, and what to watch.

        Args:
            data: the datums, with the columns that this objective reads. Or, for a model of one's
                own, a dict of padded arrays ``[B, T]``, ``[B, T, K]`` or ``[B]``, with a ``"mask"``
                ``[B, T]`` of the tokens or their ``"lengths"`` ``[B]``; or a dict of lists of rows.
            logprobs: of each datum's target tokens, in nats, ``[T_i]`` or ``[T_i, K]`` each; beside
                padded arrays one of them, ``[B, T]`` or ``[B, T, K]``.

        Returns:
            A scalar, and scalars by name.

        Raises:
            DataError: a column is missing, or the batch does not divide as it must.
        """
        with transfers_allowed():
            if isinstance(data, Mapping):
                data, rows = Batch.of_mapping(data, logprobs)
            else:
                rows = logprobs if isinstance(logprobs, Ragged) else Ragged.from_rows(logprobs)
            if rows.dtype.itemsize < 4:  # 16 bits are too few for sums of logprobs
                rows = rows.astype(jnp.float32)
            return self.evaluate(as_batch(data), rows)

    def __add__(self, other: Any) -> LossObjective:
        """Makes the weighted sum of both: ``dpo() + 0.1 * kl_k2()``."""
        return LossObjective._add(self, other)

    def __radd__(self, other: Any) -> LossObjective:
        """Makes the weighted sum of both; a 0 on the left, as ``sum`` has it, adds nothing."""
        return LossObjective._add(other, self)

    def __sub__(self, other: Any) -> LossObjective:
        """Makes the weighted sum of both, the second with its weight negated."""
        return self + LossObjective._scale(-1.0, other)

    def __mul__(self, weight: Any) -> LossObjective:
        """Makes a weighted sum of this one term; the weight is a number or a schedule."""
        return LossObjective._scale(weight, self)

    __rmul__ = __mul__

    def __truediv__(self, number: Any) -> LossObjective:
        """Makes a weighted sum of this one term, with the weight ``1 / number``.

        Raises:
            TypeError: it is no real number.
            ValueError: it is 0 or not finite.
        """
        if not is_real(number):
            raise TypeError(f"an objective is divided by a number, not by {number!r}")
        if not isinstance(number, jax.core.Tracer) and not (np.isfinite(number) and number):
            raise ValueError(f"an objective is divided by a finite number but 0, not by {number!r}")
        return self * (1 / number)

    def __neg__(self) -> LossObjective:
        """Makes a weighted sum of this one term, with the weight -1."""
        return self * -1.0

    def evaluate(self, data: Batch, logprobs: Ragged) -> tuple[Array, dict[str, Array]]:
        """Does what a call does, of ``data`` as a Batch and ``logprobs`` as a Ragged."""
        raise NotImplementedError

    def column(self, data: Batch, name: str) -> Any:
        """Reads the column ``name`` of the data.

        Raises:
            DataError: a datum lacks it; the message names the column and this objective.
        """
        me = type(self).__name__
        if name not in data:
            raise DataError(
                f"the objective {me} reads it; add it to loss_fn_inputs of every datum: one number "
                "per token, or a single number per datum",
                datum=0,
                field=name,
            )
        try:
            return data[name]
        except DataError as error:
            raise DataError(
                f"the objective {me} reads it ({error})", datum=error.datum, field=name
            ) from None

    def apply(self, *inputs: Any, **named: Any) -> Array:
        """Calls the loss with ``inputs``, the settings of this objective, and what is ``named``."""
        settings = {name: getattr(self, name) for name in self.settings}
        return type(self).loss(*inputs, **settings, **named)


def is_real(value: Any) -> bool:
    """Tells whether something is one real number, of Python, NumPy or JAX, traced or not."""
    if isinstance(value, bool | int | float):
        return True
    if np.shape(value) != () or not hasattr(value, "dtype"):
        return False
    return any(jnp.issubdtype(value.dtype, kind) for kind in (jnp.floating, jnp.integer, bool))


_T = TypeVar("_T", bound=LossObjective)


def option(default: Any, *, static: bool = False) -> Any:
    """Declares a field of a family of objectives.

    Args:
        default: its value where none is given.
        static: whether it is part of the structure: another value is another program.
    """
    return dataclasses.field(default=default, metadata={"static": static})


def define(
    family: type[_T],
    loss: Loss,
    name: str | None = None,
    *,
    extra: Mapping[str, Any] | None = None,
    omit: Sequence[str] = (),
    **fixed: Any,
) -> type[_T]:
    """Makes the objective of a loss function: a frozen dataclass and a pytree.

    Its fields are the keyword-only parameters of the loss, with their defaults, and the options of
    the family. Numbers are leaves; booleans and strings are structure.

    Args:
        family: the class that evaluates it.
        loss: a function of arrays. Its positional parameters say what it is given.
        name: of the objective; that of the loss if None.
        extra: further options of this objective.
        omit: options of the family that make no sense for this loss.
        fixed: class variables that differ from the family's, and other defaults for fields.
    """
    parameters = inspect.signature(loss).parameters.values()
    given = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    settings = {
        p.name: fixed.pop(p.name, p.default)
        for p in parameters
        if p.kind is p.KEYWORD_ONLY and p.name != "where"
    }
    options: dict[str, dataclasses.Field[Any]] = dict(extra or {})
    for base in reversed(family.__mro__):
        options |= {key: value for key, value in vars(base).items() if _is_option(value)}
    left_out = {key: options.pop(key).default for key in omit}
    fields = [
        *(
            (key, option(value, static=isinstance(value, bool | str)))
            for key, value in settings.items()
        ),
        *(
            (key, option(fixed.pop(key, field.default), static=field.metadata["static"]))
            for key, field in options.items()
        ),
    ]
    called = name or str(cast("Any", loss).__name__)
    made = dataclasses.make_dataclass(
        called,
        [(key, Any, field) for key, field in fields],
        bases=(family,),
        namespace={
            "loss": staticmethod(loss),
            "settings": tuple(settings),
            "reads": tuple(given[1:]),
            "__doc__": _document(family, loss, [key for key, _ in fields]),
            **left_out,
            **fixed,
        },
        frozen=True,
        kw_only=True,
        repr=False,
    )
    made.__module__ = _caller()  # make_dataclass of Python 3.12 and newer names this module
    jax.tree_util.register_dataclass(
        made,
        data_fields=[key for key, field in fields if not field.metadata["static"]],
        meta_fields=[key for key, field in fields if field.metadata["static"]],
    )
    return cast("type[_T]", made)


def _caller() -> str:
    """Names the module that an objective is made in, where pickle looks for its class."""
    frame, name = inspect.currentframe(), "mintjax.objectives"
    while frame is not None and name.startswith("mintjax.objectives"):
        frame = frame.f_back
        name = "importlib" if frame is None else str(frame.f_globals.get("__name__", "__main__"))
    return "mintjax.objectives" if name.startswith("importlib") else name


def _is_option(value: Any) -> bool:
    return isinstance(value, dataclasses.Field)


def _document(family: type, loss: Loss, fields: Sequence[str]) -> str:
    """Writes the docstring of an objective from those of its family and of its loss."""
    said: dict[str, str] = {}
    for source in (*reversed(family.__mro__), loss):
        said |= _entries(inspect.getdoc(source) or "")
    summary = (inspect.getdoc(loss) or "").partition("\n\n")[0]
    about = (inspect.getdoc(family) or "").partition("\n\nArgs:")[0].partition("\n\n")[2]
    module, name = cast("Any", loss).__module__, cast("Any", loss).__name__
    where = f"mintjax.losses.{name}" if module.startswith("mintjax.losses.") else f"{module}.{name}"
    lines = [summary, "", f"It applies :func:`{where}`. {about}", "", "Args:"]
    lines += [f"    {field}: {said.get(field, 'as there.')}" for field in fields]
    return "\n".join(lines if fields else lines[:-2])


def _entries(text: str) -> dict[str, str]:
    """Reads the entries of the section Args, by their names, each on one line."""
    section = re.search(r"^Args:\n((?:[ ]+.*\n|\n)*)", text + "\n", re.MULTILINE)
    blocks = re.split(r"^    (?=\S)", section[1] if section else "", flags=re.MULTILINE)
    pairs = [block.partition(":") for block in blocks if ":" in block]
    return {name.strip(): " ".join(told.split()) for name, _, told in pairs}


def answer_mask(data: Batch, logprobs: Ragged) -> Ragged | None:
    """Reads which tokens count: those whose ``weights`` are not 0; None if there are none."""
    return counted(logprobs, data["weights"]) if "weights" in data else None


def counted(logprobs: Ragged, weights: Any) -> Ragged:
    """Marks the tokens whose weights are not 0."""

    def mark(mine: Array, weights: Array) -> Array:
        return jnp.broadcast_to(jnp.asarray(weights).astype(bool), mine.shape)

    return logprobs.map(mark, weights)


def tokenwise(
    function: Callable[..., Array], logprobs: Ragged, inputs: Sequence[Any], where: Ragged | None
) -> Ragged:
    """Applies a function of arrays and ``where=`` to columns, token by token."""
    masked, masks = _with_mask(function, where)
    return logprobs.map(_as_given(masked, function), *masks, *inputs)


def tokenwise_terms(
    function: Callable[..., Mapping[str, Array]],
    logprobs: Ragged,
    inputs: Sequence[Any],
    where: Ragged | None,
) -> dict[str, Ragged]:
    """Applies a function of the same kind that gives several numbers per token, by name."""
    masked, masks = _with_mask(function, where)
    return logprobs.map_terms(_as_given(masked, function), *masks, *inputs)


def _as_given(wrapper: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """Names the loss that a function applies, so that one of a user's own is seen to mix tokens."""
    objective = getattr(function, "__self__", None)
    loss = type(objective).loss if isinstance(objective, LossObjective) else function

    def applied(*arrays: Array) -> Any:
        return wrapper(*arrays)

    applied.checked_as = loss  # pyright: ignore[reportFunctionMemberAccess]
    return applied


def _with_mask(
    function: Callable[..., Any], where: Ragged | None
) -> tuple[Callable[..., Any], tuple[Ragged, ...]]:
    """Makes a function that takes its mask after the logprobs, and gives the masks to call with."""
    if where is None:
        return function, ()

    def masked(mine: Array, where: Array, *others: Array) -> Any:
        return function(mine, *others, where=where)

    return masked, (where,)


def together(
    function: Callable[..., Array], logprobs: Ragged, inputs: Sequence[Any], where: Ragged | None
) -> Ragged:
    """Applies a function that looks at all tokens of the batch at once, with its mask.

    What lies between the rows is masked too, because such a function would count it.
    """
    tiles = logprobs.tiles
    real = jnp.broadcast_to(tiling.widen(tiling.mask(logprobs.layout), tiles), tiles.shape)
    if where is None:
        return logprobs.map(partial(function, where=real), *inputs)

    def masked(mine: Array, where: Array, *others: Array) -> Array:
        return function(mine, *others, where=where & real)

    return logprobs.map(masked, where, *inputs)


def times_weights(values: Ragged, data: Batch) -> Ragged:
    """Multiplies losses by the ``weights`` of their tokens, if there are any.

    In a policy loss the weights are a mask; one that is neither 0 nor 1 is a factor, as it is on
    the trainers that read them.
    """
    if "weights" not in data:
        return values

    def scaled(mine: Array, weights: Array) -> Array:
        return mine * jnp.asarray(weights).astype(mine.dtype)

    return values.map(scaled, data["weights"])


def row_count(logprobs: Ragged) -> Array:
    """Counts the datums, without the empty rows that a batch may be padded with."""
    return jnp.sum(jnp.asarray(logprobs.row_mask).astype(jnp.float32))
