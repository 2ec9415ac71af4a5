"""The built-in losses as the embedded trainer runs them: inputs, options, reduction."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax import Array

from mintjax import losses
from mintjax.errors import DataError
from mintjax.local.limits import DEFAULT_LIMITS, Limits
from mintjax.losses._settings import RANGES, check_bounds, check_range
from mintjax.ragged.checks import check_data
from mintjax.step.reduction import Unit, amount
from mintjax.types import Datum, ImageChunk

_RL_INPUTS = ("target_tokens", "logprobs", "advantages")

REQUIRED_INPUTS: dict[str, tuple[str, ...]] = {
    "cross_entropy": ("target_tokens", "weights"),
    "importance_sampling": _RL_INPUTS,
    "ppo": _RL_INPUTS,
    "cispo": _RL_INPUTS,
    "dro": _RL_INPUTS,
    "gspo": _RL_INPUTS,
}
"""What each loss reads of a datum; the others also read ``weights``, a mask, where it is given.

Without it ``gspo``, which takes a mean over a sequence, leaves out the tokens that have neither a
logprob nor an advantage, as those of a prompt.
"""

_FUNCTIONS: dict[str, Callable[..., Array]] = {
    name: getattr(losses, name) for name in REQUIRED_INPUTS
}
_DEFAULTS: dict[str, dict[str, float]] = {
    name: {
        option.name: option.default
        for option in inspect.signature(function).parameters.values()
        if option.kind is option.KEYWORD_ONLY and option.name != "where"
    }
    for name, function in _FUNCTIONS.items()
}


class Columns(NamedTuple):
    """The inputs of a loss beside the logprobs, padded; each ``[rows, length, candidates]``."""

    weights: Array | npt.NDArray[np.float32]
    sampling_logprobs: Array | npt.NDArray[np.float32]
    advantages: Array | npt.NDArray[np.float32]
    real: Array | npt.NDArray[np.bool_]
    """Boolean: False in the padding."""


def options(loss_fn: str, config: Mapping[str, float] | None) -> dict[str, dict[str, float]]:
    """Completes the options of every loss; those of ``loss_fn`` are what the request says.

    Raises:
        DataError: no such loss, no such option of it, or one that is out of its range.
    """
    if loss_fn not in _DEFAULTS:
        raise DataError(
            f"{loss_fn!r} is none of {', '.join(REQUIRED_INPUTS)}; another loss is computed by the "
            "client, with forward_backward_custom",
            field="loss_fn",
        )
    given = dict(config or {})
    if unknown := sorted(given.keys() - _DEFAULTS[loss_fn].keys()):
        known = ", ".join(_DEFAULTS[loss_fn]) or "nothing"
        raise DataError(
            f"{loss_fn} has no option {unknown[0]!r}; it takes {known}", field="loss_fn_config"
        )
    own = _DEFAULTS[loss_fn] | given
    try:
        for name, value in given.items():
            check_range(value, RANGES[name]._replace(below=True), f"{name} of {loss_fn}")
        if "clip_low_threshold" in own:
            check_bounds(own["clip_low_threshold"], own["clip_high_threshold"])
    except ValueError as error:
        raise DataError(str(error), field="loss_fn_config") from None
    return _DEFAULTS | {loss_fn: own}


def check_request(
    data: Sequence[Datum],
    loss_fn: str,
    config: Mapping[str, float] | None,
    *,
    vocab_size: int,
    max_context_length: int,
    limits: Limits = DEFAULT_LIMITS,
) -> None:
    """Checks everything that can be known of a pass before it runs.

    Raises:
        DataError: naming the datum, the field, and what to do.
        BadRequestError: it is beyond one of the limits.
    """
    options(loss_fn, config)
    required = REQUIRED_INPUTS[loss_fn]
    _check_sizes(data, max_context_length, limits)
    check_data(data, {*required, "weights"}, required=required, vocab_size=vocab_size)
    for i, datum in enumerate(data):
        wanted = datum.loss_fn_inputs["target_tokens"].shape
        if len(wanted) > 2 or 0 in wanted:
            raise DataError(
                f"shape {list(wanted)}; targets are [T], or [T, K] with K candidates a position",
                datum=i,
                field="target_tokens",
            )
        if loss_fn == "gspo" and len(wanted) > 1:
            raise DataError(
                f"shape {list(wanted)}; gspo takes the ratio of a sequence, and targets are [T]",
                datum=i,
                field="target_tokens",
            )
        for name in {*required, "weights"} & datum.loss_fn_inputs.keys():
            shape = datum.loss_fn_inputs[name].shape
            if shape != wanted:
                raise DataError(
                    f"shape {list(shape)}, where target_tokens has {list(wanted)}",
                    datum=i,
                    field=name,
                )


def _check_sizes(data: Sequence[Datum], max_context_length: int, limits: Limits) -> None:
    num_targets = 0
    for i, datum in enumerate(data):
        if any(isinstance(chunk, ImageChunk) for chunk in datum.model_input.chunks):
            raise DataError("this trainer reads text only", datum=i, field="model_input")
        length = datum.model_input.length
        if length > max_context_length:
            raise DataError(
                f"{length} tokens, where the model reads {max_context_length}",
                datum=i,
                field="model_input",
            )
        limits.check("max_datum_tokens", length, f"datum {i} has {length} tokens")
        targets = datum.loss_fn_inputs.get("target_tokens")
        if targets is not None:
            candidates = math.prod(targets.shape[1:])
            limits.check(
                "max_candidates", candidates, f"datum {i} has {candidates} targets a token"
            )
            num_targets += targets.size
    limits.check("max_targets", num_targets, f"the data have {num_targets} targets")


def token_losses(
    loss_fn: Array,
    config: Mapping[str, Mapping[str, Array | float]],
    target_logprobs: Array,
    columns: Columns,
) -> Array:
    """Computes the loss of each token; the loss's number is traced: one program serves all losses.

    ``weights`` is a factor in ``cross_entropy`` and a mask in the others. There, a weight other
    than 0 and 1 scales its token.

    Args:
        loss_fn: int scalar, an index into :data:`REQUIRED_INPUTS`.
        config: from :func:`options`.
        target_logprobs: ``[rows, length, candidates]``.
        columns: the other inputs, of the same shape.

    Returns:
        float32, the shape of ``target_logprobs``; 0 in the padding.
    """

    def cross_entropy(target_logprobs: Array) -> Array:
        return losses.cross_entropy(target_logprobs, columns.weights, where=columns.real)

    def masked(name: str) -> Callable[[Array], Array]:
        def loss(target_logprobs: Array) -> Array:
            return jnp.asarray(columns.weights) * _FUNCTIONS[name](
                target_logprobs,
                columns.sampling_logprobs,
                columns.advantages,
                where=columns.real & (columns.weights != 0),
                **config[name],
            )

        return loss

    def gspo(target_logprobs: Array) -> Array:
        where = columns.real & (columns.weights != 0)
        shifts = jnp.where(where, target_logprobs - columns.sampling_logprobs, 0)
        num_tokens = jnp.maximum(where.sum((1, 2), keepdims=True), 1)
        return jnp.asarray(columns.weights) * losses.gspo_token(
            target_logprobs,
            shifts.sum((1, 2), keepdims=True) / num_tokens,
            columns.advantages,
            where=where,
            **config["gspo"],
        )

    branches = [cross_entropy, *(masked(name) for name in _PER_TOKEN), gspo]
    return cast(Array, jax.lax.switch(loss_fn, branches, target_logprobs))


_PER_TOKEN = tuple(REQUIRED_INPUTS)[1:-1]


def default_weights(
    loss_fn: str, sampling_logprobs: npt.NDArray[np.float32], advantages: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    """Makes the weights of a datum that has none, of the shape of its other columns.

    Args:
        loss_fn: name of the loss.
        sampling_logprobs: of its targets.
        advantages: of its targets.
    """
    if loss_fn == "gspo":
        return ((sampling_logprobs != 0) | (advantages != 0)).astype(np.float32)
    return np.ones_like(advantages)


def row_divisors(columns: Columns, per_sequence: Unit | None) -> npt.NDArray[np.float32]:
    """Computes the divisor of each datum's sum of token losses, ``[rows]``.

    The floor under sums of weights is that of SkyRL's JAX backend. They are computed outside the
    compiled program, so that one program serves all reductions.

    Args:
        columns: of the datums.
        per_sequence: what is counted in each.
    """
    floor = 1e-9 if per_sequence == "weights" else 1.0
    weights, real = np.asarray(columns.weights), np.asarray(columns.real)
    rows = [row[there[:, 0]] for row, there in zip(weights, real, strict=True)]
    return np.array([max(amount(per_sequence, [row]), floor) for row in rows], np.float32)
