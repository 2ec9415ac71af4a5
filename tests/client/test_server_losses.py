"""A step whose objective the trainer runs itself: one request, and what two passes accumulate."""

import jax.numpy as jnp
import numpy as np
import pytest

from mintjax import AdamParams, Datum, objectives
from mintjax.errors import UnknownReductionError
from mintjax.local import Engine, Limits, trainer
from mintjax.protocol.messages import ClientConfigResponse

from ..data import flat, make_datums
from ..examples import THOROUGH

NANO = "mintjax/nano"
OFFERS = ClientConfigResponse(custom_loss_server_side=True)


@pytest.fixture(scope="module")
def engine():
    with Engine() as engine:
        yield engine


@pytest.fixture(scope="module", params=["JSON", "protobuf"])
def service(request, engine):
    config = ClientConfigResponse(
        proto_write_fwdbwd=request.param == "protobuf", custom_loss_server_side=True
    )
    with trainer(engine, config=config) as service:
        yield service


@pytest.fixture
def model(service):
    with service.create_lora_training_client(NANO, 4, seed=1) as model:
        yield model


def gradient(engine, model, data, objective, **options):
    """The accumulated gradient of one step, its output, and the requests that it took."""
    sent = []
    transport = model._connection.transport
    original = transport.submit

    async def watched(request):
        sent.append(request.path)
        return await original(request)

    transport.submit = watched
    try:
        output = model.forward_backward_custom(data, objective, **options).result()
    finally:
        transport.submit = original
    accumulated = flat(engine.gradient(model.model_id))
    model.optim_step(AdamParams(learning_rate=0.0)).result()
    return accumulated, output, sent


def assert_same(found, expected):
    assert np.linalg.norm(found[0] - expected[0]) <= 1e-5 * np.linalg.norm(expected[0])
    ours, theirs = (
        {name: value for name, value in one[1].metrics.items() if name != "surrogate_loss:sum"}
        for one in (found, expected)
    )
    assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)


def own(data, logprobs):
    """A sum over answers that is none over tokens."""
    scores = logprobs.dot(data["weights"])
    loss = jnp.logaddexp(0, -scores).sum()
    return loss, {"score": scores.mean(), "tokens": data["weights"].total(), "odd": scores.max()}


CASES = {
    "a user's function": own,
    "gspo": objectives.gspo(),
    "kl_k3": objectives.kl_k3(),
    "dual_clip_ppo": objectives.dual_clip_ppo(clip_high_threshold=1.02),
    "a mean of the step": objectives.ppo(aggregation="token_mean").over_step(make_datums()),
    "terms": objectives.weighted_sum(
        {"ppo": objectives.ppo(), "kl": objectives.kl_k2()}, {"kl": 0.1}
    ),
}


# By default either encoding carries some: what differs by it is how one column travels.
EITHER_WAY = [("JSON", name) for name in CASES if THOROUGH or name != "gspo"] + [
    ("protobuf", name) for name in CASES if THOROUGH or name in ("gspo", "terms")
]


@pytest.mark.parametrize(("service", "name"), EITHER_WAY, indirect=["service"])
def test_one_request_accumulates_what_two_passes_do(name, engine, model):
    data, objective = make_datums(), CASES[name]
    first = gradient(engine, model, data, objective)
    again = gradient(engine, model, make_datums(1), objective)
    assert first[1].route == again[1].route == "server"
    assert again[2] == ["forward_backward"]
    assert first[1].forward_seconds == 0
    assert_same(first, gradient(engine, model, data, objective, single_pass=False))
    assert_same(again, gradient(engine, model, make_datums(1), objective, single_pass=False))


@pytest.mark.parametrize("service", ["JSON"], indirect=True)
def test_another_number_is_another_loss_and_many_are_none(engine, model):
    routes = []
    for threshold in (1.01, 1.02, 1.01, 1.03, 1.04, 1.01):
        objective = objectives.truncated_importance_sampling(truncation_threshold=threshold)
        found = gradient(engine, model, make_datums(), objective)
        assert_same(found, gradient(engine, model, make_datums(), objective, single_pass=False))
        routes.append(found[1].route)
    assert routes == ["server", "server", "server", "server", "two_pass", "server"]


def test_what_a_trainer_refuses_goes_by_two_passes(engine):
    with trainer(engine, config=OFFERS, limits=Limits(max_loss_nodes=10)) as service:
        model = service.create_lora_training_client(NANO, 4, seed=1)
        found = gradient(engine, model, make_datums(), objectives.kl_k3())
        again = gradient(engine, model, make_datums(), objectives.kl_k3())
    assert found[1].route == again[1].route == "two_pass"
    assert again[2] == ["forward", "forward_backward"]


def test_what_a_trainer_has_forgotten_goes_by_two_passes(engine):
    with trainer(engine, config=OFFERS) as service:
        model = service.create_lora_training_client(NANO, 4, seed=1)
        losses = model._connection.losses
        first = gradient(engine, model, make_datums(), objectives.kl_k3())
        losses._ids = dict.fromkeys(losses._ids, "loss-0")
        found = gradient(engine, model, make_datums(), objectives.kl_k3())
        again = gradient(engine, model, make_datums(), objectives.kl_k3())
    assert [one[1].route for one in (first, found, again)] == ["server", "two_pass", "two_pass"]
    assert np.linalg.norm(found[0] - first[0]) <= 1e-5 * np.linalg.norm(first[0])
    assert again[2] == ["forward", "forward_backward"]


def test_a_trainer_that_does_not_offer_it_is_not_asked(engine):
    with trainer(engine, config=ClientConfigResponse()) as service:
        model = service.create_lora_training_client(NANO, 4, seed=1)
        _, output, sent = gradient(engine, model, make_datums(), objectives.kl_k3())
    assert output.route == "two_pass"
    assert sent == ["forward", "forward_backward"]


def test_a_column_that_cannot_travel_stays_here(engine, model):
    data = make_datums()
    hidden = data[0].loss_fn_inputs["ref_logprobs"].copy()
    hidden[0] = np.nan  # its weight is 0
    data[0] = Datum(data[0].model_input, {**data[0].loss_fn_inputs, "ref_logprobs": hidden})
    assert gradient(engine, model, data, objectives.kl_k3())[1].route == "two_pass"


def test_another_loss_than_ours_is_an_error(engine, monkeypatch):
    from mintjax.local import custom_losses

    sums = custom_losses._metrics
    monkeypatch.setattr(
        custom_losses,
        "_metrics",
        lambda results: {name: value / len(results) for name, value in sums(results).items()},
    )
    with trainer(engine, config=OFFERS) as service:
        model = service.create_lora_training_client(NANO, 4, seed=1)
        with pytest.raises(UnknownReductionError, match="run the objective itself"):
            model.forward_backward_custom(make_datums(), objectives.kl_k3()).result()
