"""Any batch that a user can build, and any objective, some with their gradient by hand."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from hypothesis import strategies as st

from mintjax import Datum, ModelInput, objectives

from ..examples import THOROUGH

KINDS: dict[str, Any] = {
    "float32": np.float32,
    "float64": np.float64,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "int64": np.int64,
    "int32": np.int32,
    "uint8": np.uint8,
    "bool": np.bool_,
    ">f4": np.dtype(">f4"),
}
"""The dtypes that columns come in. Each number that is drawn is exact in all that can hold it."""

SPREADS = ("token", "candidate", "datum")


class Situation(NamedTuple):
    """One batch.

    Args:
        data: its datums.
        logprobs: of each datum's targets, multiples of 1/8, which every floating dtype holds.
        exact: the columns as they were meant, float64, by name.
    """

    data: list[Datum]
    logprobs: list[Any]
    exact: list[dict[str, Any]]

    def __repr__(self) -> str:
        shown = [
            f"  {i}: logprobs={lp.tolist()}, "
            + ", ".join(f"{name}={value.tolist()}" for name, value in exact.items())
            + f", kinds={ {n: str(v.dtype) for n, v in datum.loss_fn_inputs.items()} }"
            for i, (datum, lp, exact) in enumerate(
                zip(self.data, self.logprobs, self.exact, strict=True)
            )
        ]
        return "Situation(\n" + "\n".join(shown) + "\n)"


class Case(NamedTuple):
    """An objective and the batches that it takes.

    Args:
        objective: called once per example, because caches go by the objective.
        columns: names of the columns that it reads.
        block: how many datums belong together.
        candidates: whether it takes ``[T, K]`` targets, needs them, or neither.
        by_hand: ``(exact columns, logprobs) -> (loss, gradients)`` in NumPy, if there is one.
    """

    objective: Callable[[], Any]
    columns: tuple[str, ...] = ("weights",)
    block: int = 1
    candidates: str = "may"
    by_hand: Callable[[Sequence[Mapping[str, Any]], Sequence[Any]], Any] | None = None


def _numbers(name: str, kind: str, size: int) -> st.SearchStrategy[list[float]]:
    if kind == "bool":
        numbers = [0.0, 1.0]
    elif kind in ("int64", "int32", "uint8"):
        numbers = [0.0, 1.0, 2.0]
    else:
        numbers = [0.0, 1.0, 0.5, 2.0]
    if kind not in ("bool", "uint8"):
        if name == "advantages":
            numbers = [*numbers, -1.0, -2.0]
        if name in ("logprobs", "ref_logprobs", "teacher_logprobs"):
            whole = kind in ("int64", "int32")
            numbers = [-float(n) for n in range(1, 6)] if whole else [-n / 8 for n in range(1, 40)]
    if name in ("desirable", "outcomes", "groups"):
        numbers = [0.0, 1.0]
    return st.lists(st.sampled_from(numbers), min_size=size, max_size=size)


FLOATS_ONLY = ("logprobs", "ref_logprobs", "teacher_logprobs")

SHAPES = 4
"""Shapes of a batch for each case and number of candidates. Each has programs of its own, so that
many examples of a few shapes cost less than as many shapes."""
SEED = os.environ.get("SHAPES_SEED", "0")


class Shape(NamedTuple):
    """What is compiled for: all of a batch but its numbers.

    Args:
        lengths: tokens of each datum.
        spreads: of each column, whether it has a number per token, per candidate or per datum.
        kinds: of each datum, the dtypes of its columns.
    """

    lengths: list[int]
    spreads: dict[str, str]
    kinds: list[dict[str, str]]


def shape_of(case: Case, candidates: int | None, number: int) -> Shape:
    """Gives one of the shapes of a case: dtypes mixed over datums, columns spread in every way."""
    chance = random.Random(f"{SEED} {case.columns} {case.block} {candidates} {number}")
    rows = case.block * chance.randint(1, 4 // min(case.block, 4))
    spreads: dict[str, str] = {}
    for name in case.columns:
        allowed = ["token"] if candidates is None else ["token", "candidate"]
        if name in FLOATS_ONLY:  # logprobs have the shape of the targets
            allowed = ["token"] if candidates is None else ["candidate"]
        elif name == "advantages":
            allowed.append("datum")
        elif name in ("desirable", "groups"):
            allowed = ["datum"]
        elif name == "outcomes":
            allowed = ["candidate"]
        spreads[name] = chance.choice(allowed)
    kinds = [
        {
            name: chance.choice(
                [k for k in KINDS if name not in FLOATS_ONLY or ("int" not in k and k != "bool")]
            )
            for name in case.columns
        }
        for _ in range(rows)
    ]
    return Shape([chance.randint(1, 4) for _ in range(rows)], spreads, kinds)


@st.composite
def situations(draw: st.DrawFn, case: Case, candidates: int | None) -> Situation:
    """Batches for an objective."""
    shape = shape_of(case, candidates, draw(st.integers(0, SHAPES - 1), label="shape"))
    data, logprobs, exacts = [], [], []
    for length, kinds in zip(shape.lengths, shape.kinds, strict=True):
        targets = (length,) if candidates is None else (length, candidates)
        size = int(np.prod(targets))
        lp = draw(st.lists(st.integers(-40, -1), min_size=size, max_size=size), label="logprobs")
        inputs: dict[str, Any] = {"target_tokens": np.arange(size).reshape(targets)}
        exact: dict[str, Any] = {}
        for name, kind in kinds.items():
            own = {"token": (length,), "candidate": targets, "datum": ()}[shape.spreads[name]]
            values = draw(_numbers(name, kind, int(np.prod(own, dtype=int))), label=name)
            inputs[name] = np.array(values).reshape(own).astype(KINDS[kind])
            exact[name] = np.array(values).reshape(own)
        data.append(Datum(ModelInput.from_ints(range(1, length + 1)), inputs))
        logprobs.append(np.array(lp, np.float32).reshape(targets) / 8)
        exacts.append(exact)
    return Situation(data, logprobs, exacts)


def spread(column: Any, like: Any) -> Any:
    """A column of one datum in the shape of its logprobs: per datum, per token, per candidate."""
    column = np.asarray(column)
    return np.broadcast_to(
        column.reshape(column.shape + (1,) * (like.ndim - column.ndim)), like.shape
    )


# A user's own functions, in columns and as loops over rows, with their gradients by hand.


def reinforce(data: Any, logprobs: Any) -> Any:
    return -(logprobs * data["advantages"]).total(), {"mean": logprobs.mean().mean()}


def reinforce_loop(data: Any, logprobs: Any) -> Any:
    total = 0.0
    for datum, lp in zip(data, logprobs, strict=True):
        advantages = datum.loss_fn_inputs["advantages"]
        if advantages.ndim == 1 and lp.ndim == 2:
            advantages = advantages[:, None]
        total = total - (lp * advantages).sum()
    means = jnp.stack([lp.mean() for lp in logprobs])
    return total, {"mean": means.mean()}


def reinforce_by_hand(exact: Any, logprobs: Any) -> Any:
    grads = [
        -spread(c["advantages"], lp).astype(float) for c, lp in zip(exact, logprobs, strict=True)
    ]
    return sum(float((g * lp).sum()) for g, lp in zip(grads, logprobs, strict=True)), grads


def pairwise(data: Any, logprobs: Any) -> Any:
    scores = logprobs.dot(data["weights"])
    margins = scores[0::2] - scores[1::2]
    return -jax.nn.log_sigmoid(margins).mean(), {"accuracy": (margins > 0).mean()}


def pairwise_loop(data: Any, logprobs: Any) -> Any:
    losses, hits = [], []
    for chosen, rejected, lp_c, lp_r in zip(
        data[::2], data[1::2], logprobs[::2], logprobs[1::2], strict=True
    ):
        w_c, w_r = chosen.loss_fn_inputs["weights"], rejected.loss_fn_inputs["weights"]
        if lp_c.ndim > w_c.ndim:
            w_c, w_r = w_c[:, None], w_r[:, None]
        margin = (lp_c * w_c).sum() - (lp_r * w_r).sum()
        losses.append(-jax.nn.log_sigmoid(margin))
        hits.append(margin > 0)
    return jnp.stack(losses).mean(), {"accuracy": jnp.stack(hits).mean()}


def pairwise_by_hand(exact: Any, logprobs: Any) -> Any:
    weights = [spread(c["weights"], lp) for c, lp in zip(exact, logprobs, strict=True)]
    scores = np.array(
        [(w * lp.astype(float)).sum() for w, lp in zip(weights, logprobs, strict=True)]
    )
    margins = scores[::2] - scores[1::2]
    pairs = len(margins)
    slope = -1 / (1 + np.exp(margins)) / pairs
    grads = [(slope[i // 2] * (-1) ** i) * w for i, w in enumerate(weights)]
    return np.logaddexp(0, -margins).mean(), grads


def linear_when_small(data: Any, logprobs: Any) -> Any:
    weighted = (logprobs * data["weights"]).sum()
    if len(data) < 2:
        return -weighted.sum(), {}
    return (weighted**2).sum(), {}


def linear_when_small_by_hand(exact: Any, logprobs: Any) -> Any:
    weights = [spread(c["weights"], lp) for c, lp in zip(exact, logprobs, strict=True)]
    scores = [(w * lp.astype(float)).sum() for w, lp in zip(weights, logprobs, strict=True)]
    if len(weights) < 2:
        return -scores[0], [-w.astype(float) for w in weights]
    return sum(s * s for s in scores), [
        2 * s * w.astype(float) for s, w in zip(scores, weights, strict=True)
    ]


def reads_what_it_needs(data: Any, logprobs: Any) -> Any:
    squares = (logprobs * logprobs).total()
    if len(data) > 1:
        squares = squares + (logprobs * data["weights"]).total()
    return squares, {}


def reads_what_it_needs_by_hand(exact: Any, logprobs: Any) -> Any:
    loss, grads = 0.0, []
    for c, lp in zip(exact, logprobs, strict=True):
        row = lp.astype(float)
        weights = spread(c["weights"], lp) if len(exact) > 1 else np.zeros(lp.shape)
        loss += (row * row + row * weights).sum()
        grads.append(2 * row + weights)
    return loss, grads


def ppo_loop(data: Any, logprobs: Any) -> Any:
    total, clipped = 0.0, []
    for datum, lp in zip(data, logprobs, strict=True):
        ratio = jnp.exp(lp - datum.loss_fn_inputs["logprobs"])
        advantages = datum.loss_fn_inputs["advantages"]
        advantages = advantages.reshape(advantages.shape + (1,) * (lp.ndim - advantages.ndim))
        bounded = jnp.clip(ratio, 0.8, 1.2)
        total = total - jnp.minimum(ratio * advantages, bounded * advantages).sum()
        clipped.append((ratio != bounded).sum())
    return total, {"clipped": jnp.stack(clipped).sum()}


POLICY = ("logprobs", "advantages")
MASKED = (*POLICY, "weights")
PAIRS: dict[str, Any] = {"block": 2}
REFERENCE: dict[str, Any] = {"columns": ("weights", "ref_logprobs"), "block": 2}

OWN = {
    "reinforce": Case(lambda: reinforce, ("advantages",), by_hand=reinforce_by_hand),
    "reinforce_loop": Case(lambda: reinforce_loop, ("advantages",), by_hand=reinforce_by_hand),
    "pairwise": Case(lambda: pairwise, block=2, by_hand=pairwise_by_hand),
    "pairwise_loop": Case(lambda: pairwise_loop, block=2, by_hand=pairwise_by_hand),
    "linear_when_small": Case(lambda: linear_when_small, by_hand=linear_when_small_by_hand),
    "reads_what_it_needs": Case(lambda: reads_what_it_needs, by_hand=reads_what_it_needs_by_hand),
    "ppo_loop": Case(lambda: ppo_loop, POLICY),
}

OURS = {
    "cross_entropy": Case(objectives.cross_entropy),
    "importance_sampling": Case(objectives.importance_sampling, POLICY),
    "importance_sampling, masked": Case(objectives.importance_sampling, MASKED),
    "ppo": Case(objectives.ppo, POLICY),
    "ppo, masked": Case(objectives.ppo, MASKED),
    "ppo, token mean": Case(lambda: objectives.ppo(aggregation="token_mean"), MASKED),
    "cispo": Case(objectives.cispo, MASKED),
    "dro": Case(objectives.dro, POLICY),
    "dro, masked": Case(objectives.dro, MASKED),
    "dual_clip_ppo": Case(objectives.dual_clip_ppo, MASKED),
    "dppo": Case(objectives.dppo, MASKED),
    "truncated_importance_sampling": Case(objectives.truncated_importance_sampling, MASKED),
    "gspo": Case(objectives.gspo, MASKED),
    "kl_k2": Case(objectives.kl_k2, ("weights", "ref_logprobs")),
    "kl_k3": Case(objectives.kl_k3, ("weights", "ref_logprobs")),
    "l2_to_reference": Case(objectives.l2_to_reference, ("weights", "ref_logprobs")),
    "sampled_entropy": Case(objectives.sampled_entropy),
    "bradley_terry": Case(objectives.bradley_terry, **PAIRS),
    "dpo": Case(lambda: objectives.dpo(label_smoothing=0.1), **REFERENCE),
    "ipo": Case(objectives.ipo, **REFERENCE),
    "simpo": Case(objectives.simpo, **PAIRS),
    "orpo": Case(objectives.orpo, **PAIRS),
    "kto": Case(objectives.kto, ("weights", "ref_logprobs", "desirable")),
    "distillation_forward_kl": Case(
        objectives.distillation_forward_kl, ("teacher_logprobs",), candidates="must"
    ),
    "distillation_reverse_kl": Case(
        lambda: objectives.distillation_reverse_kl(renormalise=True),
        ("teacher_logprobs",),
        candidates="must",
    ),
    "ppo + kl_k3": Case(
        lambda: objectives.weighted_sum(
            {"ppo": objectives.ppo(), "kl": objectives.kl_k3()}, {"kl": 0.1}
        ),
        (*MASKED, "ref_logprobs"),
    ),
    "own + cross_entropy": Case(
        lambda: objectives.weighted_sum(
            {"own": reinforce, "nll": objectives.cross_entropy()}, {"nll": 0.5}
        ),
        ("weights", "advantages"),
    ),
}

for name in ("dapo", "dppo_kl", "gmpo", "kl_cov", "luspo", "masked_importance_sampling"):
    OURS[name] = Case(getattr(objectives, name), MASKED)
for name in ("sapo", "stable_reinforce", "vespo"):
    OURS[name] = Case(getattr(objectives, name), MASKED)
for name in ("kl_abs", "kl_k3_straight_through"):
    OURS[name] = Case(getattr(objectives, name), ("weights", "ref_logprobs"))
for name in ("unlikelihood", "focal_cross_entropy", "conditional_value_at_risk"):
    OURS[name] = Case(getattr(objectives, name))
for name in ("alphapo", "cpo", "slic"):
    OURS[name] = Case(getattr(objectives, name), **PAIRS)
for name in (
    "aot",
    "aot_unpaired",
    "apo_down",
    "apo_zero",
    "bco_pair",
    "discopop",
    "exo_pair",
    "f_dpo",
    "length_normalised_dpo",
    "nca_pair",
    "robust_dpo",
    "rpo",
    "sppo",
):
    OURS[name] = Case(getattr(objectives, name), **REFERENCE)
OURS |= {
    # With the default of 0.1, margins of 10 lie at the bend, on one side of it or the other.
    "hinge": Case(lambda: objectives.hinge(beta=0.13), **REFERENCE),
    "bco": Case(lambda: objectives.bco(reward_shift=0.1), ("weights", "ref_logprobs", "desirable")),
    "plackett_luce": Case(lambda: objectives.plackett_luce(group_size=2), **REFERENCE),
    "worst_group": Case(lambda: objectives.worst_group(num_groups=2), ("weights", "groups")),
    "kl_k3_corrected": Case(objectives.kl_k3_corrected, (*MASKED, "ref_logprobs")),
    "generalised_jsd": Case(objectives.generalised_jsd, ("teacher_logprobs",), candidates="must"),
    "brier_score": Case(objectives.brier_score, ("outcomes",), candidates="must"),
    "ppo, prompt mean": Case(
        lambda: objectives.ppo(aggregation="prompt_mean", group_size=2), MASKED, block=2
    ),
    "ppo, fixed length": Case(
        lambda: objectives.ppo(aggregation="fixed_length", max_length=5), MASKED
    ),
}

CASES = {**OWN, **OURS}


def candidates_of(case: Case) -> st.SearchStrategy[int | None]:
    """K of the targets that a case takes, or None."""
    numbers = [2, 3] if THOROUGH else [2]  # each has programs of its own
    return st.sampled_from(numbers if case.candidates == "must" else [None, *numbers])
