"""What each trainer makes of the loss names: a table, not code."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Convention:
    """How one trainer serves the built-in losses.

    Args:
        trainer: its name.
        losses: the names it serves.
        ppo_clip: default ``(clip_low_threshold, clip_high_threshold)`` of ``ppo``; None if it does
            not serve the loss or does not say.
        cispo_clip: the same of ``cispo``.
        dro_beta: default ``beta`` of ``dro``; None if it does not serve the loss or does not say.
        reduction: from the losses of tokens to that of a request, whose gradient is accumulated.
        weights: what it does with ``weights`` in the losses other than ``cross_entropy``.
        metrics: the names it reports the loss under.
        source: where this is known from.
    """

    trainer: str
    losses: tuple[str, ...]
    ppo_clip: tuple[float, float] | None
    cispo_clip: tuple[float, float] | None
    dro_beta: float | None
    reduction: str
    weights: str
    metrics: tuple[str, ...]
    source: str


@dataclass(frozen=True, kw_only=True)
class Formula:
    """A loss that trainers run by name, as this package has it.

    Args:
        loss: its name.
        per_token: the loss of a token: ``lp`` its logprob, ``q`` that under the sampling policy,
            ``A`` its advantage, ``w`` its weight, ``r = exp(lp - q)``, ``sg`` a stopped gradient.
        inputs: the columns it needs beside ``target_tokens``.
        config: its hyperparameters and their defaults.
    """

    loss: str
    per_token: str
    inputs: tuple[str, ...]
    config: dict[str, float]


_SAMPLED = ("logprobs", "advantages")
_CLIP = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}

FORMULAS = (
    Formula(loss="cross_entropy", per_token="-w * lp", inputs=("weights",), config={}),
    Formula(loss="importance_sampling", per_token="-r * A", inputs=_SAMPLED, config={}),
    Formula(
        loss="ppo",
        per_token="-min(r * A, clip(r, low, high) * A)",
        inputs=_SAMPLED,
        config=_CLIP,
    ),
    Formula(
        loss="cispo", per_token="-sg(clip(r, low, high)) * lp * A", inputs=_SAMPLED, config=_CLIP
    ),
    Formula(
        loss="dro",
        per_token="-(lp * A - beta / 2 * (lp - q)**2)",
        inputs=_SAMPLED,
        config={"beta": 0.05},
    ),
)
"""The losses of :class:`Formula`."""


_FIVE = ("cross_entropy", "importance_sampling", "ppo", "cispo", "dro")

CONVENTIONS = (
    Convention(
        trainer="mintjax (embedded)",
        losses=_FIVE,
        ppo_clip=(0.8, 1.2),
        cispo_clip=(0.8, 1.2),
        dro_beta=0.05,
        reduction="sum",
        weights="mask, default ones",
        metrics=("loss:sum",),
        source="mintjax.local, which calls the functions of this package",
    ),
    Convention(
        trainer="Tinker (hosted)",
        losses=(*_FIVE, "gspo"),
        ppo_clip=(0.8, 1.2),
        cispo_clip=(0.0, 4.0),
        dro_beta=None,
        reduction="sum",
        weights="not an input",
        metrics=("loss:sum",),
        source="its documentation; older pages show 0.8 / 1.2 for cispo; beta is 0.05 in examples",
    ),
    Convention(
        trainer="MinT (hosted)",
        losses=_FIVE,
        ppo_clip=(0.8, 1.2),
        cispo_clip=None,
        dro_beta=None,
        reduction="sum",
        weights="required, a mask",
        metrics=("loss:sum",),
        source="its documentation; beta is 0.05 in examples",
    ),
    Convention(
        trainer="SkyRL, JAX backend",
        losses=("cross_entropy", "importance_sampling", "ppo", "cispo"),
        ppo_clip=(0.8, 1.2),
        cispo_clip=(0.8, 1.2),
        dro_beta=None,
        reduction="sum / max(sum(weights), 1e-9) per sequence, then mean over datums",
        weights="mask, default ones",
        metrics=(),
        source="skyrl 0.3.0; tx 0.3.0 does not serve cispo",
    ),
    Convention(
        trainer="SkyRL, train backend",
        losses=("cross_entropy", "importance_sampling", "ppo", "cispo"),
        ppo_clip=(0.8, 1.2),
        cispo_clip=(0.0, 5.0),
        dro_beta=None,
        reduction="sum",
        weights="mask, default ones",
        metrics=("total_loss:sum",),
        source="skyrl 0.3.0; it serves further losses under names of its own",
    ),
    Convention(
        trainer="TuFT",
        losses=_FIVE,
        ppo_clip=(0.9, 1.1),
        cispo_clip=(0.9, 1.1),
        dro_beta=0.01,
        reduction="sum",
        weights="ignored",
        metrics=("loss:sum",),
        source="its source code",
    ),
)
"""One row per trainer. A threshold passed in ``loss_fn_config`` overrides its default."""


def describe() -> str:
    """The built-in losses, and what each trainer makes of them, as text.

    Returns:
        A table of formulas, and one of :data:`CONVENTIONS`, in Markdown.
    """
    trainers = [("trainer", "losses", "ppo", "cispo", "dro", "reduction", "weights", "metrics")]
    trainers += [
        (
            row.trainer,
            "the five" if row.losses == _FIVE else ", ".join(row.losses),
            _range(row.ppo_clip),
            _range(row.cispo_clip),
            "-" if row.dro_beta is None else f"{row.dro_beta:g}",
            row.reduction,
            row.weights,
            ", ".join(row.metrics) or "none",
        )
        for row in CONVENTIONS
    ]
    formulas = [("loss", "per token, with r = exp(lp - q)", "inputs", "config")]
    formulas += [
        (
            row.loss,
            row.per_token,
            ", ".join(row.inputs),
            ", ".join(f"{name} {value:g}" for name, value in row.config.items()),
        )
        for row in FORMULAS
    ]
    return f"{_table(formulas)}\n\n{_table(trainers)}\n"


def _range(bounds: tuple[float, float] | None) -> str:
    return "-" if bounds is None else f"{bounds[0]:g} / {bounds[1]:g}"


def _table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])
