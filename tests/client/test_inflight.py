"""Samplers that move on with the model, also where the trainer knows only snapshots."""

from __future__ import annotations

import numpy as np
import pytest

from mintjax import AdamParams, Datum, ModelInput
from mintjax.client.sampling import SamplingSession
from mintjax.errors import DataError
from mintjax.local import DIALECTS, Engine, trainer

NANO = "mintjax/nano"
PROMPT = ModelInput.from_ints([1, 2, 3, 4])


def step(model):
    columns = {"target_tokens": [2, 3, 4, 5], "weights": [1.0] * 4}
    model.forward_backward([Datum(PROMPT, columns)], "cross_entropy").result()
    model.optim_step(AdamParams(learning_rate=1e-2)).result()


@pytest.mark.parametrize("like", [None, "skyrl-0.4", "hatchery-0.3"])
def test_they_sample_from_what_was_last_saved(like):
    reduction = DIALECTS[like].reduction if like else None
    options = {} if reduction is None else {"reduction": reduction}
    with (
        Engine(**options) as engine,
        trainer(engine, like=like) as service,
        service.create_lora_training_client(NANO, 4, seed=1) as model,
    ):

        def saved(kind):
            return model.save_weights_and_get_sampling_client(kind=kind)

        def scores(sampler):
            return np.array(sampler.compute_logprobs(PROMPT).result()[1:])

        kept, first = saved("snapshot"), saved("inflight")
        before = scores(kept)
        np.testing.assert_array_equal(scores(first), before)
        step(model)
        np.testing.assert_array_equal(scores(first), before)  # nothing was saved since
        second = saved("inflight")
        assert np.abs(scores(second) - before).max() > 1e-4
        np.testing.assert_array_equal(scores(first), scores(second))
        np.testing.assert_array_equal(scores(kept), before)


def test_a_save_that_is_answered_late_does_not_move_them_back():
    session = SamplingSession("one", 3)
    assert [session.place() for _ in range(2)] == [("one", 1), ("one", 2)]
    session.move_on("three", 7)
    session.move_on("two", 5)
    assert [session.place() for _ in range(2)] == [("three", 1), ("three", 2)]


def test_they_have_no_name_and_no_other_kind(client):
    with pytest.raises(DataError, match="no name"):
        client.save_weights_and_get_sampling_client("a", kind="inflight")
    with pytest.raises(DataError, match='"snapshot" and "inflight"'):
        client.save_weights_and_get_sampling_client(kind="frozen")


def test_a_trainer_is_told_of_the_kind_only_if_it_is_asked_for(client, trainer):
    client.save_weights_and_get_sampling_client()
    client.save_weights_and_get_sampling_client(kind="inflight")
    asked = [body.get("kind") for body in trainer.bodies("save_weights_for_sampler")]
    assert asked == [None, "inflight"]
