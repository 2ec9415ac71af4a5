"""Each law sees the bug that it is there for."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis.errors import NoSuchExample

import mintjax
from mintjax import objectives, testing

from ..examples import THOROUGH, examples
from ..objectives.specimens import SPECIMENS

LOW, HIGH = 0.8, 1.2


def columns(data: Any, logprobs: Any) -> tuple[Any, Any, Any, Any]:
    """Logprobs of model and sampler, advantages, and the mask, as Ragged."""
    return logprobs, data["logprobs"], data["advantages"], data["weights"] != 0


def surrogate(ratio: Any, advantages: Any) -> Any:
    """PPO's loss of a token."""
    held = jnp.where(ratio < LOW, LOW, jnp.where(ratio > HIGH, HIGH, ratio))
    return -jnp.minimum(ratio * advantages, held * advantages)


def sane_ratio(target: Any, sampling: Any, where: Any) -> Any:
    """The ratio, with the mask before the exponential."""
    return jnp.exp(jnp.where(where, target, 0) - jnp.where(where, sampling, 0))


@dataclasses.dataclass(frozen=True)
class ppo_with:
    """An objective: the sum of ``token(target, sampling, advantages, where)``."""

    token: Any

    def __call__(self, data: Any, logprobs: Any) -> Any:
        target, sampling, advantages, where = columns(data, logprobs)
        return target.map(self.token, sampling, advantages, where).total(where), {}


def right(target: Any, sampling: Any, advantages: Any, where: Any) -> Any:
    return surrogate(sane_ratio(target, sampling, where), jnp.where(where, advantages, 0))


def wrong_sign(target: Any, sampling: Any, advantages: Any, where: Any) -> Any:
    return -right(target, sampling, advantages, where)


def clipped_on_the_wrong_side(target: Any, sampling: Any, advantages: Any, where: Any) -> Any:
    ratio = sane_ratio(target, sampling, where)
    advantages = jnp.where(where, advantages, 0)
    held = jnp.where(ratio < LOW, LOW, jnp.where(ratio > HIGH, HIGH, ratio))
    return -jnp.maximum(ratio * advantages, held * advantages)


def masked_after_exp(target: Any, sampling: Any, advantages: Any, where: Any) -> Any:
    return jnp.where(where, surrogate(jnp.exp(target - sampling), advantages), 0)


def cispo_without_stop_gradient(target: Any, sampling: Any, advantages: Any, where: Any) -> Any:
    ratio = sane_ratio(target, sampling, where)
    held = jnp.where(ratio < LOW, LOW, jnp.where(ratio > HIGH, HIGH, ratio))
    return -held * jnp.where(where, target * jnp.where(where, advantages, 0), 0)


def mean_for_sum(data: Any, logprobs: Any) -> Any:
    loss, metrics = ppo_with(right)(data, logprobs)
    return loss / jnp.maximum(logprobs.total_count(data["weights"] != 0), 1), metrics


def depends_on_order(data: Any, logprobs: Any) -> Any:
    rows = logprobs.dot(data["weights"] != 0)
    return jnp.sum(rows * jnp.arange(1, rows.shape[0] + 1)), {}


def counts_padding(data: Any, logprobs: Any) -> Any:
    return -jnp.sum(logprobs.tiles), {}


def counts_masked_tokens(data: Any, logprobs: Any) -> Any:
    return -logprobs.total(), {}


PPO, CISPO = SPECIMENS["ppo"].reference, SPECIMENS["cispo"].reference


def gradient_against(reference: Any) -> Any:
    return lambda objective, *example: testing.check_gradient(
        objective, *example, reference=reference
    )


PLANTED = {
    "wrong sign": (ppo_with(wrong_sign), gradient_against(PPO)),
    "clip on the wrong side": (ppo_with(clipped_on_the_wrong_side), gradient_against(PPO)),
    "no stop-gradient": (ppo_with(cispo_without_stop_gradient), gradient_against(CISPO)),
    "mask after exp": (ppo_with(masked_after_exp), testing.check_finite),
    "mean for sum": (mean_for_sum, testing.check_chunk_additivity),
    "order of datums": (depends_on_order, testing.check_permutation),
    "padding": (counts_padding, testing.check_padding_invariance),
    "no mask": (counts_masked_tokens, testing.check_masked_equals_removed),
}
BATCHES = testing.batches(max_blocks=2, max_length=20)
QUICK = settings(
    derandomize=True, max_examples=60, suppress_health_check=list(HealthCheck), deadline=None
)
FIRST = settings(QUICK, phases=[Phase.generate])  # what is found is not shrunk


def breaks(law: Any, objective: Any, example: testing.Example) -> str | None:
    """What the law says, if it fails."""
    try:
        law(objective, *example)
    except testing.LawError as error:
        return str(error)
    return None


# By default one bug for each law.
SAMPLE = set(PLANTED) - (set() if THOROUGH else {"clip on the wrong side", "no stop-gradient"})


@pytest.mark.parametrize("name", sorted(SAMPLE))
def test_a_law_sees_the_planted_bug(name):
    objective, law = PLANTED[name]
    try:
        smallest = find(BATCHES, lambda e: breaks(law, objective, e) is not None, settings=QUICK)
    except NoSuchExample:
        pytest.fail(f"no law saw: {name}")
    said = breaks(law, objective, smallest)
    assert said is not None
    assert said.startswith("check_")
    assert "datum 0:" in repr(smallest)
    assert max(map(len, smallest.logprobs)) <= 8  # shrunk


@given(example=BATCHES)
@settings(max_examples=examples(6))
def test_the_laws_find_nothing_where_no_bug_is_planted(example):
    objective = RIGHT
    testing.check_finite(objective, *example)
    testing.check_gradient(objective, *example)  # without a reference, against itself
    testing.check_gradient(objective, *example, reference=PPO)
    testing.check_permutation(objective, *example)
    testing.check_padding_invariance(objective, *example)
    testing.check_masked_equals_removed(objective, *example)
    testing.check_chunk_additivity(objective, *example)


RIGHT = ppo_with(right)


@jax.custom_jvp
def half_slope(x: Any) -> Any:
    """The square, with half of its derivative."""
    return x * x


@half_slope.defjvp
def _(primals: Any, tangents: Any) -> Any:
    return half_slope(primals[0]), primals[0] * tangents[0]


def test_a_wrong_derivative_is_named_with_its_token():
    def objective(data: Any, logprobs: Any) -> Any:
        return logprobs.map(half_slope).total(), {}

    example = find(testing.batches(max_blocks=1), lambda e: True, settings=FIRST)
    with pytest.raises(testing.LawError, match=r"slope of .*datum 0, position \d+ \(logprob"):
        testing.check_gradient(objective, *example)


def test_a_kink_is_no_bug():
    example = testing.Example(*find(testing.batches(max_blocks=1), lambda e: True, settings=FIRST))
    on_policy = objectives.ppo(clip_high_threshold=1.0)
    for datum, row in zip(example.data, example.logprobs, strict=True):
        datum.loss_fn_inputs["logprobs"] = datum.loss_fn_inputs["logprobs"].from_numpy(row)
    testing.check_gradient(on_policy, *example)
    assert np.isfinite(example.logprobs[0]).all()


@jax.custom_jvp
def slope_of_the_row(x: Any) -> Any:
    """The identity, with a derivative that depends on where it stands."""
    return x


@slope_of_the_row.defjvp
def _(primals: Any, tangents: Any) -> Any:
    return primals[0], tangents[0] * jnp.arange(primals[0].size).reshape(primals[0].shape)


def test_a_gradient_that_depends_on_the_order_is_seen_where_the_loss_does_not():
    def objective(data: Any, logprobs: Any) -> Any:
        return logprobs.map(slope_of_the_row).total(), {}

    example = find(BATCHES, lambda e: len({len(row) for row in e.logprobs}) > 1, settings=FIRST)
    with pytest.raises(testing.LawError, match=r"check_permutation: the gradient is .* at datum"):
        testing.check_permutation(objective, *example)


def test_what_is_not_finite_breaks_every_law():
    def metric(data: Any, logprobs: Any) -> Any:
        return logprobs.total(), {"ratio": jnp.float32(jnp.inf)}

    def gradient(data: Any, logprobs: Any) -> Any:
        return jnp.sqrt(logprobs.total() * 0), {}

    example = find(BATCHES, lambda e: True, settings=FIRST)
    with pytest.raises(testing.LawError, match=r"check_finite: \{'ratio': inf\}"):
        testing.check_finite(metric, *example)
    for law in (testing.check_finite, testing.check_gradient, testing.check_permutation):
        with pytest.raises(testing.LawError, match=f"{law.__name__}: .*(nan|inf)"):
            law(gradient, *example)


def test_a_law_says_which_way_gave_which_number() -> None:
    datum = mintjax.Datum(mintjax.ModelInput.from_ints([1, 2]), {"target_tokens": [2, 3]})

    def first(data: Any, logprobs: Any) -> Any:
        return 3 * logprobs.sum()[0], {}

    with pytest.raises(
        testing.LawError, match=r"-3\.0 as it is and -6\.0 with the datums in another"
    ):
        testing.check_permutation(
            first, [datum, datum], [np.array([-0.5, -0.5]), np.array([-1.0, -1.0])]
        )
    with pytest.raises(
        testing.LawError, match=r"-3\.0 as one batch and -9\.0 as a sum over chunks"
    ):
        testing.check_chunk_additivity(
            first, [datum, datum], [np.array([-0.5, -0.5]), np.array([-1.0, -1.0])]
        )
