"""Losses against the implementations that others publish.

``make_originals.py`` ran TRL, verl, SkyRL, Liger and the Tinker cookbook, and
``make_jax_originals.py`` tunix and rlax, in float64 where they can, on 50 ragged batches of each
kind, the last of which are extreme. Ours are held to them in float64 to the last digits, and in
float32.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mintjax import losses

from ..by_numpy import evaluate
from ..examples import some

HERE = pathlib.Path(__file__).parent
GOLDEN: dict[str, Any] = {
    **np.load(HERE / "originals.npz"),
    **np.load(HERE / "jax_originals.npz"),
}


def inputs(kind: str) -> dict[str, Any]:
    """The batches of one kind."""
    head = f"in_{kind}_"
    return {name[len(head) :]: GOLDEN[name] for name in GOLDEN if name.startswith(head)}


PAIRS, TOKENS, CANDIDATES, REWARDS = map(inputs, ("pair", "token", "candidate", "reward"))


def mean_of_pairs(loss: Callable[..., Any], *needs: str, **settings: Any) -> Callable[..., Any]:
    """The mean loss of each batch, of scores, references or lengths."""

    def value(scores: Any) -> Any:
        mask = PAIRS["mask"]
        known = {
            "ref": np.where(mask, PAIRS["ref"], 0).astype(np.float64).sum(-1),
            "lengths": mask.sum(-1),
        }
        known["log_weights"] = jax.lax.stop_gradient(scores) / known["lengths"]
        args = [scores[:, :3], scores[:, 3:]]
        for need in needs:
            name, _, half = need.partition(":")
            part = jnp.asarray(known[name]).astype(scores.dtype)
            args += [part[:, :3]] if half else [part[:, :3], part[:, 3:]]
        return loss(*args, **settings).mean(1)

    return value


def mean_scores(loss: Callable[..., Any], **settings: Any) -> Callable[..., Any]:
    """The mean loss of each batch, of mean log-ratios per token."""

    def value(scores: Any) -> Any:
        lengths = PAIRS["mask"].sum(-1)
        ref = np.where(PAIRS["mask"], PAIRS["ref"], 0).astype(np.float64).sum(-1) / lengths
        means, ref = scores / lengths, jnp.asarray(ref).astype(scores.dtype)
        return loss(means[:, :3], means[:, 3:], ref[:, :3], ref[:, 3:], **settings).mean(1)

    return value


def kto(scores: Any) -> Any:
    """KTO of all six answers of a batch."""
    ref = np.where(PAIRS["mask"], PAIRS["ref"], 0).astype(np.float64).sum(-1)
    ref = jnp.asarray(ref).astype(scores.dtype)
    return losses.kto(scores, ref, PAIRS["label"], 0.0, undesirable_weight=1.5).mean(1)


def cpo(**settings: Any) -> Callable[..., Any]:
    """CPO without its likelihood."""
    return mean_of_pairs(losses.cpo, "lengths:chosen", nll_weight=0.0, **settings)


REF = ("ref",)
PAIRWISE: dict[str, Callable[[Any], Any]] = {
    "trl_sigmoid": mean_of_pairs(losses.dpo, *REF),
    "trl_beta_0": mean_of_pairs(losses.dpo, *REF, beta=0.0),
    "cookbook_dpo": mean_of_pairs(losses.dpo, *REF),
    "trl_hinge": mean_of_pairs(losses.hinge, *REF),
    "trl_ipo": mean_scores(losses.ipo),
    "trl_nca_pair": mean_of_pairs(losses.nca_pair, *REF),
    "trl_bco_pair": mean_of_pairs(losses.bco_pair, *REF),
    "trl_sppo_hard": mean_of_pairs(losses.sppo, *REF, beta=0.1),
    "trl_aot": mean_of_pairs(losses.aot, *REF),
    "trl_aot_smoothed": mean_of_pairs(losses.aot, *REF, label_smoothing=0.1),
    "trl_aot_unpaired": mean_of_pairs(losses.aot_unpaired, *REF),
    "trl_apo_zero": mean_of_pairs(losses.apo_zero, *REF),
    "trl_apo_down": mean_of_pairs(losses.apo_down, *REF),
    "trl_discopop": mean_of_pairs(losses.discopop, *REF),
    "trl_sigmoid_norm": mean_of_pairs(losses.length_normalised_dpo, *REF, "lengths", beta=0.1),
    "trl_exo_pair": mean_of_pairs(losses.exo_pair, *REF),
    "trl_robust": mean_of_pairs(losses.robust_dpo, *REF),
    "trl_wpo": mean_of_pairs(losses.wpo, *REF, "log_weights"),
    "trl_forward_kl": mean_of_pairs(losses.f_dpo, *REF, divergence="forward_kl"),
    "trl_js": mean_of_pairs(losses.f_dpo, *REF, divergence="js"),
    "trl_cpo": cpo(),
    "trl_cpo_smoothed": cpo(label_smoothing=0.1),
    "liger_cpo": cpo(label_smoothing=0.1),
    "trl_simpo": mean_of_pairs(losses.simpo, "lengths"),
    "liger_simpo": mean_of_pairs(losses.simpo, "lengths"),
    "trl_alphapo": mean_of_pairs(losses.alphapo, "lengths"),
    "trl_orpo": mean_of_pairs(losses.orpo, "lengths"),
    "trl_kto": kto,
    "tunix_dpo": mean_of_pairs(losses.dpo, *REF),
    "tunix_dpo_smoothed": mean_of_pairs(losses.dpo, *REF, label_smoothing=0.1),
}
# Some compute, or hold a setting, in float32 whatever they are given.
ROOM = {"trl_orpo": 1e-5, "trl_exo_pair": 1e-6}


def pull(loss: Callable[[Any], Any], at: Any) -> tuple[np.ndarray, np.ndarray]:
    """The value of each batch, and the gradient of each with respect to its numbers.

    In float32, XLA computes them, because its rounding errors count there.
    """

    def both(at: Any) -> Any:
        value, back = jax.vjp(loss, at)
        return value, back(jnp.ones_like(value))[0]

    run = partial(evaluate, both) if at.dtype == np.float64 else jax.jit(both)
    value, grad = run(at)
    return np.asarray(value, np.float64), np.asarray(grad, np.float64)


def agree(ours: np.ndarray, name: str, rtol: float, atol: float) -> None:
    """Hold our numbers against theirs, where theirs are finite and ours can be."""
    theirs = GOLDEN[name]
    known = np.isfinite(theirs) & (np.abs(theirs) < (1e300 if jax.config.jax_enable_x64 else 1e36))
    assert known.mean() > 0.5, name
    scale = np.abs(theirs[known])
    wrong = np.abs(ours[known] - theirs[known]) > atol + rtol * scale
    assert not wrong.any(), (name, ours[known][wrong][:5], theirs[known][wrong][:5])


def scores_of(dtype: Any) -> Any:
    """The sum of each answer's logprobs."""
    return jnp.asarray(np.where(PAIRS["mask"], PAIRS["lp"], 0).astype(np.float64).sum(-1), dtype)


@pytest.mark.parametrize("name", PAIRWISE)
def test_preference_losses_are_theirs(name, x64):
    rtol = ROOM.get(name, 1e-9)
    value, grad = pull(PAIRWISE[name], scores_of(np.float64))
    agree(value, f"{name}_value", rtol, rtol)
    agree(grad, f"{name}_grad", rtol, rtol)


@pytest.mark.parametrize("name", some(PAIRWISE, 3))
def test_preference_losses_are_theirs_in_float32(name):
    # A score of 100 nats is known to 4e-6, and so is what is linear in it.
    value, grad = pull(PAIRWISE[name], scores_of(np.float32))
    agree(value, f"{name}_value", 5e-5, 2e-5)
    agree(grad, f"{name}_grad", 5e-5, 2e-5)


def tokens(loss: Callable[..., Any], mean: Callable[..., Any] = jnp.sum) -> Callable[..., Any]:
    """A loss of ``(lp, q, A, where)``, reduced."""

    def value(lp: Any, q: Any, a: Any, ref: Any, where: Any) -> Any:
        values = loss(lp, q, a, where=where)
        return mean(values) if mean is jnp.sum else mean(values, where=where)

    return value


def penalty(loss: Callable[..., Any]) -> Callable[..., Any]:
    """A loss of ``(lp, ref, where)``, summed."""
    return lambda lp, q, a, ref, where: loss(lp, ref, where=where).sum()


def with_kl(loss: Callable[..., Any]) -> Callable[..., Any]:
    """PPO with a penalty of 0.1, over the mean of tokens."""

    def value(lp: Any, q: Any, a: Any, ref: Any, where: Any) -> Any:
        values = losses.ppo(lp, q, a, where=where) + 0.1 * loss(lp, ref, q, where=where)
        return losses.token_mean(values, where=where)

    return value


def off_policy(lp: Any, q: Any, a: Any, ref: Any, where: Any) -> Any:
    """PPO on the sequences that are kept."""
    kept = losses.off_policy_mask(lp, q, a, where=where)
    return losses.token_mean(losses.ppo(lp, q, a, where=kept), where=where)


def k3(lp: Any, ref: Any, q: Any, where: Any) -> Any:
    """The estimator, whoever sampled."""
    return losses.kl_k3(lp, ref, where=where)


def clip_cov(lp: Any, q: Any, a: Any, where: Any) -> Any:
    """All that may be chosen is."""
    return losses.clip_cov(lp, q, a, 0.5, covariance_low=0.0, share=1.0, where=where)


def gpg(lp: Any, q: Any, a: Any, where: Any) -> Any:
    """REINFORCE."""
    return losses.cross_entropy(lp, a, where=where)


def rows(loss: Callable[..., Any]) -> Callable[..., Any]:
    """A loss of whole sequences, over their mean."""
    return lambda lp, q, a, ref, where: loss(lp, q, a, where=where).mean()


def capped_vespo(lp: Any, q: Any, a: Any, where: Any) -> Any:
    """VESPO of log-ratios that are held within 20 per token, as TRL has it."""
    held = jnp.clip(jax.lax.stop_gradient(lp - q), -20, 20)
    return losses.vespo(lp, jax.lax.stop_gradient(lp) - held, a, where=where)


TIGHT: dict[str, Any] = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}
LOG: dict[str, Any] = {
    "clip_low_threshold": float(np.exp(-0.4)),
    "clip_high_threshold": float(np.exp(0.4)),
}
upper_only = partial(losses.cispo, clip_low_threshold=0.0, clip_high_threshold=1.2)
gspo = partial(losses.gspo, **TIGHT)
dppo, dppo_kl = (partial(f, divergence_threshold=0.05) for f in (losses.dppo, losses.dppo_kl))
dual = losses.dual_clip_ppo
POLICY: dict[str, Callable[..., Any]] = {
    "trl_grpo": tokens(losses.ppo, losses.sequence_mean),
    "trl_grpo_far": tokens(losses.ppo, losses.sequence_mean),
    "trl_bnpo": tokens(losses.ppo, losses.token_mean),
    "trl_dr_grpo": tokens(losses.ppo, lambda v, where: losses.fixed_length_mean(v, 20)),
    "trl_dapo": tokens(losses.dapo, losses.token_mean),
    "trl_dual": tokens(dual, losses.token_mean),
    "trl_cispo": tokens(upper_only, losses.token_mean),
    "trl_gspo": tokens(gspo, losses.sequence_mean),
    "trl_luspo": rows(partial(losses.luspo, **TIGHT)),
    "trl_sapo": tokens(losses.sapo, losses.sequence_mean),
    "trl_sapo_far": tokens(losses.sapo, losses.sequence_mean),
    "trl_vespo": tokens(losses.vespo, losses.token_mean),
    "trl_vespo_far": tokens(capped_vespo, losses.token_mean),
    "trl_off_policy": off_policy,
    "trl_kl": with_kl(k3),
    "trl_kl_corrected": with_kl(losses.kl_k3_corrected),
    "verl_vanilla": tokens(dual),
    "verl_dppo_tv": tokens(dppo),
    "verl_dppo_kl": tokens(dppo_kl),
    "verl_gspo": tokens(gspo),
    "verl_sapo": tokens(losses.sapo, losses.sequence_mean),
    "verl_gpg": tokens(gpg),
    "verl_clip_cov": tokens(clip_cov),
    "verl_kl_cov": tokens(partial(losses.kl_cov, share=0.2)),
    "verl_geo_mean": rows(partial(losses.gmpo, **LOG)),
    "verl_dro": tokens(losses.dro),
    "verl_cispo": tokens(losses.cispo),
    "verl_token_mean": tokens(dual, losses.token_mean),
    "verl_seq_mean_token_sum": tokens(dual, losses.sequence_sum),
    "verl_seq_mean_token_mean": tokens(dual, losses.sequence_mean),
    "verl_k1": penalty(losses.kl_k1),
    "verl_k2": penalty(losses.kl_k2),
    "verl_k3": penalty(losses.kl_k3),
    "verl_abs": penalty(losses.kl_abs),
    "verl_k3+": penalty(losses.kl_k3_straight_through),
    "skyrl_ppo": tokens(losses.ppo),
    "skyrl_sapo": tokens(losses.sapo),
    "skyrl_gspo": tokens(gspo),
    "skyrl_cispo": tokens(losses.cispo),
    "skyrl_rollout_is": tokens(partial(losses.masked_importance_sampling, **TIGHT)),
    "skyrl_dppo_kl": tokens(dppo_kl),
    "skyrl_dppo_tv": tokens(dppo),
    "skyrl_dual": tokens(dual),
    "skyrl_clip_cov": tokens(clip_cov),
    "skyrl_kl_cov": tokens(partial(losses.kl_cov, share=0.2)),
    "skyrl_importance_sampling": tokens(losses.importance_sampling),
    "skyrl_cross_entropy": lambda lp, q, a, ref, where: losses.cross_entropy(
        lp, 1.0, where=where
    ).sum(),
    "skyrl_k1": penalty(losses.kl_k1),
    "skyrl_k2": penalty(losses.kl_k2),
    "skyrl_k3": penalty(losses.kl_k3),
    "skyrl_abs": penalty(losses.kl_abs),
    "skyrl_token_mean": tokens(losses.ppo, losses.token_mean),
    "skyrl_sequence_mean": tokens(losses.ppo, losses.sequence_mean),
    "skyrl_seq_mean_token_sum_norm": tokens(
        losses.ppo, lambda v, where: losses.fixed_length_mean(v, 20, where=where)
    ),
    "skyrl_prompt_mean": tokens(losses.ppo, lambda v, where: losses.prompt_mean(v, 2, where=where)),
    "tunix_ppo": tokens(losses.ppo, losses.token_mean),
    "tunix_dual": tokens(dual, losses.token_mean),
    "tunix_grpo": tokens(losses.ppo, losses.sequence_mean),
    "tunix_dapo": tokens(losses.dapo, losses.token_mean),
    "tunix_sequence_sum": tokens(losses.ppo, losses.sequence_sum),
    "tunix_gspo": tokens(gspo, losses.sequence_mean),
    "tunix_k1": penalty(losses.kl_k1),
    "tunix_k2": penalty(losses.kl_k2),
    "tunix_k3": penalty(losses.kl_k3),
    "rlax_ppo": tokens(losses.ppo),
    "rlax_policy_gradient": tokens(gpg),
}
# The loss is -sg(r) * log p * A there and -r * A here: another value, the same gradient.
SAME_GRADIENT = {"verl_dppo_tv", "verl_dppo_kl"}
IN_FLOAT32 = ("skyrl", "tunix")


def policy(name: str, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """Value and gradient of each batch."""
    sampler = "far" if name.endswith("_far") else "sampling"
    others = [jnp.asarray(TOKENS[k], dtype) for k in (sampler, "advantages", "ref")]
    where = jnp.asarray(TOKENS["mask"])

    def value(lp: Any) -> Any:
        return jax.vmap(POLICY[name])(lp, *others, where)

    return pull(value, jnp.asarray(TOKENS["lp"], dtype))


def hold(name: str, dtype: Any, tolerance: float) -> None:
    """Compare value and gradient, in the batches where the choice of tokens is unique."""
    value, grad = policy(name, dtype)
    if name.endswith("_kl_cov"):  # all covariances are 0 where all advantages are
        tied = (TOKENS["advantages"] == 0).all((1, 2)) | (TOKENS["mask"].sum((1, 2)) <= 4)
        value, grad = (
            np.where(tied.reshape(-1, *(1,) * (ours.ndim - 1)), GOLDEN[f"{name}_{key}"], ours)
            for key, ours in (("value", value), ("grad", grad))
        )
    if name not in SAME_GRADIENT:
        agree(value, f"{name}_value", tolerance, tolerance)
    agree(grad, f"{name}_grad", tolerance, tolerance)


@pytest.mark.parametrize("name", POLICY)
def test_policy_losses_are_theirs(name, x64):
    # verl adds 1e-8 to lengths; the temperatures of SAPO are float32, and so are SkyRL's ratios
    # and all of tunix.
    lengths = {"verl_geo_mean": 1e-7, "verl_dppo_kl": 1e-7, "verl_seq_mean_token_mean": 1e-7}
    single = name.startswith(IN_FLOAT32) or "sapo" in name
    hold(name, np.float64, 1e-6 if single else lengths.get(name, 1e-9))


@pytest.mark.parametrize("name", some(POLICY, 3))
def test_policy_losses_are_theirs_in_float32(name):
    hold(name, np.float32, 5e-5)


GKD = {
    "trl_gkd_0": {"beta": 0.0},
    "trl_gkd_half": {"beta": 0.5},
    "trl_gkd_0.9_hot": {"beta": 0.9, "temperature": 2.0},
    "trl_gkd_1": {"beta": 1.0},
    "tunix_logits": {"beta": 0.0},
    "tunix_logits_hot": {"beta": 0.0, "temperature": 2.0},
}


@pytest.mark.parametrize("name", GKD)
def test_divergences_over_candidates_are_theirs(name, x64):
    def value(lp: Any) -> Any:
        teacher = CANDIDATES["teacher"].astype(np.float64)
        return losses.generalised_jsd(lp, teacher, **GKD[name]).sum((1, 2))

    ours, grad = pull(value, jnp.asarray(CANDIDATES["lp"], np.float64))
    factor = 4.0 if name == "tunix_logits_hot" else 1.0  # the square of the temperature
    room = 1e-5 if name.startswith(IN_FLOAT32) else 1e-9
    agree(factor * ours, f"{name}_value", room, room)
    agree(factor * grad, f"{name}_grad", room, room)


def last_token(values: Any) -> Any:
    """Rewards of answers, as [50, 8]."""
    return jnp.reshape(values, (50, 8))


WHITE = jax.vmap(lambda v, m: losses.whiten(v, where=m))
ADVANTAGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "verl_grpo": lambda t: last_token(losses.grpo(t["rewards"])),
    "verl_grpo_unscaled": lambda t: last_token(losses.dr_grpo(t["rewards"])),
    "verl_rloo": lambda t: last_token(losses.rloo(t["rewards"])),
    "verl_pass_at_k": lambda t: last_token(losses.pass_at_k(t["rewards"])),
    "verl_opo": lambda t: last_token(losses.opo(t["rewards"], t["lengths"].reshape(50, 2, 4))),
    "skyrl_maxrl": lambda t: last_token(losses.maxrl(t["rewards"])),
    "verl_reinforce_pp": lambda t: WHITE(
        losses.discounted_returns(t["tokens"], discount=0.9, where=t["mask"]), t["mask"]
    ),
    "verl_gae": lambda t: WHITE(
        losses.gae(t["tokens"], t["values"], discount=0.9, decay=0.8, where=t["mask"]), t["mask"]
    ),
    "skyrl_grpo": lambda t: last_token(losses.grpo(t["rewards"])),
    "skyrl_rloo": lambda t: last_token(losses.rloo(t["rewards"])),
    "tunix_grpo_advantages": lambda t: last_token(losses.grpo(t["rewards"])),
    "tunix_rloo": lambda t: last_token(losses.rloo(t["rewards"])),
    "tunix_dr_grpo": lambda t: last_token(losses.dr_grpo(t["rewards"])),
    "tunix_gae": lambda t: WHITE(
        losses.gae(t["tokens"], t["values"], discount=0.9, decay=0.8, where=t["mask"]), t["mask"]
    ),
    "rlax_gae": lambda t: losses.gae(
        t["tokens"], t["values"], discount=0.9, decay=0.8, where=t["mask"]
    ),
    "rlax_returns": lambda t: losses.discounted_returns(t["tokens"], discount=0.9, where=t["mask"]),
    "verl_rewards": lambda t: losses.kl_in_reward(t["tokens"], t["values"], -t["values"], beta=0.1),
}


@pytest.mark.parametrize("name", ADVANTAGES)
def test_advantages_are_theirs(name, x64):
    ours = evaluate(lambda: ADVANTAGES[name](REWARDS))
    # SkyRL's mean is float32; so are, here and there, the means of 250.25.
    room = 1e-5 if name in ("skyrl_maxrl", "skyrl_grpo", "tunix_gae") else 1e-9
    agree(ours.reshape(GOLDEN[name].shape), name, room, room)


def test_every_golden_number_is_held_against_ours():
    held = {*PAIRWISE, *POLICY, *GKD, *ADVANTAGES}
    there = {name.rpartition("_")[0] for name in GOLDEN if name.endswith("_value")}
    there |= {n for n in GOLDEN if not n.endswith(("_value", "_grad")) and n[:3] != "in_"}
    assert held == there
