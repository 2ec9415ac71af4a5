"""By which route a custom step reaches the trainer, and that each leads to the same place."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mintjax import AdamParams, Datum, ModelInput, losses, objectives, value_and_logprob_grads
from mintjax.errors import BadRequestError, DataError, RequestFailedError
from mintjax.local import Engine, trainer
from mintjax.protocol.messages import ClientConfigResponse
from mintjax.ragged.batch import Batch
from mintjax.step.reduction import Reduction
from mintjax.step.routes import by_name

from ..by_numpy import evaluate
from ..data import flat, make_datums
from ..examples import examples, some

NANO = "mintjax/nano"


def without(data, name):
    return [
        Datum(d.model_input, {k: v for k, v in d.loss_fn_inputs.items() if k != name}) for d in data
    ]


def reinforce(data, logprobs):
    weighted = logprobs * data["advantages"]
    return -weighted.total(), {"mean_logprob": logprobs.mean().mean()}


@pytest.fixture(scope="module")
def engine():
    with Engine() as engine:
        engine.passes = []
        for name in ("forward", "forward_backward"):
            watch(engine, name)
        yield engine


def watch(engine, name):
    original = getattr(engine, name)

    def watched(model_id, data, loss_fn, *rest, **named):
        engine.passes.append((name, loss_fn))
        return original(model_id, data, loss_fn, *rest, **named)

    setattr(engine, name, watched)


@pytest.fixture(scope="module")
def service(engine):
    with trainer(engine, config=ClientConfigResponse()) as service:  # runs no custom losses
        yield service


@pytest.fixture
def model(service):
    with service.create_lora_training_client(NANO, 4, seed=1) as model:
        yield model


def gradient(engine, model, data, objective, **options):
    """The accumulated gradient of one step, its output, and the passes that the trainer saw."""
    engine.passes.clear()
    output = model.forward_backward_custom(data, objective, **options).result()
    accumulated = flat(engine.gradient(model.model_id))
    passes = list(engine.passes)
    model.optim_step(AdamParams(learning_rate=0.0)).result()
    return accumulated, output, passes


CASES = {
    "reinforce": (reinforce, "one_pass", "cross_entropy"),
    "cross_entropy": (objectives.cross_entropy(), "by_name", "cross_entropy"),
    "importance_sampling": (objectives.importance_sampling(), "by_name", "importance_sampling"),
    "ppo": (objectives.ppo(clip_high_threshold=1.05), "by_name", "ppo"),
    "cispo": (objectives.cispo(), "by_name", "cispo"),
    "dro": (objectives.dro(beta=0.2), "by_name", "dro"),
}


@pytest.mark.parametrize("name", CASES)
def test_one_request_does_what_two_did(name, engine, model):
    objective, route, loss_fn = CASES[name]
    data = make_datums(1)
    if name == "dro":  # its quadratic term cannot be masked through the advantages
        data = without(data, "weights")
    one, direct, passes = gradient(engine, model, data, objective)
    two, indirect, both = gradient(engine, model, data, objective, single_pass=False)
    assert (direct.route, passes) == (route, [("forward_backward", loss_fn)])
    assert indirect.route == "two_pass"
    assert both == [("forward", "cross_entropy"), ("forward_backward", "cross_entropy")]
    assert np.linalg.norm(one - two) <= 1e-5 * np.linalg.norm(two)
    ours = {k: v for k, v in direct.metrics.items() if ":" not in k}
    assert ours == pytest.approx(
        {k: v for k, v in indirect.metrics.items() if ":" not in k}, rel=1e-5, abs=1e-6
    )
    assert direct.forward_seconds == 0
    assert min(indirect.forward_seconds, indirect.client_seconds, indirect.backward_seconds) > 0


@pytest.mark.parametrize(
    "objective",
    [objectives.dro(), objectives.bradley_terry(), objectives.ppo(aggregation="token_mean")],
    ids=repr,
)
def test_what_no_single_request_can_do_takes_two(objective, engine, model):
    _, output, passes = gradient(engine, model, make_datums(1), objective)
    assert output.route == "two_pass"
    assert len(passes) == 2


def test_weights_of_any_size_are_carried_in_the_advantages(engine, model):
    data = make_datums(1, weights=lambda n: np.linspace(0, 2, n))
    one, output, _ = gradient(engine, model, data, objectives.ppo())
    two, _, _ = gradient(engine, model, data, objectives.ppo(), single_pass=False)
    assert output.route == "by_name"
    assert np.linalg.norm(one - two) <= 1e-5 * np.linalg.norm(two)
    negative = make_datums(1, weights=lambda n: np.linspace(-1, 2, n))
    assert gradient(engine, model, negative, objectives.ppo())[1].route == "two_pass"


def test_what_a_mask_hides_does_not_travel(engine, model):
    data = make_datums(1, logprobs=lambda n: np.where(np.arange(n) > 1, -5.0, np.nan))
    one, output, _ = gradient(engine, model, data, objectives.ppo())
    two, _, _ = gradient(engine, model, data, objectives.ppo(), single_pass=False)
    assert output.route == "by_name"
    assert np.linalg.norm(one - two) <= 1e-5 * np.linalg.norm(two)


def test_a_loss_that_the_trainer_refuses_by_name_is_sent_as_its_gradient(engine, monkeypatch):
    from mintjax.local import endpoints

    check = endpoints.Engine.check_pass

    def refuse(self, model_id, data, loss_fn, *rest, **named):
        if loss_fn == "ppo":
            raise DataError("not served here", field="loss_fn")
        return check(self, model_id, data, loss_fn, *rest, **named)

    monkeypatch.setattr(endpoints.Engine, "check_pass", refuse)
    with (
        trainer(engine, config=ClientConfigResponse()) as service,
        service.create_lora_training_client(NANO, 4, seed=1) as model,
    ):
        _, first, _ = gradient(engine, model, make_datums(1), objectives.ppo())
        _, second, passes = gradient(engine, model, make_datums(1), objectives.ppo())
        assert (first.route, second.route) == ("two_pass", "two_pass")
        assert len(passes) == 2
        with pytest.raises(BadRequestError, match="not served here"):
            model.forward_backward(without(make_datums(1), "weights"), "ppo").result()


@pytest.fixture(scope="module")
def averaging():
    with (
        Engine(reduction=Reduction("weights", per_step="datums")) as engine,
        trainer(engine) as service,
    ):
        yield engine, service


def test_a_trainer_that_averages_is_probed_and_gets_the_true_gradient(averaging, engine, model):
    other, service = averaging
    data = make_datums(2)
    true, _, _ = gradient(engine, model, data, objectives.bradley_terry())
    reduction = service.probe(NANO)
    assert reduction == Reduction(per_sequence=True, over_datums=True)
    for objective in (objectives.bradley_terry(), objectives.ppo(), reinforce):
        want, _, _ = gradient(engine, model, data, objective, single_pass=False)
        with service.create_lora_training_client(NANO, 4, seed=1) as there:
            assert there.probe() == reduction
            output = there.forward_backward_custom(data, objective).result()
            got = flat(other.gradient(there.model_id))
        assert output.route == "two_pass"
        cosine = got @ want / np.linalg.norm(got) / np.linalg.norm(want)
        assert cosine >= 0.9999
        assert np.linalg.norm(got) == pytest.approx(np.linalg.norm(want), rel=1e-3)
    assert np.linalg.norm(true) > 0


def test_several_steps_on_a_trainer_that_averages_are_told_their_number(averaging, engine, model):
    other, service = averaging
    service.probe(NANO)
    first, second = make_datums(2), make_datums(3)
    want = sum(gradient(engine, model, part, reinforce)[0] for part in (first, second))
    with service.create_lora_training_client(NANO, 4, seed=1) as there:
        for part in (first, second):
            there.forward_backward_custom(part, reinforce, datums_in_step=8).result()
        got = flat(other.gradient(there.model_id))
        assert np.linalg.norm(got - want) <= 1e-3 * np.linalg.norm(want)
        there.optim_step(AdamParams()).result()

        there.forward_backward_custom(first, reinforce).result()
        with pytest.raises(DataError, match="4 are accumulated, 4 are to be added"):
            there.forward_backward_custom(second, reinforce).result()
        there.optim_step(AdamParams()).result()

        there.forward_backward_custom(first, reinforce, datums_in_step=8).result()
        with pytest.raises(DataError, match=r"8 datums were announced .* and 4 came"):
            there.optim_step(AdamParams()).result()
        with pytest.raises(DataError, match="announced were 9"):
            there.forward_backward_custom(second, reinforce, datums_in_step=9).result()
        there.forward_backward_custom(second, reinforce, datums_in_step=8).result()
        there.optim_step(AdamParams()).result()


def fail_once(monkeypatch, name):
    """Makes the embedded trainer fail at its next request of one kind."""
    from mintjax.local import endpoints

    original = getattr(endpoints.Engine, name)

    def failing(self, *args, **named):
        monkeypatch.setattr(endpoints.Engine, name, original)
        raise DataError("not this time", field="data")

    monkeypatch.setattr(endpoints.Engine, name, failing)


def relative(got, want):
    return np.linalg.norm(got - want) / np.linalg.norm(want)


@pytest.mark.parametrize("failing", ["optim_step", "forward_backward"])
def test_a_request_that_failed_does_not_bend_the_next_gradient(
    averaging, engine, model, failing, monkeypatch
):
    other, service = averaging
    service.probe(NANO)
    first, second = make_datums(2), make_datums(3)
    with service.create_lora_training_client(NANO, 4, seed=1) as there:
        if failing == "optim_step":
            there.forward_backward_custom(first, reinforce, datums_in_step=8).result()
            there.forward_backward_custom(second, reinforce, datums_in_step=8).result()
            fail_once(monkeypatch, "optim_step")
            with pytest.raises(RequestFailedError, match="not this time"):
                there.optim_step(AdamParams()).result()
            with pytest.raises(DataError, match="8 are accumulated, 4 are to be added"):
                there.forward_backward_custom(first, reinforce).result()
        else:
            fail_once(monkeypatch, "forward_backward")
            step = there.forward_backward_custom(first, reinforce, datums_in_step=8)
            with pytest.raises(RequestFailedError, match="not this time"):
                step.result()
            for part in (first, second):
                there.forward_backward_custom(part, reinforce, datums_in_step=8).result()
        got = flat(other.gradient(there.model_id))
        there.optim_step(AdamParams()).result()
    want = sum(gradient(engine, model, part, reinforce)[0] for part in (first, second))
    assert relative(got, want) <= 1e-3


DTYPES = [bool, np.int64, np.float16, np.float32, np.float64]
WEIGHTS = [[1.0], [0.0, 1.0], [0.0], [0.0, 0.5, 2.0], [-1.0, 0.0, 1.0]]


@st.composite
def batches(draw):
    """Any batch that a policy loss can read: [T] or [T, K] targets, columns spread in any way."""
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    candidates = draw(st.sampled_from([None, 1, 2, 3]))
    lengths = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    kinds = {
        name: (draw(st.sampled_from(["datum", "token", "target"])), draw(st.sampled_from(DTYPES)))
        for name in ("weights", "advantages")
    }
    allowed = draw(st.sampled_from([None, *WEIGHTS]))
    nan_behind_the_mask = draw(st.booleans())
    data = []
    for length in lengths:
        targets = (length,) if candidates is None else (length, candidates)
        shapes = {"datum": (), "token": (length,), "target": targets}

        def column(name, values, shapes=shapes):
            kind, dtype = kinds[name]
            return values(shapes[kind]).astype(dtype)

        columns = {
            "target_tokens": rng.integers(0, 9, targets),
            "logprobs": -rng.exponential(size=targets),
            "advantages": column("advantages", lambda shape: 2 * rng.standard_normal(shape)[()]),
        }
        if allowed is not None:
            columns["weights"] = column(
                "weights", lambda shape: np.asarray(rng.choice(allowed, shape))
            )
            if nan_behind_the_mask and columns["weights"].shape == targets:
                columns["logprobs"][columns["weights"] == 0] = np.nan
        data.append(Datum(ModelInput.from_ints(range(length)), columns))
    logprobs = [-rng.exponential(size=d.loss_fn_inputs["target_tokens"].shape) for d in data]
    return Batch(data), logprobs


def by_a_trainer(loss_fn, config, datum, logprobs):
    """The gradient that a trainer which sums has, of one datum as it was sent."""
    inputs = {name: np.asarray(value, np.float64) for name, value in datum.loss_fn_inputs.items()}

    def loss(values):
        if loss_fn == "cross_entropy":
            return losses.cross_entropy(values, inputs["weights"]).sum()
        function = getattr(losses, loss_fn)
        return function(values, inputs["logprobs"], inputs["advantages"], **config).sum()

    return evaluate(jax.grad(loss), logprobs)


NAMED = [
    objectives.cross_entropy(),
    objectives.importance_sampling(),
    objectives.ppo(clip_low_threshold=0.9, clip_high_threshold=1.05),
    objectives.cispo(),
    objectives.dro(beta=0.3),
]


@pytest.mark.parametrize("objective", some(NAMED, 2), ids=lambda o: type(o).__name__)
@settings(max_examples=examples(3))
@given(case=batches())
def test_data_by_name_have_the_gradient_of_the_objective_or_there_are_none(objective, case):
    batch, logprobs = case
    loss_fn, config = objective.builtin
    sent = by_name(loss_fn, batch)
    if sent is None:
        return
    with jax.enable_x64(True):
        want = value_and_logprob_grads(objective, batch, logprobs).grads
        for datum, row, expected in zip(sent, logprobs, want, strict=True):
            shapes = {column.shape for column in datum.loss_fn_inputs.values()}
            assert shapes == {row.shape}
            got = by_a_trainer(loss_fn, config, datum, row)
            np.testing.assert_allclose(got, expected, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("columns", ["datum", "token", "target"])
@pytest.mark.parametrize("candidates", [None, 2, 3])
def test_ordinary_columns_of_any_shape_go_by_name(columns, candidates):
    targets = (3,) if candidates is None else (3, candidates)
    shape = {"datum": (), "token": (3,), "target": targets}[columns]
    datum = Datum(
        ModelInput.from_ints([1, 2, 3]),
        {
            "target_tokens": np.ones(targets, int),
            "weights": np.ones(shape),
            "logprobs": np.full(targets, -1.0),
            "advantages": np.full(shape, 2.0),
        },
    )
    for objective in NAMED:
        assert by_name(objective.builtin[0], Batch([datum])) is not None


def test_weights_of_tokens_weigh_all_their_candidates(engine, model):
    """As many candidates as tokens: the wrong axis fits, too."""
    rng = np.random.default_rng(0)
    data = [
        Datum(
            ModelInput.from_ints(rng.integers(0, 256, 4)),
            {"target_tokens": rng.integers(0, 256, (4, 4)), "weights": [0, 1, 2, 3]},
        )
    ]
    one, output, _ = gradient(engine, model, data, objectives.cross_entropy())
    two, _, _ = gradient(engine, model, data, objectives.cross_entropy(), single_pass=False)
    assert output.route == "by_name"
    assert np.linalg.norm(one - two) <= 1e-5 * np.linalg.norm(two)
    assert output.metrics["loss"] == pytest.approx(output.metrics["loss:sum"], rel=1e-5)


def test_one_advantage_for_each_datum_is_enough(engine, model):
    data = [
        Datum(d.model_input, {**d.loss_fn_inputs, "advantages": a})
        for d, a in zip(make_datums(1), [1.0, -0.5, 2.0, 0.0], strict=True)
    ]
    one, output, _ = gradient(engine, model, data, objectives.ppo())
    two, _, _ = gradient(engine, model, data, objectives.ppo(), single_pass=False)
    assert output.route == "by_name"
    assert np.linalg.norm(one - two) <= 1e-5 * np.linalg.norm(two)


@pytest.mark.parametrize("columns", [{"logprobs": -95.0}, {"advantages": 1e30, "weights": 1e30}])
def test_what_could_overflow_in_a_trainer_does_not_go_by_name(columns):
    [datum] = make_datums(
        1, sizes=(3,), **{k: lambda n, v=v: np.full(n, v) for k, v in columns.items()}
    )
    assert by_name("ppo", Batch([datum])) is None


def test_thresholds_that_no_request_can_hold_do_not_go_by_name(engine, model):
    for threshold in (np.float32(0.9), np.array(0.9)):
        objective = objectives.ppo(clip_low_threshold=threshold)
        one, output, _ = gradient(engine, model, make_datums(1), objective)
        assert output.route == "two_pass"
        two, _, _ = gradient(engine, model, make_datums(1), objectives.ppo(clip_low_threshold=0.9))
        assert np.linalg.norm(one - two) <= 1e-5 * np.linalg.norm(two)


class MyPPO(type(objectives.ppo())):
    """Another loss, which inherits the name of the one that it is derived from."""

    def evaluate(self, data, logprobs):
        loss, metrics = super().evaluate(data, logprobs)
        return 3 * loss, metrics


def test_a_subclass_with_a_loss_of_its_own_does_not_go_by_its_bases_name(engine, model):
    mine, output, _ = gradient(engine, model, make_datums(1), MyPPO())
    theirs, _, _ = gradient(engine, model, make_datums(1), objectives.ppo())
    assert output.route == "two_pass"
    assert np.linalg.norm(mine - 3 * theirs) <= 1e-5 * np.linalg.norm(3 * theirs)
