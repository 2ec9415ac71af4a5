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
    Formula(
        loss="gspo",
        per_token="-min(r_t * A, clip(r_t, low, high) * A) with "
        "r_t = exp(mean_t(sg(lp) - q) + lp - sg(lp)), the mean over the sequence",
        inputs=_SAMPLED,
        config={"clip_low_threshold": 0.9997, "clip_high_threshold": 1.0004},
    ),
)
"""The losses of :class:`Formula`: all that the embedded trainer runs by name."""


FIVE = ("cross_entropy", "importance_sampling", "ppo", "cispo", "dro")

CONVENTIONS = (
    Convention(
        trainer="mintjax (embedded)",
        losses=(*FIVE, "gspo"),
        ppo_clip=(0.8, 1.2),
        cispo_clip=(0.8, 1.2),
        dro_beta=0.05,
        reduction="sum",
        weights="mask, default ones; in gspo without tokens of neither logprob nor advantage",
        metrics=("loss:sum",),
        source="mintjax.local, which calls the functions of this package",
    ),
    Convention(
        trainer="Tinker (hosted)",
        losses=(*FIVE, "gspo"),
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
        losses=FIVE,
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
        losses=("cross_entropy", "importance_sampling", "ppo", "cispo", "gspo", "dppo"),
        ppo_clip=(0.8, 1.2),
        cispo_clip=(0.0, 5.0),
        dro_beta=None,
        reduction="sum",
        weights="mask, default ones",
        metrics=("total_loss:sum",),
        source="skyrl 0.4.0; gspo has the bounds of ppo, and dppo the thresholds delta_low and "
        "delta_high, 0.2; thresholds of cispo are dropped",
    ),
    Convention(
        trainer="TuFT",
        losses=FIVE,
        ppo_clip=(0.9, 1.1),
        cispo_clip=(0.9, 1.1),
        dro_beta=0.01,
        reduction="sum",
        weights="ignored",
        metrics=("loss:sum",),
        source="its source code",
    ),
    Convention(
        trainer="Hatchery",
        losses=("cross_entropy", "importance_sampling", "ppo", "cispo", "dapo", "orpo"),
        ppo_clip=(0.8, 1.2),
        cispo_clip=(0.0, 1.2),
        dro_beta=None,
        reduction="sum(w * loss) / max(sum(w), 1) per request",
        weights="factors, default ones",
        metrics=("loss:mean",),
        source="hatchery-core 0.3.0; what it calls gspo clips ratios of tokens, and its grpo is "
        "ppo with 0.001 times a KL",
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
        about="Defaults of hyperparameters",
        ours="those of the papers, or of the trainers that serve the loss: see each loss",
        others={
            "TRL": "SimPO: gamma 0.5, beta 0.1; AlphaPO: alpha 0; length-normalised DPO and SPPO: "
            "beta 0.1; robust DPO: smoothing 0; GKD: temperature 0.9; dual clip: off",
            "verl": "gspo as ppo, 0.8 and 1.2; DPPO: 0.2, ratios truncated at 3; KL-Cov: 0.1 times "
            "the penalty",
            "SkyRL": "CISPO: 0 and 5; gspo as ppo; DPPO: 0.2; KL-Cov: a share of 0.2",
            "TuFT": "ppo and cispo: 0.9 and 1.1; dro: beta 0.01",
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
            "StableReinforce": "within log 1e-3 and log 1e3: stable_reinforce",
            "TRL": "none, but in VESPO",
            "k3 in verl, SkyRL, OpenRLHF": "the estimate at most 10",
            "GSPO in verl, SkyRL, tunix": "the log-ratio at most 10",
        },
    ),
    Difference(
        about="Rounding in float32 on a CPU",
        ours="XLA's exponential, off by up to 1.00 units in the last place: by 0.44 more than "
        "torch's, and so are importance_sampling, ppo, sapo, dpo and apo_zero at most; the other "
        "losses that were compared round no worse than torch's",
        others={
            "torch": "its exponential is off by up to 0.57",
            "NumPy, which evaluates loops over rows": "its exponential is off by up to 2.4",
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
        others={
            "TRL": "k3 times the importance ratio by default (kl_k3_corrected), or k3 alone",
            "verl": "k3 (low_var_kl) by default, with its own gradient; k3+ is straight-through",
        },
    ),
    Difference(
        about="beta of the generalised JSD at its ends",
        ours="0 is the forward KL, 1 the reverse KL",
        others={"TRL": "the same", "Liger": "the other way round"},
    ),
    Difference(
        about="Temperature in ratios",
        ours="none, because the logprob of one token does not tell what it is at another "
        "temperature: that needs all logits. Ratios are right where both logprobs are of one "
        "temperature; sample at 1 if the trainer computes logprobs at 1. Candidates can be "
        "rescaled: generalised_jsd",
        others={"TRL, verl, tunix": "divide logits by the temperature before they take logprobs"},
    ),
    Difference(
        about="The reference of TR-DPO",
        ours="dpo, whose ref_logprobs column you take anew every so many steps, by a forward pass "
        "of the model as it is then",
        others={"TRL": "sync_ref_model blends or replaces the reference model"},
    ),
)
"""The points on which implementations differ, and what this package does."""
