"""All losses as a table, read from their docstrings."""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mintjax.losses._citations import Citation, citations
from mintjax.losses._conventions import CONVENTIONS

FAMILIES: dict[str, tuple[str, ...]] = {
    "served by name": ("cross_entropy", "importance_sampling", "ppo", "cispo", "dro", "gspo"),
    "policy, per token": (
        "dapo",
        "dual_clip_ppo",
        "dppo",
        "dppo_kl",
        "sapo",
        "stable_reinforce",
        "truncated_importance_sampling",
        "masked_importance_sampling",
        "clip_cov",
        "kl_cov",
    ),
    "policy, per sequence": (
        "gspo_token",
        "luspo",
        "gmpo",
        "gmpo_log_ratios",
        "vespo",
        "vespo_token",
        "importance_weights",
        "off_policy_mask",
    ),
    "preference, over a reference": (
        "dpo",
        "length_normalised_dpo",
        "robust_dpo",
        "rpo",
        "f_dpo",
        "wpo",
        "wpo_log_weight",
        "ipo",
        "hinge",
        "exo_pair",
        "discopop",
        "apo_zero",
        "apo_down",
        "nca_pair",
        "bco_pair",
        "sppo",
        "aot",
        "aot_unpaired",
    ),
    "preference, without a reference": (
        "bradley_terry",
        "plackett_luce",
        "simpo",
        "alphapo",
        "orpo",
        "cpo",
        "slic",
        "unlikelihood",
    ),
    "labelled answers": ("kto", "bco"),
    "advantages of groups": (
        "group_mean_centred",
        "rloo",
        "grpo",
        "dr_grpo",
        "maxrl",
        "opo",
        "pass_at_k",
        "remax",
        "gdpo",
        "group_varies",
    ),
    "rewards and advantages of tokens": (
        "discounted_returns",
        "gae",
        "whiten",
        "advantage_filter",
        "kl_in_reward",
        "on_policy_distillation",
        "overlong_penalty",
        "truncation_mask",
    ),
    "divergences and entropy": (
        "kl_k1",
        "kl_k2",
        "kl_k3",
        "kl_k3_straight_through",
        "kl_k3_corrected",
        "kl_abs",
        "l2_to_reference",
        "sampled_entropy",
        "entropy_bounds",
    ),
    "over candidates": (
        "distillation_forward_kl",
        "distillation_reverse_kl",
        "generalised_jsd",
        "brier_score",
    ),
    "logprobs of a model of one's own": (
        "target_logprobs",
        "fused_target_logprobs",
    ),
    "aggregations": (
        "token_mean",
        "sequence_mean",
        "sequence_sum",
        "fixed_length_mean",
        "prompt_mean",
    ),
    "for the worst": (
        "worst_group",
        "conditional_value_at_risk",
        "focal_weights",
        "focal_cross_entropy",
    ),
    "diagnostics": (
        "clipped_tokens",
        "policy_terms",
        "policy_sums",
        "policy_summary",
        "preference_sums",
        "preference_summary",
        "calibration_sums",
        "calibration_summary",
    ),
}
"""The functions of this module, by what they are for."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A function of this module, as its docstring has it.

    Args:
        name: its name.
        family: what it is for.
        summary: what it is, in one line.
        formula: its formula.
        inputs: the arrays it takes.
        settings: its hyperparameters and their defaults; ``"required"`` where there is none.
        when: when to use it, in the words of its docstring; empty where nothing is said.
        others: what other implementations do.
        source: where it is from.
        citations: the numbered equations of the source, and where each number was confirmed.
        served_by: the trainers that run it by this name.
    """

    name: str
    family: str
    summary: str
    formula: str
    inputs: tuple[str, ...]
    settings: dict[str, Any]
    when: str
    others: str
    source: str
    citations: tuple[Citation, ...]
    served_by: tuple[str, ...]


@functools.cache
def catalogue() -> tuple[Entry, ...]:
    """Lists all functions of this module, with formula, inputs, settings and source.

    Returns:
        An entry for each, by family and name.

    Example:
        >>> from mintjax import losses
        >>> next(entry.formula for entry in losses.catalogue() if entry.name == "slic")
        'max(0, margin - chosen_scores + rejected_scores)'

    Reference:
        The docstrings of this module.
    """
    losses = vars(sys.modules["mintjax.losses"])  # complete by the time that this is called
    return tuple(
        _entry(name, family, losses[name]) for family, names in FAMILIES.items() for name in names
    )


def _entry(name: str, family: str, function: Callable[..., Any]) -> Entry:
    text = inspect.getdoc(function) or ""
    body, *sections = re.split(r"^(?:Args|Returns|Raises|Example|Reference):\n", text, flags=re.M)
    source = sections[-1] if "\nReference:\n" in text else ""
    found = re.search(r"``(.+?)``", body, re.S)
    formula = " ".join(found[1].split()) if found else ""
    parameters = inspect.signature(function).parameters.values()
    settings = {
        p.name: "required" if p.default is p.empty else p.default
        for p in parameters
        if p.kind is p.KEYWORD_ONLY and p.name != "where"
    }
    return Entry(
        name=name,
        family=family,
        summary=_plain(body.partition("\n\n")[0]),
        formula=re.sub(r"^(?:loss(?:_i)?|estimate|A_i|k[123]) = ", "", formula),
        inputs=tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD),
        settings=settings,
        when=_paragraph(body, "When to use it"),
        others=_paragraph(body, "What others do"),
        source=_plain(source),
        citations=citations(_plain(source)),
        served_by=tuple(row.trainer for row in CONVENTIONS if name in row.losses),
    )


def _paragraph(body: str, heading: str) -> str:
    found = re.search(rf"^{heading}: (.+?)(?:\n\n|\Z)", body, re.S | re.M)
    text = _plain(found[1]) if found else ""
    return text[:1].upper() + text[1:]


def _plain(text: str) -> str:
    """Makes one line of a text, without the roles of reStructuredText."""
    text = re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"\1", text)
    return " ".join(text.replace("``", "").split())
