"""Expressions of a ``Ragged`` for what is written with arrays of torch and JAX elsewhere."""

from __future__ import annotations

from typing import Any, NoReturn

_ELEMENTWISE = {
    **dict.fromkeys(("exp", "expm1", "log", "log1p", "sqrt", "square", "tanh", "sign"), "jnp"),
    **dict.fromkeys(("isnan", "isfinite", "isinf", "floor", "ceil"), "jnp"),
    **dict.fromkeys(("sigmoid", "relu", "softplus"), "jax.nn"),
}
_DTYPES = {
    **dict.fromkeys(("float", "to", "type"), "float32"),
    "half": "float16",
    "bfloat16": "bfloat16",
    "int": "int32",
    "long": "int32",
    "bool": "bool",
}
_ROWS = ("item", "tolist", "numpy", "cpu", "copy", "clone")
_SHAPES = ("unsqueeze", "squeeze", "expand", "expand_as", "view", "reshape", "flatten", "ravel")

INSTEAD: dict[str, str] = {
    **{name: f"x.map({module}.{name})" for name, module in _ELEMENTWISE.items()},
    **{name: f"x.astype(jnp.{dtype})" for name, dtype in _DTYPES.items()},
    **dict.fromkeys(("abs", "absolute"), "abs(x)"),
    "double": "x.astype(float)",
    "neg": "-x",
    **dict.fromkeys(("pow", "power"), "x**2"),
    "logsigmoid": "x.map(jax.nn.log_sigmoid)",
    "log_softmax": "x - x.logsumexp()",
    "softmax": "(x - x.logsumexp()).map(jnp.exp)",
    **dict.fromkeys(("clip", "clamp"), "x.map(lambda t: jnp.clip(t, low, high))"),
    "clamp_min": "x.map(jnp.maximum, low)",
    "clamp_max": "x.map(jnp.minimum, high)",
    "minimum": "x.map(jnp.minimum, y)",
    "maximum": "x.map(jnp.maximum, y)",
    "where": "mask.map(jnp.where, x, y)",
    "masked_fill": "mask.map(jnp.where, 0, x)",
    "masked_select": "x.sum(where=mask)",
    "any": "(x != 0).max()",
    "all": "(x != 0).min()",
    **dict.fromkeys(("nonzero", "count_nonzero"), "(x != 0).sum()"),
    "median": "x.quantile(0.5)",
    "norm": "jnp.sqrt((x * x).sum())",
    **dict.fromkeys(("detach", "stop_gradient"), "x.map(jax.lax.stop_gradient)"),
    **dict.fromkeys(("numel", "size"), "x.total_count()"),
    **dict.fromkeys(("shape", "ndim", "dim"), "x.lengths"),
    **dict.fromkeys(_ROWS, "x.to_rows()"),
    "zeros_like": "x.map(jnp.zeros_like)",
    "ones_like": "x.map(jnp.ones_like)",
    "T": "x.to_padded().T",
}
"""By the name of a method, an attribute or a function of arrays: an expression of ``x``, and of
``y``, ``mask``, ``low`` and ``high`` where it takes such."""

_WHOLE = (
    "an array of one value per row, [B], meets every token of its row without a further axis: "
    "x - x.mean()"
)


NOT_AN_ARRAY = (
    "a Ragged is not an array: jnp.sum, jnp.mean and their like would count padding; use its "
    "methods: x.sum(), x.mean(), x.max(), x.logsumexp() for one value per row, x.total() for one "
    "in all, x.map(fn) for an element-wise function, such as x.map(jnp.exp) or "
    "mask.map(jnp.where, x, 0)"
)


class NotAnArray(type):
    """Gives the class a repr that JAX's own TypeErrors, which name the class, turn into advice."""

    def __repr__(cls) -> str:
        return f"{super().__repr__()} ({NOT_AN_ARRAY})"


def advice(name: str) -> str | None:
    """Says what to write in place of an attribute, or a function, of this name; None if unknown."""
    if name in INSTEAD:
        return f"write `{INSTEAD[name]}`"
    return _WHOLE if name in _SHAPES else None


def refuse_function(name: str, otherwise: str) -> NoReturn:
    """Refuses to be an argument of another library's function of arrays.

    Args:
        name: of the function.
        otherwise: what to say where no more is known.

    Raises:
        TypeError: always.
    """
    raise TypeError(f"{name} takes no Ragged: {advice(name) or otherwise}")


def without_axes(named: dict[str, Any], trailing: tuple[int, ...]) -> dict[str, Any]:
    """Takes the axis out of the arguments of a reduction, if it is the one that rows have.

    Args:
        named: the keyword arguments.
        trailing: what stands at one token.

    Returns:
        The other arguments.

    Raises:
        TypeError: it is another axis, or shall be kept.
    """
    axes = [named[name] for name in ("axis", "dim") if name in named]
    if any(named.get(name) for name in ("keepdim", "keepdims")):
        raise TypeError(f"a reduction keeps no axis, and need not: {_WHOLE}")
    if any(axis != -1 or trailing for axis in axes):
        raise TypeError(
            f"a reduction of a Ragged takes each row as a whole, not the axis {axes[0]}: x.sum() "
            "gives one value per row, x.total() one in all, and x.map(lambda t: t.sum(-1)) one per "
            "token over its candidates"
        )
    return {k: v for k, v in named.items() if k not in ("axis", "dim", "keepdim", "keepdims")}


def refuse_index(index: Any) -> NoReturn:
    """Refuses an index that is neither a row's number nor a slice of rows.

    Raises:
        TypeError: always.
    """
    kind = type(index).__name__
    raise TypeError(
        f"x[i] is a row and x[0::2] are rows of a Ragged, which {kind} does not choose. Tokens are "
        "chosen by a mask, x.sum(where=mask); x.first() and x.last() take the ends of all rows"
    )
