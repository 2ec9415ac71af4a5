"""The trainer without HTTP: what accumulates, what a step does, what a failure leaves behind."""

from __future__ import annotations

from functools import partial

import jax
import numpy as np
import pytest

from mintjax.errors import DataError, NonFiniteError, NotFoundError
from mintjax.local import Engine
from mintjax.types import AdamParams, LoraConfig

from ..by_numpy import evaluate
from .conftest import BASE_MODEL
from .data import LENGTHS, LOSSES, batch, with_columns

ADAM = AdamParams(learning_rate=1e-2)


def assert_close(first, second, rtol=1e-4):
    """Two trees hold the same numbers, relative to the norm of each leaf."""
    for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        scale = max(float(np.linalg.norm(one)), float(np.linalg.norm(other)), 1e-12)
        assert np.linalg.norm(np.asarray(one) - np.asarray(other)) <= rtol * scale


def assert_identical(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)


def norm(tree):
    return float(np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(tree))))


@pytest.fixture
def trained(engine, model_id):
    """A model some steps from its start, where adapters and optimizer are not zero."""
    for seed in range(2):
        engine.forward_backward(model_id, batch(seed=seed), "cross_entropy")
        engine.optim_step(model_id, ADAM)
    return model_id


class TestAccumulation:
    def test_forward_adds_nothing(self, engine, model_id):
        engine.forward(model_id, batch(), "cross_entropy")
        assert norm(engine.gradient(model_id)) == 0

    @pytest.mark.parametrize("loss_fn", LOSSES)
    def test_all_at_once_is_half_and_half(self, engine, make_model, loss_fn):
        whole, halves = make_model(), make_model()
        data = batch()
        all_at_once = engine.forward_backward(whole, data, loss_fn)
        first = engine.forward_backward(halves, data[:3], loss_fn)
        second = engine.forward_backward(halves, data[3:], loss_fn)
        assert norm(engine.gradient(whole)) > 0.1
        assert_close(engine.gradient(whole), engine.gradient(halves))
        summed = first.metrics["loss:sum"] + second.metrics["loss:sum"]
        assert all_at_once.metrics["loss:sum"] == pytest.approx(summed, rel=1e-5)

    def test_twice_is_twice(self, engine, make_model):
        once, twice = make_model(), make_model()
        engine.forward_backward(once, batch(), "ppo")
        for _ in range(2):
            engine.forward_backward(twice, batch(), "ppo")
        doubled = jax.tree.map(lambda leaf: 2 * leaf, engine.gradient(once))
        assert_identical(engine.gradient(twice), doubled)

    def test_an_optimizer_step_begins_anew(self, engine, trained):
        assert norm(engine.gradient(trained)) == 0
        assert engine.model(trained).num_datums == 0

    def test_models_do_not_touch_each_other(self, engine, make_model):
        one, other = make_model(), make_model()
        untouched = engine.model(other)
        engine.forward_backward(one, batch(), "cross_entropy")
        engine.optim_step(one, ADAM)
        assert engine.model(other) is untouched


class TestLayout:
    """How datums are padded and grouped must not show."""

    def test_a_datum_gives_the_same_alone_as_among_others(self, engine, trained):
        data = batch([40, 5, 20])
        together = engine.forward(trained, data, "cross_entropy").logprobs
        for i in (1, 2):
            [alone] = engine.forward(trained, data[i : i + 1], "cross_entropy").logprobs
            np.testing.assert_allclose(alone, together[i], atol=1e-5)

    def test_order_of_the_data_is_order_of_the_outputs(self, engine, make_model):
        first, second = make_model(), make_model()
        data, order = batch(), [4, 2, 0, 5, 1, 3]
        expected = engine.forward_backward(first, data, "dro")
        permuted = engine.forward_backward(second, [data[i] for i in order], "dro")
        for place, i in enumerate(order):
            np.testing.assert_allclose(permuted.logprobs[place], expected.logprobs[i], atol=1e-5)
        assert permuted.metrics["loss:sum"] == pytest.approx(expected.metrics["loss:sum"], rel=1e-5)
        assert_close(engine.gradient(first), engine.gradient(second))

    def test_more_datums_than_one_pass_holds(self, engine, make_model):
        repeated, once = make_model(), make_model()
        data = batch()
        output = engine.forward_backward(repeated, data * 6, "cross_entropy")
        single = engine.forward_backward(once, data, "cross_entropy")
        assert [row.shape for row in output.logprobs] == [(length,) for length in LENGTHS] * 6
        six_times = jax.tree.map(lambda leaf: 6 * leaf, engine.gradient(once))
        assert_close(engine.gradient(repeated), six_times)
        for i, row in enumerate(output.logprobs):
            np.testing.assert_allclose(row, single.logprobs[i % 6], atol=1e-5)

    def test_candidates(self, engine, make_model):
        wide, narrow = make_model(), make_model()
        data = batch(candidates=2)
        output = engine.forward_backward(wide, data, "importance_sampling")
        assert [row.shape for row in output.logprobs] == [(length, 2) for length in LENGTHS]
        for k in range(2):
            column = [
                with_columns(d, **{name: c[:, k] for name, c in d.loss_fn_inputs.items()})
                for d in data
            ]
            one = engine.forward_backward(narrow, column, "importance_sampling")
            for row, expected in zip(output.logprobs, one.logprobs, strict=True):
                np.testing.assert_allclose(row[:, k], expected, atol=1e-5)
        assert_close(engine.gradient(wide), engine.gradient(narrow))


class TestLosses:
    @pytest.mark.parametrize("loss_fn", LOSSES)
    def test_loss_sum_is_the_sum_of_the_library_function(self, engine, trained, loss_fn):
        from mintjax import losses

        data = batch()
        output = engine.forward(trained, data, loss_fn)
        expected = 0.0
        for datum, row in zip(data, output.logprobs, strict=True):
            inputs = {name: np.asarray(c) for name, c in datum.loss_fn_inputs.items()}
            if loss_fn == "cross_entropy":
                expected -= float((row * inputs["weights"]).sum())
            else:
                function = getattr(losses, loss_fn)
                mask = {"where": inputs["weights"] != 0} if loss_fn == "gspo" else {}
                columns = row, inputs["logprobs"], inputs["advantages"]
                per_token = evaluate(partial(function, **mask), *columns)
                expected += float((per_token * inputs["weights"]).sum())
        assert output.metrics == {"loss:sum": pytest.approx(expected, rel=1e-5)}

    def test_without_weights_no_token_is_masked(self, engine, make_model):
        given, absent = make_model(), make_model()
        ones = [with_columns(d, weights=np.ones(d.model_input.length)) for d in batch()]
        engine.forward_backward(given, ones, "ppo")
        engine.forward_backward(absent, [with_columns(d, weights=None) for d in ones], "ppo")
        assert_identical(engine.gradient(given), engine.gradient(absent))

    def test_a_prompt_has_no_part_in_the_ratio_of_a_sequence(self, engine, make_model):
        """Its tokens have neither logprob nor advantage; some clients send no mask."""
        given, absent = make_model(), make_model()
        data = []
        for datum in batch():
            prompt = np.arange(datum.model_input.length) < 2
            columns = {
                name: np.where(prompt, 0, datum.loss_fn_inputs[name])
                for name in ("logprobs", "advantages")
            }
            data.append(with_columns(datum, **columns, weights=~prompt))
        engine.forward_backward(given, data, "gspo")
        engine.forward_backward(absent, [with_columns(d, weights=None) for d in data], "gspo")
        assert norm(engine.gradient(given)) > 0.1
        assert_identical(engine.gradient(given), engine.gradient(absent))

    def test_a_sequence_has_no_candidates(self, engine, trained):
        with pytest.raises(DataError, match="gspo takes the ratio of a sequence"):
            engine.check_pass(trained, batch(candidates=2), "gspo")

    def test_options_reach_the_loss(self, engine, trained):
        data = batch()
        wide = {"clip_low_threshold": 0.0, "clip_high_threshold": 100.0}
        unclipped = engine.forward(trained, data, "ppo", wide).metrics["loss:sum"]
        sampled = engine.forward(trained, data, "importance_sampling").metrics["loss:sum"]
        clipped = engine.forward(trained, data, "ppo").metrics["loss:sum"]
        assert unclipped == pytest.approx(sampled, rel=1e-5)
        assert abs(clipped - unclipped) > 0.01


class TestFailure:
    """A request that fails leaves no trace."""

    def test_a_loss_that_overflows(self, engine, trained):
        data = batch()
        engine.forward_backward(trained, data, "cross_entropy")
        before = engine.model(trained)
        huge = np.full(data[2].model_input.length, 3e38)
        data[2] = with_columns(data[2], advantages=huge, weights=None)
        with pytest.raises(NonFiniteError, match=r"datum 2.*nothing was applied") as caught:
            engine.forward_backward(trained, data, "importance_sampling")
        assert caught.value.datum == 2
        assert engine.model(trained) is before

    def test_a_gradient_that_overflows(self, engine, trained):
        before = engine.model(trained)
        [datum] = batch([4])
        datum = with_columns(datum, weights=np.array([1e38, -1e38, 1e38, -1e38]))
        with pytest.raises(NonFiniteError, match="nothing was applied"):
            engine.forward_backward(trained, [datum], "cross_entropy")
        assert engine.model(trained) is before

    def test_a_sum_of_gradients_that_overflows(self, engine, trained):
        [datum] = batch([4])
        ones = with_columns(datum, weights=np.ones(4))
        engine.forward_backward(trained, [ones], "cross_entropy")
        unit = engine.optim_step(trained, AdamParams(learning_rate=0.0)).metrics["grad_norm"]
        large = with_columns(datum, weights=np.full(4, 1.2e19 / unit))  # its square is below 2^128
        engine.forward_backward(trained, [large], "cross_entropy")
        before = engine.model(trained)
        with pytest.raises(NonFiniteError, match="too large to be squared"):
            engine.forward_backward(trained, [large], "cross_entropy")
        assert engine.model(trained) is before
        engine.optim_step(trained, ADAM)

    def test_a_step_that_overflows(self, engine, trained):
        engine.forward_backward(trained, batch(), "cross_entropy")
        before = engine.model(trained)
        with pytest.raises(NonFiniteError, match="nothing was changed"):
            engine.optim_step(trained, AdamParams(learning_rate=3e38, weight_decay=3e38))
        assert engine.model(trained) is before

    def test_the_model_can_be_trained_on(self, engine, trained):
        bad = [with_columns(d, advantages=np.full(d.model_input.length, 3e38)) for d in batch()]
        with pytest.raises(NonFiniteError):
            engine.forward_backward(trained, bad, "importance_sampling")
        engine.forward_backward(trained, batch(), "importance_sampling")
        engine.optim_step(trained, ADAM)
        assert np.isfinite(norm(engine.model(trained).lora))

    @pytest.mark.parametrize(
        "call",
        [
            lambda engine: engine.forward("nobody", batch(), "cross_entropy"),
            lambda engine: engine.forward_backward("nobody", batch(), "cross_entropy"),
            lambda engine: engine.optim_step("nobody", ADAM),
            lambda engine: engine.save_weights("nobody", "x"),
            lambda engine: engine.save_weights_for_sampler("nobody", "x"),
            lambda engine: engine.load_weights("nobody", "tinker://a/weights/b"),
            lambda engine: engine.unload_model("nobody"),
        ],
    )
    def test_an_unknown_model(self, engine, call):
        with pytest.raises(NotFoundError, match="nobody"):
            call(engine)


def test_the_same_requests_give_the_same_bits():
    def run():
        with Engine() as engine:
            model_id = engine.create_model(BASE_MODEL, LoraConfig(4, seed=1))
            for step, loss_fn in enumerate(LOSSES):
                engine.forward_backward(model_id, batch(seed=step), loss_fn)
                engine.optim_step(model_id, ADAM)
            return engine.model(model_id)

    first, second = run(), run()
    assert_identical(first.lora, second.lora)
    assert_identical(first.optimizer, second.optimizer)


class TestOptimizerStep:
    def test_reports_the_norm_of_the_gradient(self, engine, trained):
        engine.forward_backward(trained, batch(), "cross_entropy")
        expected = norm(engine.gradient(trained))
        response = engine.optim_step(trained, AdamParams(grad_clip_norm=0.1))
        assert response.metrics == {"grad_norm": pytest.approx(expected, rel=1e-5)}

    def test_without_a_gradient_momentum_goes_on(self, engine, trained):
        before = engine.model(trained).lora
        assert engine.optim_step(trained, ADAM).metrics == {"grad_norm": 0}
        assert norm(jax.tree.map(np.subtract, engine.model(trained).lora, before)) > 1e-3


class TestCheckpoints:
    def train(self, engine, model_id):
        engine.forward_backward(model_id, batch(seed=5), "cross_entropy")
        engine.optim_step(model_id, ADAM)
        return engine.model(model_id)

    def test_training_goes_on_bit_for_bit(self, engine, trained):
        path = engine.save_weights(trained, "here")
        assert path == f"tinker://{trained}/weights/here"
        expected = self.train(engine, trained)
        engine.load_weights(trained, path, with_optimizer=True)
        again = self.train(engine, trained)
        assert_identical(again.lora, expected.lora)
        assert_identical(again.optimizer, expected.optimizer)

    def test_weights_alone_begin_a_fresh_optimizer(self, engine, trained, make_model):
        path = engine.save_weights(trained, "here")
        saved = engine.model(trained).lora
        self.train(engine, trained)
        engine.load_weights(trained, path)
        assert_identical(engine.model(trained).lora, saved)
        assert_identical(engine.model(trained).optimizer, engine.model(make_model()).optimizer)

    def test_another_model_takes_them(self, engine, trained, make_model):
        other = make_model()
        engine.forward_backward(other, batch(), "cross_entropy")
        engine.load_weights(other, engine.save_weights(trained, "here"), with_optimizer=True)
        assert_identical(engine.model(other).lora, engine.model(trained).lora)
        assert norm(engine.gradient(other)) == 0

    def test_another_shape_does_not(self, engine, trained):
        path = engine.save_weights(trained, "here")
        other = engine.create_model(BASE_MODEL, LoraConfig(8))
        before = engine.model(other)
        with pytest.raises(DataError, match=r"rank 4 .* rank 8"):
            engine.load_weights(other, path)
        assert engine.model(other) is before

    def test_a_sampler_checkpoint_is_not_to_be_trained_on(self, engine, trained):
        path = engine.save_weights_for_sampler(trained, "here")
        assert path == f"tinker://{trained}/sampler_weights/here"
        with pytest.raises(DataError, match="sampler"):
            engine.load_weights(trained, path)

    def test_a_second_of_the_same_name_replaces_the_first(self, engine, trained):
        engine.save_weights(trained, "here")
        expected = self.train(engine, trained).lora
        path = engine.save_weights(trained, "here")
        self.train(engine, trained)
        engine.load_weights(trained, path)
        assert_identical(engine.model(trained).lora, expected)

    def test_checkpoints_outlive_their_model_and_engine(self, tmp_path):
        with Engine(directory=tmp_path) as first:
            model_id = first.create_model(BASE_MODEL, LoraConfig(4, seed=1))
            lora = self.train(first, model_id).lora
            path = first.save_weights(model_id)
            first.unload_model(model_id)
        with Engine(directory=tmp_path) as second:
            other = second.create_model(BASE_MODEL, LoraConfig(4, seed=2))
            second.load_weights(other, path)
            assert_identical(second.model(other).lora, lora)

    def test_a_temporary_directory_goes_with_the_engine(self):
        with Engine() as engine:
            model_id = engine.create_model(BASE_MODEL, LoraConfig(4))
            engine.save_weights(model_id, "here")
            directory = engine.directory
            assert list(directory.rglob("here.safetensors"))
        assert not directory.exists()


class TestNormalising:
    """SkyRL's convention: each datum over its weights, all datums over their number."""

    def test_no_metrics(self, normalising_engine):
        model_id = normalising_engine.create_model(BASE_MODEL, LoraConfig(4, seed=1))
        output = normalising_engine.forward_backward(model_id, batch(), "cross_entropy")
        assert output.metrics == {}

    def movement(self, engine, *calls):
        """How far one step, linear in the gradient, moves the logprobs of one datum."""
        [datum] = batch([12])
        model_id = engine.create_model(BASE_MODEL, LoraConfig(4, seed=1))
        [before] = engine.forward(model_id, [datum], "cross_entropy").logprobs
        for weights in calls:
            data = [with_columns(datum, weights=np.full(12, w)) for w in weights]
            engine.forward_backward(model_id, data, "cross_entropy")
        engine.optim_step(model_id, AdamParams(learning_rate=1e-4 * 1e3, eps=1e3))
        [after] = engine.forward(model_id, [datum], "cross_entropy").logprobs
        return float(np.sum(after - before))

    def test_what_a_probe_measures(self, engine, normalising_engine):
        for trainer, expected in ((engine, (1, 2, 2)), (normalising_engine, (1, 1, 1))):
            once = self.movement(trainer, [1.0])
            assert once > 0
            ratios = (
                1,
                self.movement(trainer, [2.0]) / once,
                self.movement(trainer, [1.0, 1.0]) / once,
            )
            assert ratios == pytest.approx(expected, rel=0.02)

    def test_the_mean_counts_all_calls_before_the_step(self, normalising_engine):
        together = self.movement(normalising_engine, [1.0, 3.0])
        apart = self.movement(normalising_engine, [1.0], [3.0])
        assert apart == pytest.approx(together, rel=1e-4)

    def test_gradient_is_the_mean_of_each_datum_over_its_weights(self, engine, normalising_engine):
        data = [with_columns(d, weights=d.loss_fn_inputs["weights"] + 0.5) for d in batch()]
        model_id = normalising_engine.create_model(BASE_MODEL, LoraConfig(4, seed=1))
        normalising_engine.forward_backward(model_id, data, "ppo")
        scaled = []
        for datum in data:
            weights = np.asarray(datum.loss_fn_inputs["weights"])
            scaled.append(with_columns(datum, weights=weights / weights.sum() / len(data)))
        summing = engine.create_model(BASE_MODEL, LoraConfig(4, seed=1))
        engine.forward_backward(summing, scaled, "ppo")
        assert_close(normalising_engine.gradient(model_id), engine.gradient(summing))

    def test_weights_that_sum_to_nothing_are_divided_by_a_billionth(
        self, engine, normalising_engine
    ):
        [datum] = batch([12])
        signs = with_columns(datum, weights=np.tile([1.0, -1.0], 6))
        gradients = []
        for trainer in (engine, normalising_engine):
            model_id = trainer.create_model(BASE_MODEL, LoraConfig(4, seed=1))
            trainer.forward_backward(model_id, [signs], "cross_entropy")
            gradients.append(trainer.gradient(model_id))
        assert_close(gradients[1], jax.tree.map(lambda leaf: leaf * 1e9, gradients[0]))
