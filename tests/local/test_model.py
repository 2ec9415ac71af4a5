"""The transformer: causal, normalised, seeded, and the same with a cache as without."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mintjax.local import model
from mintjax.local.model import BASE_MODELS
from mintjax.local.tokenizer import VOCAB_SIZE
from mintjax.types import LoraConfig

NANO = BASE_MODELS["mintjax/nano"]
LENGTH = 32


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (4, LENGTH))


@pytest.fixture(scope="module")
def trained() -> model.Weights:
    """Adapters that change something: ``b`` is not zero."""
    lora = model.lora_weights(NANO, LoraConfig(4, seed=1))
    source = np.random.default_rng(2)
    return jax.tree.map(lambda leaf: leaf + source.normal(0, 0.02, leaf.shape), lora)


@pytest.fixture(scope="module")
def adapted(trained: model.Weights) -> model.Weights:
    return model.adapt(model.base_weights(NANO), trained)


logits = jax.jit(model.logits, static_argnums=0)
logprobs = jax.jit(model.logprobs, static_argnums=0)


def test_a_token_changes_nothing_before_it(adapted, tokens):
    changed = tokens.copy()
    changed[:, 20] = (changed[:, 20] + 1) % 256
    before, _ = logits(NANO, adapted, tokens)
    after, _ = logits(NANO, adapted, changed)
    np.testing.assert_array_equal(before[:, :20], after[:, :20])
    assert (np.abs(before[:, 20] - after[:, 20]).max(axis=-1) > 0.1).all()


def test_positions_matter(adapted):
    swapped = jnp.array([[1, 2, 3], [2, 1, 3]])
    first, second = logits(NANO, adapted, swapped)[0][:, 2]
    assert np.abs(first - second).max() > 1e-3


def test_reading_token_by_token_is_reading_at_once(adapted, tokens):
    expected, _ = logits(NANO, adapted, tokens)
    read, cache = logits(NANO, adapted, tokens[:, :20], model.empty_cache(NANO, 4, LENGTH))
    np.testing.assert_allclose(read, expected[:, :20], atol=1e-5)
    for position in range(20, LENGTH):
        one = tokens[:, position : position + 1]
        read, cache = logits(NANO, adapted, one, cache, position)
        np.testing.assert_allclose(read[:, 0], expected[:, position], atol=1e-5)


def test_logprobs_are_of_a_distribution(trained, tokens):
    everything = np.broadcast_to(np.arange(VOCAB_SIZE), (4, LENGTH, VOCAB_SIZE))
    log_p = logprobs(NANO, model.base_weights(NANO), trained, tokens, everything)
    np.testing.assert_allclose(np.exp(log_p).sum(axis=-1), 1, rtol=1e-5)


def test_candidates_are_targets_side_by_side(trained, tokens):
    base = model.base_weights(NANO)
    candidates = np.random.default_rng(1).integers(0, 256, (4, LENGTH, 3))
    together = logprobs(NANO, base, trained, tokens, candidates)
    for k in range(3):
        alone = logprobs(NANO, base, trained, tokens, candidates[..., k])
        np.testing.assert_array_equal(together[..., k], alone)


def test_fresh_adapters_leave_the_base_as_it_is():
    base = model.base_weights(NANO)
    adapted = model.adapt(base, model.lora_weights(NANO, LoraConfig(4)))
    jax.tree.map(np.testing.assert_array_equal, adapted, base)


def test_an_adapter_adds_its_product_times_alpha_over_rank(trained):
    base = model.base_weights(NANO)
    adapter = trained["layers"]["gate"]
    expected = base["layers"]["gate"][0] + 32 / 4 * adapter["a"][0] @ adapter["b"][0]
    np.testing.assert_allclose(model.adapt(base, trained)["layers"]["gate"][0], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("config", "layers", "unembed"),
    [
        (LoraConfig(2, train_mlp=False, train_unembed=False), {"query", "key", "value", "out"}, 0),
        (LoraConfig(2, train_attn=False, train_unembed=False), {"gate", "up", "down"}, 0),
        (LoraConfig(2, train_attn=False, train_mlp=False), set(), 1),
    ],
)
def test_only_what_was_asked_for_is_adapted(config, layers, unembed):
    lora = model.lora_weights(NANO, config)
    assert set(lora["layers"]) == layers
    assert ("unembed" in lora) == unembed
    assert all(2 in leaf.shape for leaf in jax.tree.leaves(lora))
    base = model.base_weights(NANO)
    adapted = model.adapt(base, jax.tree.map(jnp.ones_like, lora))
    changed = {n for n, w in adapted["layers"].items() if (w != base["layers"][n]).any()}
    assert changed == layers
    assert (adapted["unembed"] != base["unembed"]).any() == unembed


def test_adapters_follow_their_seed():
    first, again, other = (model.lora_weights(NANO, LoraConfig(4, seed=s)) for s in (1, 1, 2))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert not np.array_equal(first["layers"]["gate"]["a"], other["layers"]["gate"]["a"])
    assert not np.array_equal(first["layers"]["gate"]["a"], first["layers"]["up"]["a"])


def test_an_untrained_model_is_nearly_undecided(tokens):
    fresh = model.lora_weights(NANO, LoraConfig(4))
    log_p = logprobs(NANO, model.base_weights(NANO), fresh, tokens, np.roll(tokens, -1, axis=1))
    assert abs(float(log_p.mean()) + np.log(VOCAB_SIZE)) < 0.5


@pytest.mark.parametrize("config", BASE_MODELS.values(), ids=lambda config: config.name)
def test_every_base_model_can_be_read(config):
    shapes = jax.eval_shape(
        lambda tokens: model.logits(config, model.base_weights(config), tokens)[0],
        jax.ShapeDtypeStruct((2, 8), jnp.int32),
    )
    assert shapes.shape == (2, 8, VOCAB_SIZE)
