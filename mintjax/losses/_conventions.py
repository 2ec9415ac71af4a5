"""The conventions of trainers and of other implementations, as tables."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Convention:
    """The way one trainer serves the built-in losses.

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


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A point on which implementations and papers differ.

    Args:
        about: the point.
        ours: what this package does.
        others: what others do, by name.
    """

    about: str
    ours: str
    others: dict[str, str]


DIFFERENCES = (
    Difference(
        about="What a clip bound of 0.2 means",
        ours="the ratio itself: clip_low_threshold 0.8, clip_high_threshold 1.2",
        others={
            "hosted trainers, TuFT, SkyRL's JAX backend": "the ratio itself",
            "TRL, verl, SkyRL's train backend": "1 - 0.2 and 1 + 0.2",
            "CISPO in TRL and Liger": "the upper bound is the ratio itself; there is no lower one",
            "GMPO in TRL and verl": "a distance of log-ratios: exp(-0.2) and exp(0.2)",
            "DPPO in verl and SkyRL": "the divergence itself",
        },
    ),
    Difference(
        about="The slope of the clip at a bound",
        ours="1, as torch has it",
        others={"torch": "1", "jnp.clip": "1/2", "lax.clamp": "0"},
    ),
    Difference(
        about="Clamps of the log-ratio",
        ours="none; what overflows is decided on values, so that gradients stay right",
        others={
            "verl, SkyRL's train backend, OpenRLHF, tunix": "within 20",
            "TRL": "none, but in VESPO",
            "k3 in verl, SkyRL, OpenRLHF": "the estimate at most 10",
            "GSPO in verl, SkyRL, tunix": "the log-ratio at most 10",
        },
    ),
    Difference(
        about="The mean over tokens and sequences",
        ours="the sum, as trainers have it; aggregation= offers six",
        others={
            "TRL": "grpo and sapo: sequence_mean; bnpo, dapo, cispo, vespo: token_mean; dr_grpo: "
            "fixed_length; luspo: sequence_sum",
            "verl": "token-mean by default; gspo and sapo: seq-mean-token-mean",
            "SkyRL's JAX backend": "per sequence, then over datums",
        },
    ),
    Difference(
        about="A sequence that is masked whole",
        ours="is none in a mean over sequences; it counts in a fixed-length mean",
        others={
            "verl, OpenRLHF, tunix": "is none",
            "TRL, SkyRL": "counts in a mean over sequences",
            "verl's seq-mean-token-sum-norm": "is none",
        },
    ),
    Difference(
        about="The advantage of a group of one",
        ours="0, as it has nothing to compare with",
        others={"verl, SkyRL": "its raw reward"},
    ),
    Difference(
        about="GRPO's epsilon beside the standard deviation",
        ours="1e-6, and exactly 0 where the rewards agree",
        others={"verl, SkyRL, tunix": "1e-6", "TRL": "1e-4", "OpenRLHF": "1e-9"},
    ),
    Difference(
        about="The score of an answer in IPO",
        ours="the sum of log-ratios, as eq. 17 has it; per_token=True takes the mean",
        others={
            "OpenRLHF": "the sum",
            "TRL, torchtune": "the mean per token, as the authors ran it",
        },
    ),
    Difference(
        about="DPO's label smoothing",
        ours="dpo: conservative; robust_dpo: unbiased, divided by 1 - 2e",
        others={"TRL's robust, Liger's robust": "divided by 1 - 2e"},
    ),
    Difference(
        about="The likelihood in ORPO, CPO and RPO",
        ours="the mean over each chosen answer",
        others={
            "TRL": "the mean over all tokens of the batch; in ORPO and CPO prompts count too",
            "tunix": "ORPO: odds of sums, against eq. 2",
        },
    ),
    Difference(
        about="Certainty in ORPO: a mean logprob of 0",
        ours="counts as -2**-23, with the slope there",
        others={"TRL, Liger": "NaN or infinite"},
    ),
    Difference(
        about="The reference point of KTO and BCO",
        ours="an argument; the objectives estimate it from the batch",
        others={"TRL": "KTO: from mismatched answers; BCO of pairs: 0"},
    ),
    Difference(
        about="The KL estimate in the loss",
        ours="kl_k2, whose gradient is that of the KL from model to reference",
        others={"TRL": "k3, with its own gradient", "verl": "k3+ is the straight-through form"},
    ),
    Difference(
        about="beta of the generalised JSD at its ends",
        ours="0 is the forward KL, 1 the reverse KL",
        others={"TRL": "the same", "Liger": "the other way round"},
    ),
    Difference(
        about="Temperature",
        ours="none in ratios: a logprob of one token cannot be rescaled; take logprobs at the "
        "temperature that sampled. Candidates can be: generalised_jsd",
        others={"TRL, verl": "divide logits by it before the logprobs"},
    ),
    Difference(
        about="The reference of TR-DPO",
        ours="dpo, whose ref_logprobs column you take anew every so many steps",
        others={"TRL": "sync_ref_model blends or replaces the reference model"},
    ),
)
"""The points on which implementations differ, and what this package does."""


def conventions(*, trainers: bool = True) -> str:
    """Writes the page of conventions: where implementations differ, and what this package does.

    A row of it is ``point | here | elsewhere``, from :data:`DIFFERENCES`.

    Args:
        trainers: whether a table by trainer follows.

    Returns:
        Markdown: a table by point, then one by trainer, by name.

    Reference:
        TRL 1.16, verl 0.9.1, SkyRL 0.3, Liger 0.8.5 and the Tinker cookbook 0.6.1 as they were run;
        OpenRLHF, tunix, torchtune and TuFT as an earlier comparison found them.
    """
    rows = [("point", "here", "elsewhere")]
    for row in DIFFERENCES:
        elsewhere = "; ".join(f"{who}: {what}" for who, what in row.others.items())
        rows.append((row.about, row.ours, elsewhere))
    return f"{_table(rows)}\n" + (f"\n{_trainers()}\n" if trainers else "")


def describe() -> str:
    """Lists all losses and what each trainer makes of the built-in ones, as text.

    Returns:
        A table of :data:`FORMULAS`, and one of :data:`CONVENTIONS`, in Markdown; then, for each
        family, its losses with formula, inputs, source and the trainers that serve them by name.
    """
    from mintjax.losses._catalogue import FAMILIES, catalogue

    parts = [f"{_formulas()}\n\n{_trainers()}\n"]
    for family in FAMILIES:
        parts.append(f"## {family}\n")
        for entry in catalogue():
            if entry.family != family:
                continue
            lines = [entry.name, f"    {entry.formula}", f"    inputs: {', '.join(entry.inputs)}"]
            if entry.settings:
                shown = (f"{name}={value}" for name, value in entry.settings.items())
                lines.append(f"    settings: {', '.join(shown)}")
            if entry.source:
                lines.append(f"    source: {entry.source}")
            if entry.served_by:
                lines.append(f"    served by name: {'; '.join(entry.served_by)}")
            parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _trainers() -> str:
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
    return _table(trainers)


def _formulas() -> str:
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
    return _table(formulas)


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
