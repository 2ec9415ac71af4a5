"""The equation numbers that docstrings cite, and where each was confirmed."""

from __future__ import annotations

import re
from dataclasses import dataclass

MARK = "(equation number unconfirmed)"
"""Follows a number that is in none of the places of :data:`CONFIRMED`."""

CONFIRMED: dict[str, dict[str, str]] = {
    "Proximal Policy Optimization Algorithms": {
        "6": "reading notes that keep the paper's numbers",
        "7": "comments of several public implementations",
    },
    "MiniMax-M1: Scaling Test-Time Compute Efficiently with Lightning Attention": {
        "4": "reading notes that keep the paper's numbers",
        "5": "reading notes that keep the paper's numbers",
    },
    "Group Sequence Policy Optimization": {
        "5": "comments of public implementations, lecture notes",
        "7": "comments of public implementations, lecture notes",
        "14": "SkyRL 0.4, ppo_utils.py; an HTML version counts one less",
        "15": "SkyRL 0.4, ppo_utils.py; an HTML version counts one less",
    },
    "Rethinking the Trust Region in LLM Reinforcement Learning": {
        "13": "SkyRL 0.4, ppo_utils.py",
        "14": "SkyRL 0.4, ppo_utils.py",
    },
    "Soft Adaptive Policy Optimization": {"5": "comments of a public implementation"},
    "The Entropy Mechanism of Reinforcement Learning for Reasoning Language Models": {
        "10": "reading notes that keep the paper's numbers",
        "11": "reading notes that keep the paper's numbers",
        "12": "reading notes that keep the paper's numbers",
    },
    "DeepSeek-V3.2: Pushing the Frontier of Open Large Language Models": {
        "9": "TRL 1.16, grpo_config.py"
    },
    "Direct Preference Optimization": {"7": "OpenRLHF, loss.py"},
    "A note on DPO with noisy preferences & relationship to IPO": {"3": "OpenRLHF, loss.py"},
    "WPO: Enhancing RLHF with Weighted Preference Optimization": {"2": "TRL 1.16, dpo_trainer.py"},
    "A General Theoretical Paradigm to Understand Learning from Human Preferences": {
        "17": "TRL 1.16, dpo_trainer.py; OpenRLHF, loss.py"
    },
    "Towards Efficient Exact Optimization of Language Model Alignment": {
        "16": "TRL 1.16, dpo_trainer.py; Liger 0.8.5, dpo_loss.py"
    },
    "Discovering Preference Optimization Algorithms with and for Large Language Models": {
        "5": "TRL 1.16, dpo_trainer.py; Liger 0.8.5, dpo_loss.py"
    },
    "Anchored Preference Optimization and Contrastive Revisions: Addressing Underspecification in "
    "Alignment": {
        "7": "TRL 1.16, dpo_trainer.py; Liger 0.8.5, dpo_loss.py",
        "8": "TRL 1.16, dpo_trainer.py; Liger 0.8.5, dpo_loss.py",
    },
    "Self-Play Preference Optimization for Language Model Alignment": {
        "4.7": "TRL 1.16, dpo_trainer.py; Liger 0.8.5, dpo_loss.py"
    },
    "Training language models to follow instructions with human feedback": {
        "1": "comments of public implementations",
        "2": "lecture notes and comments of public implementations",
    },
    "SimPO: Simple Preference Optimization with a Reference-Free Reward": {
        "6": "the sources of a public course of exercises"
    },
    "ORPO: Monolithic Preference Optimization without Reference Model": {
        "4": "tunix 0.1.7, dpo_trainer.py",
        "7": "tunix 0.1.7, dpo_trainer.py",
    },
    "Contrastive Preference Optimization: Pushing the Boundaries of LLM Performance in Machine "
    "Translation": {"3": "TRL 1.16, cpo_trainer.py"},
    "KTO: Model Alignment as Prospect Theoretic Optimization": {"7": "TRL 1.16, kto_trainer.py"},
    "High-Dimensional Continuous Control Using Generalized Advantage Estimation": {
        "16": "comments of several public implementations"
    },
    "DAPO: An Open-Source LLM Reinforcement Learning System at Scale": {
        "8": "comments of public implementations",
        "13": "TRL 1.16, other_rewards.py",
    },
    "DeepSeekMath": {
        "3": "comments of public implementations",
        "4": "comments of public implementations",
    },
    "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes": {
        "1": "TRL 1.16, gkd_trainer.py"
    },
}
"""By title of the work, the numbers of its equations, and who else cites each for the same thing.
The papers themselves could not be opened where this was checked."""


@dataclass(frozen=True, kw_only=True)
class Citation:
    """A numbered equation that a docstring cites.

    Args:
        work: the title, as the docstring has it.
        number: of the equation.
        marked: whether the docstring says that the number is unconfirmed.
        confirmed_by: where the number was confirmed; empty if nowhere.
    """

    work: str
    number: str
    marked: bool
    confirmed_by: str


def citations(source: str) -> tuple[Citation, ...]:
    """Reads the equations that a reference cites.

    Args:
        source: works with their titles in quotation marks, each followed by what is cited of it,
            such as ``eq. 5 and 7``.

    Returns:
        The equations, in their order.
    """
    found: list[Citation] = []
    pieces = re.split(r'"([^"]+)"', source)
    for work, text in zip(pieces[1::2], pieces[2::2], strict=True):
        title = work.rstrip(",")
        for group in re.finditer(r"eq\. ([\d.]*\d(?:(?:, | and )[\d.]*\d)*)", text):
            marked = text[group.end() :].lstrip().startswith(MARK)
            for number in re.split(r", | and ", group[1]):
                by = CONFIRMED.get(title, {}).get(number, "")
                found.append(Citation(work=title, number=number, marked=marked, confirmed_by=by))
    return tuple(found)
