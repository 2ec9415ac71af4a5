"""Every objective, stated a second time in NumPy, with batches to try it on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mintjax import objectives

from ..losses import oracles

Columns = list[Mapping[str, Any]]
Rows = Sequence[Any]
BOUNDS = (0.8, 1.2)


class Specimen(NamedTuple):
    """An objective, its reference, the batches it takes, and whether it sums over tokens."""

    objective: Any
    reference: Callable[[Columns, Rows, Rows], float] | None
    block: int = 1
    sums: bool = True
    batches: Mapping[str, Any] = {}


def kept(columns: Mapping[str, Any], row: Any, *names: str) -> list[Any]:
    """The tokens that count, of the logprobs and of columns."""
    keep = columns["weights"] != 0
    return [row[keep], *(columns[name][keep] for name in names)]


def tokens(oracle: Callable[..., tuple[Any, Any]], *names: str) -> Callable[..., float]:
    """The sum over tokens of an oracle's value."""

    def total(columns: Columns, rows: Rows, at: Rows) -> float:
        return sum(oracle(*kept(c, r, *names))[0].sum() for c, r in zip(columns, rows, strict=True))

    return total


def linear(oracle: Callable[..., tuple[Any, Any]], *names: str) -> Callable[..., float]:
    """The sum of a loss that stops gradients: its value at ``at``, and on along its slope."""

    def total(columns: Columns, rows: Rows, at: Rows) -> float:
        loss = 0.0
        for c, row, here in zip(columns, rows, at, strict=True):
            value, slope = oracle(*kept(c, here, *names))
            loss += value.sum() + (slope * (kept(c, row)[0] - kept(c, here)[0])).sum()
        return loss

    return total


def cross_entropy(columns: Columns, rows: Rows, at: Rows) -> float:
    return -sum(scores(columns, rows))


def gspo(columns: Columns, rows: Rows, at: Rows) -> float:
    def oracle(target: Any, sampling: Any, advantages: Any) -> Any:
        return oracles.gspo(target, sampling, advantages, np.ones_like(target, bool), *BOUNDS)

    return linear(oracle, *POLICY)(columns, rows, at)


def scores(columns: Columns, rows: Rows | str) -> list[float]:
    """The weighted sum of each datum's logprobs, or of a column."""
    given = [c[rows] for c in columns] if isinstance(rows, str) else rows
    return [
        float((kept(c, row)[0] * kept(c, row, "weights")[1]).sum())
        for c, row in zip(columns, given, strict=True)
    ]


def pairs(oracle: Callable[..., Any], *, reference: bool = False, lengths: bool = False) -> Any:
    """The mean over pairs of an oracle's value."""

    def mean(columns: Columns, rows: Rows, at: Rows) -> float:
        args = [scores(columns, rows)]
        if reference:
            args.append(scores(columns, "ref_logprobs"))
        if lengths:
            args.append([float((c["weights"] != 0).sum()) for c in columns])
        halves = [np.array(arg[half::2]) for arg in args for half in (0, 1)]
        return float(np.mean(oracle(*halves)[0]))

    return mean


def kto(columns: Columns, rows: Rows, at: Rows) -> float:
    gains = np.array(scores(columns, rows)) - np.array(scores(columns, "ref_logprobs"))
    here = np.array(scores(columns, at)) - np.array(scores(columns, "ref_logprobs"))
    good = np.array([c["desirable"] != 0 for c in columns])
    return float(np.mean(oracles.kto(gains, 0.0, good, here.mean(), bad_weight=1.5)[0]))


def positions(oracle: Callable[..., tuple[Any, Any]], name: str) -> Callable[..., float]:
    """The sum over positions of an oracle over candidates."""

    def total(columns: Columns, rows: Rows, at: Rows) -> float:
        return sum(oracle(r, c[name])[0].sum() for c, r in zip(columns, rows, strict=True))

    return total


POLICY = ("logprobs", "advantages")
PREFERENCE: dict[str, Any] = {"columns": ("weights", "ref_logprobs")}
TEACHER: dict[str, Any] = {"columns": ("teacher_logprobs",), "candidates": 3}
LABELLED: dict[str, Any] = {"columns": ("weights", "ref_logprobs", "desirable")}


def renormalised(oracle: Callable[..., Any]) -> Callable[..., Any]:
    return lambda student, teacher: oracle(student, teacher, True)


SPECIMENS = {
    "cross_entropy": Specimen(objectives.cross_entropy(), cross_entropy),
    "importance_sampling": Specimen(
        objectives.importance_sampling(), tokens(oracles.importance_sampling, *POLICY)
    ),
    "ppo": Specimen(objectives.ppo(), tokens(oracles.ppo, *POLICY)),
    "cispo": Specimen(objectives.cispo(), linear(oracles.cispo, *POLICY)),
    "dro": Specimen(objectives.dro(), tokens(oracles.dro, *POLICY)),
    "dual_clip_ppo": Specimen(objectives.dual_clip_ppo(), tokens(oracles.dual_clip_ppo, *POLICY)),
    "dppo": Specimen(objectives.dppo(), tokens(oracles.dppo, *POLICY)),
    "truncated_importance_sampling": Specimen(
        objectives.truncated_importance_sampling(),
        linear(oracles.truncated_importance_sampling, *POLICY),
    ),
    "gspo": Specimen(
        objectives.gspo(clip_low_threshold=BOUNDS[0], clip_high_threshold=BOUNDS[1]), gspo
    ),
    "kl_k2": Specimen(objectives.kl_k2(), tokens(oracles.kl_k2, "ref_logprobs")),
    "kl_k3": Specimen(objectives.kl_k3(), tokens(oracles.kl_k3, "ref_logprobs")),
    "l2_to_reference": Specimen(
        objectives.l2_to_reference(), tokens(oracles.l2_to_reference, "ref_logprobs")
    ),
    "sampled_entropy": Specimen(objectives.sampled_entropy(), tokens(oracles.sampled_entropy)),
    "bradley_terry": Specimen(
        objectives.bradley_terry(), pairs(oracles.bradley_terry), 2, False, PREFERENCE
    ),
    "dpo": Specimen(
        objectives.dpo(label_smoothing=0.1),
        pairs(lambda *s: oracles.dpo(*s, smoothing=0.1), reference=True),
        2,
        False,
        PREFERENCE,
    ),
    "ipo": Specimen(objectives.ipo(), pairs(oracles.ipo, reference=True), 2, False, PREFERENCE),
    "simpo": Specimen(objectives.simpo(), pairs(oracles.simpo, lengths=True), 2, False, PREFERENCE),
    "orpo": Specimen(objectives.orpo(), pairs(oracles.orpo, lengths=True), 2, False, PREFERENCE),
    "kto": Specimen(objectives.kto(undesirable_weight=1.5), kto, 1, False, LABELLED),
    "distillation_forward_kl": Specimen(
        objectives.distillation_forward_kl(),
        positions(oracles.distillation_forward_kl, "teacher_logprobs"),
        batches=TEACHER,
    ),
    "distillation_reverse_kl": Specimen(
        objectives.distillation_reverse_kl(renormalise=True),
        positions(renormalised(oracles.distillation_reverse_kl), "teacher_logprobs"),
        batches=TEACHER,
    ),
    "brier_score": Specimen(
        objectives.brier_score(),
        positions(oracles.brier_score, "outcomes"),
        batches={"columns": ("outcomes",), "candidates": 3},
    ),
}

GROUP: dict[str, Any] = {"columns": ("logprobs", "advantages", "weights", "ref_logprobs")}

# These are held against differences of themselves; their values, against the original
# implementations, in tests/losses/test_golden.py.
SPECIMENS |= {
    name: Specimen(getattr(objectives, name)(), None, 2, False, PREFERENCE)
    for name in (
        "length_normalised_dpo",
        "robust_dpo",
        "rpo",
        "f_dpo",
        "hinge",
        "exo_pair",
        "discopop",
        "apo_zero",
        "apo_down",
        "nca_pair",
        "bco_pair",
        "sppo",
        "alphapo",
        "cpo",
        "slic",
    )
}
SPECIMENS |= {
    "ipo_per_token": Specimen(objectives.ipo(per_token=True), None, 2, False, PREFERENCE),
    "bco": Specimen(objectives.bco(reward_shift=0.1), None, 1, False, LABELLED),
    "plackett_luce": Specimen(objectives.plackett_luce(group_size=3), None, 3, False, PREFERENCE),
    "dapo": Specimen(objectives.dapo(), None, sums=False),
    "sapo": Specimen(objectives.sapo(), None, sums=False),
    "dppo_kl": Specimen(objectives.dppo_kl(), None),
    "gmpo": Specimen(objectives.gmpo(aggregation="sequence_sum"), None, sums=False),
    "masked_importance_sampling": Specimen(
        objectives.masked_importance_sampling(),
        linear(oracles.masked_importance_sampling, *POLICY),
    ),
    "vespo": Specimen(objectives.vespo(), linear(oracles.vespo, *POLICY)),
    "kl_abs": Specimen(objectives.kl_abs(), None),
    "kl_k3_corrected": Specimen(objectives.kl_k3_corrected(), None, batches=GROUP),
    "unlikelihood": Specimen(objectives.unlikelihood(), None),
    "generalised_jsd": Specimen(objectives.generalised_jsd(), None, batches=TEACHER),
}
