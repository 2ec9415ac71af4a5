"""Every loss against values that torch computed; ``make_golden.py`` computes them anew."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mintjax import losses

from . import oracles

GOLDEN = np.load(pathlib.Path(__file__).parent / "golden.npz")
IN: dict[str, Any] = {name[3:]: GOLDEN[name] for name in GOLDEN.files if name.startswith("in_")}
T, Q, A, LOW, HIGH, MASK = (
    IN[k] for k in ("target", "sampling", "advantages", "low", "high", "mask")
)
CLIP: dict[str, Any] = {"clip_low_threshold": LOW, "clip_high_threshold": HIGH}
LOG_RATIO = np.where(MASK, T, 0) - np.where(MASK, Q, 0)
FINITE = np.isfinite(LOG_RATIO) & MASK
# On a CPU, XLA takes numbers below this for 0; torch does not.
SMALLEST = np.finfo(np.float32).smallest_normal


def sequences(target: Any) -> jax.Array:
    """GSPO over the sequences of 24 tokens that the golden file holds."""
    shape = (-1, 24)
    values = losses.gspo(
        target.reshape(shape),
        Q.reshape(shape),
        A.reshape(shape),
        clip_low_threshold=0.9,
        clip_high_threshold=1.1,
        where=FINITE.reshape(shape),
    )
    return values.reshape(-1)


PER_TOKEN: dict[str, Callable[[Any], jax.Array]] = {
    "cross_entropy": lambda t: losses.cross_entropy(t, A, where=MASK),
    "importance_sampling": lambda t: losses.importance_sampling(t, Q, A, where=MASK),
    "ppo": lambda t: losses.ppo(t, Q, A, **CLIP, where=MASK),
    "cispo": lambda t: losses.cispo(t, Q, A, **CLIP, where=MASK),
    "dro": lambda t: losses.dro(t, Q, A, where=MASK),
    "dual_clip_ppo": lambda t: losses.dual_clip_ppo(t, Q, A, **CLIP, where=MASK),
    "dppo": lambda t: losses.dppo(t, Q, A, where=MASK),
    "truncated_importance_sampling": lambda t: losses.truncated_importance_sampling(
        t, Q, A, where=MASK
    ),
    "gspo": sequences,
    "kl_k1": lambda t: losses.kl_k1(t, Q, where=MASK),
    "kl_k2": lambda t: losses.kl_k2(t, Q, where=MASK),
    "kl_k3": lambda t: losses.kl_k3(t, Q, where=MASK),
    "sampled_entropy": lambda t: losses.sampled_entropy(t, where=MASK),
    "l2_to_reference": lambda t: losses.l2_to_reference(t, Q, where=MASK),
}

ORACLES: dict[str, Callable[[Any, Any, Any, Any, Any], tuple[Any, Any]]] = {
    "cross_entropy": lambda t, q, a, lo, hi: oracles.cross_entropy(t, a),
    "importance_sampling": lambda t, q, a, lo, hi: oracles.importance_sampling(t, q, a),
    "ppo": oracles.ppo,
    "cispo": oracles.cispo,
    "dro": lambda t, q, a, lo, hi: oracles.dro(t, q, a),
    "dual_clip_ppo": oracles.dual_clip_ppo,
    "dppo": lambda t, q, a, lo, hi: oracles.dppo(t, q, a),
    "truncated_importance_sampling": lambda t, q, a, lo, hi: oracles.truncated_importance_sampling(
        t, q, a
    ),
    "kl_k1": lambda t, q, a, lo, hi: oracles.kl_k1(t, q),
    "kl_k2": lambda t, q, a, lo, hi: oracles.kl_k2(t, q),
    "kl_k3": lambda t, q, a, lo, hi: oracles.kl_k3(t, q),
    "sampled_entropy": lambda t, q, a, lo, hi: oracles.sampled_entropy(t),
    "l2_to_reference": lambda t, q, a, lo, hi: oracles.l2_to_reference(t, q),
}


def value_and_slope(loss: Callable[[Any], jax.Array], at: Any) -> tuple[np.ndarray, np.ndarray]:
    """The unreduced loss, and what each number's own derivative is."""

    def both(x: Any) -> tuple[jax.Array, jax.Array]:
        value, pull = jax.vjp(loss, x)
        return value, pull(jnp.ones_like(value))[0]

    value, slope = jax.jit(both)(at)
    return np.asarray(value), np.asarray(slope)


def agree(ours: np.ndarray, expected: np.ndarray, scale: Any = 0.0) -> None:
    """Same class of every number (0, sign, inf), and 1e-6 relative where it is finite.

    ``scale`` is the size of the terms that a loss subtracts: what it cannot know better than.
    """
    expected = np.where(np.abs(expected) < SMALLEST, 0.0, expected).astype(np.float32)
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(np.isfinite(ours), finite)
    np.testing.assert_array_equal(ours[~finite], expected[~finite])
    ours, expected = ours[finite].astype(np.float64), expected[finite].astype(np.float64)
    room = 1e-6 * np.maximum(np.abs(expected), np.broadcast_to(scale, finite.shape)[finite])
    wrong = np.abs(ours - expected) > room
    assert not wrong.any(), (np.flatnonzero(finite)[wrong], ours[wrong], expected[wrong])


@pytest.mark.parametrize("name", PER_TOKEN)
def test_per_token_losses_agree_with_torch(name):
    value, slope = value_and_slope(PER_TOKEN[name], T)
    expected, expected_slope = GOLDEN[f"{name}_value"], GOLDEN[f"{name}_grad_target"]
    if name in ORACLES:  # where torch has NaN even in float64, the limit
        t, q, a = (np.where(MASK, x, 0) for x in (T, Q, A))
        limit, limit_slope = (np.where(MASK, x, 0) for x in ORACLES[name](t, q, a, LOW, HIGH))
        expected = np.where(np.isnan(expected), limit, expected)
        expected_slope = np.where(np.isnan(expected_slope), limit_slope, expected_slope)
    scale = 0.0
    if name == "dro":  # the difference of two terms
        scale = np.abs(np.where(FINITE, T, 0) * np.where(FINITE, A, 0))
    agree(value, expected, scale)
    agree(slope, expected_slope, np.where(MASK, np.abs(A), 0) if name == "dro" else 0.0)


def where_torch_has_nan(name: str) -> np.ndarray:
    """The tokens for which some value or derivative of torch in float32 is NaN."""
    return GOLDEN[f"nan_{name}_value"] | GOLDEN[f"nan_{name}_grad_target"]


OVERFLOWS = LOG_RATIO > 88.7
FORBIDDEN = MASK & np.isneginf(T)
# Where torch says NaN, and why the limit is what mintjax says instead.
LISTED = {
    # inf * 0: the ratio overflows, the advantage is 0. Loss and gradient are 0.
    "importance_sampling": OVERFLOWS & (A == 0),
    # The same; and the ratio overflows where it is clipped: the gradient is 0.
    "ppo": OVERFLOWS & (A >= 0),
    # The same; and it is bounded by the dual clip: the gradient is 0.
    "dual_clip_ppo": OVERFLOWS,
    # The same; and it overflows where the token has left the trust region: both are 0.
    "dppo": OVERFLOWS & (A >= 0),
    # 0 * -inf: a weight or an advantage of 0 on a token of probability 0. The loss is 0.
    "cross_entropy": FORBIDDEN & (A == 0),
    # The same; a coefficient of 0, because the ratio is; inf * 0, an unbounded ratio of A = 0.
    "cispo": (FORBIDDEN & ((A == 0) | (LOW == 0))) | (OVERFLOWS & (A == 0)),
    "truncated_importance_sampling": FORBIDDEN,
    # inf - inf: the quadratic term is infinite and outgrows the linear one. The loss is inf.
    "dro": FORBIDDEN & (A <= 0),
    # As ppo, for whole sequences.
    "gspo": MASK,
    # exp(inf) - inf at a token of probability 0. The loss is inf.
    "kl_k3": FORBIDDEN,
}


@pytest.mark.parametrize("name", PER_TOKEN)
def test_torch_has_nan_only_in_the_rows_that_are_listed(name):
    nan = where_torch_has_nan(name)
    listed = LISTED.get(name, np.zeros_like(MASK))
    assert not (nan & ~listed).any(), np.flatnonzero(nan & ~listed)
    value, slope = value_and_slope(PER_TOKEN[name], T)
    assert not np.isnan(value).any()
    assert not np.isnan(slope).any()


C, R, REF_C, REF_R, N_C, N_R = (IN[k] for k in ("c", "r", "ref_c", "ref_r", "n_c", "n_r"))

PER_PAIR: dict[str, Callable[[Any, Any], jax.Array]] = {
    "bradley_terry": losses.bradley_terry,
    "dpo": lambda c, r: losses.dpo(c, r, REF_C, REF_R, label_smoothing=0.1),
    "ipo": lambda c, r: losses.ipo(c, r, REF_C, REF_R, beta=0.125),
    "simpo": lambda c, r: losses.simpo(c, r, N_C, N_R),
    "orpo": lambda c, r: losses.orpo(c, r, N_C, N_R),
    "kto": lambda c, r: losses.kto(c, REF_C, IN["good"], 3.0, undesirable_weight=1.5) + 0 * r,
}


@pytest.mark.parametrize("name", PER_PAIR)
def test_pair_losses_agree_with_torch(name):
    def both(c: Any, r: Any) -> Any:
        value, pull = jax.vjp(PER_PAIR[name], c, r)
        return value, *pull(jnp.ones_like(value))

    value, slope_c, slope_r = map(np.asarray, jax.jit(both)(C, R))
    # Margins are differences of scores of up to some hundred nats, each known to 6e-8 of itself;
    # through the exponential in a sigmoid that is what its result can be off by.
    size = np.abs(C) + np.abs(R) + np.abs(REF_C) + np.abs(REF_R)
    logits_off = {"bradley_terry": 0.0, "dpo": 0.1, "ipo": 0.0, "simpo": 2.0, "orpo": 1.0}
    amplified = 1 + 0.2 * logits_off.get(name, 0.1) * size
    floor = {"dpo": 0.01}  # two labels' gradients, of 0.01 at most, pull against each other
    for ours, key in ((value, "value"), (slope_c, "grad_c"), (slope_r, "grad_r")):
        expected = GOLDEN[f"{name}_{key}"]
        agree(ours, expected, np.maximum(np.abs(expected), floor.get(name, 0.0)) * amplified)


FORBIDDEN_ANSWERS = {  # loss, and derivatives with respect to both scores
    "bradley_terry": (losses.bradley_terry, 0.0, np.inf),
    "dpo": (lambda c, r: losses.dpo(c, r, -1.0, -2.0), 0.0, np.inf),
    "simpo": (lambda c, r: losses.simpo(c, r, 3.0, 4.0), 0.0, np.inf),
    "orpo": (lambda c, r: losses.orpo(c, r, 1.0, 1.0), 1.0, np.inf),
}


@pytest.mark.parametrize("name", FORBIDDEN_ANSWERS)
def test_an_answer_of_probability_zero_loses_for_certain(name):
    loss, won, lost = FORBIDDEN_ANSWERS[name]
    with jax.debug_nans(True):
        value, grads = jax.value_and_grad(loss, argnums=(0, 1))(-1.0, -np.inf)
        assert value == won  # the rejected answer: nothing more to gain from it
        assert grads[1] == 0
        value, grads = jax.value_and_grad(loss, argnums=(0, 1))(-np.inf, -1.0)
        assert value == lost
        assert np.isfinite(grads).all()
        assert grads[0] < 0


STUDENT, TEACHER, OUTCOMES = IN["student"], IN["teacher"], IN["outcomes"]

PER_POSITION: dict[str, tuple[Callable[[Any], jax.Array], Callable[[], tuple[Any, Any]]]] = {
    "distillation_forward_kl": (
        lambda s: losses.distillation_forward_kl(s, TEACHER),
        lambda: oracles.distillation_forward_kl(STUDENT, TEACHER),
    ),
    "distillation_forward_kl_renormalised": (
        lambda s: losses.distillation_forward_kl(s, TEACHER, renormalise=True),
        lambda: oracles.distillation_forward_kl(STUDENT, TEACHER, True),
    ),
    "distillation_reverse_kl": (
        lambda s: losses.distillation_reverse_kl(s, TEACHER),
        lambda: oracles.distillation_reverse_kl(STUDENT, TEACHER),
    ),
    "distillation_reverse_kl_renormalised": (
        lambda s: losses.distillation_reverse_kl(s, TEACHER, renormalise=True),
        lambda: oracles.distillation_reverse_kl(STUDENT, TEACHER, True),
    ),
    "brier_score": (
        lambda s: losses.brier_score(s, OUTCOMES),
        lambda: oracles.brier_score(STUDENT, OUTCOMES),
    ),
}


@pytest.mark.parametrize("name", PER_POSITION)
def test_candidate_losses_agree_with_torch(name):
    loss, oracle = PER_POSITION[name]
    value, slope = value_and_slope(loss, STUDENT)
    limit, limit_slope = oracle()
    expected, expected_slope = GOLDEN[f"{name}_value"], GOLDEN[f"{name}_grad_student"]
    expected = np.where(np.isnan(expected), limit, expected)
    expected_slope = np.where(np.isnan(expected_slope), limit_slope, expected_slope)
    agree(value, expected, 4.0)  # a sum of four terms of either sign
    defined = np.isfinite(expected)  # an infinite loss has no gradient to agree on
    agree(slope[defined], expected_slope[defined], 2.0)
