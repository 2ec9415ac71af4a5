"""A function that mixes tokens is refused, and one that does not is applied."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mintjax import Datum, ModelInput, Ragged, objectives, value_and_logprob_grads

ROWS = [np.array([0.5, 2.0, 3.0], np.float32), np.array([-1.0, 4.0], np.float32)]
PAIRS = [np.stack([row, 2 * row], axis=1) for row in ROWS]


@pytest.mark.parametrize(
    "mixing",
    [
        jax.nn.softmax,
        jax.nn.log_softmax,
        jnp.sort,
        jnp.flip,
        lambda t: t - t.max(),
        lambda t: t / t.sum(-1, keepdims=True),
        lambda t: t - t.mean(0, keepdims=True),
        lambda t: jnp.cumsum(t, axis=1),
        lambda t: jnp.roll(t, 1, axis=-1),
        lambda t: jnp.concatenate([t[:, 1:], t[:, :1]], axis=1),
        lambda t: jnp.broadcast_to(jnp.argmax(t), t.shape),
        jax.jit(lambda t: t - jnp.median(t)),
        jax.checkpoint(lambda t: t * jnp.prod(t)),
    ],
)
@pytest.mark.parametrize("compiled", [False, True])
def test_a_function_that_mixes_tokens_is_refused(mixing, compiled):
    def applied(x):
        return x.map(mixing).total()

    for _ in range(2):
        with pytest.raises(TypeError, match=r"treats every token by itself.*along the tokens"):
            (jax.jit(applied) if compiled else applied)(Ragged.from_rows(ROWS))


@pytest.mark.parametrize(
    "apart",
    [
        jax.nn.softmax,
        jnp.sort,
        lambda t: t - t.max(-1, keepdims=True),
        lambda t: jnp.cumsum(t, axis=-1),
        lambda t: jnp.concatenate([t[..., 1:], t[..., :1]], axis=-1),
        lambda t: t.sum(-1),
        np.exp,
    ],
)
def test_candidates_of_a_token_may_be_mixed(apart):
    found = Ragged.from_rows(PAIRS).map(apart).to_rows()
    for one, pairs in zip(found, PAIRS, strict=True):
        np.testing.assert_allclose(one, apart(jnp.asarray(pairs)), rtol=1e-6)


def test_a_function_that_suits_candidates_is_not_taken_to_suit_tokens():
    Ragged.from_rows(PAIRS).map(jax.nn.softmax)
    with pytest.raises(TypeError, match="along the tokens"):
        Ragged.from_rows(ROWS).map(jax.nn.softmax)


def centred(target_logprobs, logprobs, advantages, *, where=None):
    return target_logprobs.mean() - target_logprobs


@pytest.mark.parametrize("weights", [{}, {"weights": [1.0, 0.0]}])
def test_a_policy_loss_that_mixes_tokens_is_refused(weights):
    columns = {"target_tokens": [1, 2], "logprobs": [-1.0, -1.0], "advantages": [1.0, 1.0]}
    data = [Datum(ModelInput.from_ints([1, 2]), {**columns, **weights})]
    rows = [np.array([-1.0, -2.0], np.float32)]
    with pytest.raises(TypeError, match=r"along the tokens.*objectives.batch_policy"):
        value_and_logprob_grads(objectives.policy(centred)(), data, rows)
    value_and_logprob_grads(objectives.batch_policy(centred)(), data, rows)
