"""Training through the client: what is sent, in which order, and what comes back."""

from __future__ import annotations

import asyncio
import base64
import threading

import jax.numpy as jnp
import msgspec
import numpy as np
import pytest

from mintjax import objectives
from mintjax.client import ServiceClient, TrainingClient
from mintjax.errors import (
    AmbiguousRequestError,
    APIResponseError,
    BadRequestError,
    ClosedError,
    DataError,
    InternalServerError,
    NonFiniteError,
    NotSentError,
    ObjectiveError,
    RequestFailedError,
)
from mintjax.tensors import TensorData
from mintjax.types import AdamParams, Datum, ImageChunk, ModelInput, SamplingParams

from .data import DATA, datum
from .double import QUICK, Answer, Hold, Trainer, logprob

PASSES = ("forward", "forward_backward")

ADAM = AdamParams(learning_rate=1e-3)


def sum_of_squares(data, logprobs):
    scores = (logprobs * data["weights"]).sum()
    return (scores**2).sum(), {"score": scores.mean()}


def seqs(trainer: Trainer) -> list[int]:
    return [body["seq_id"] for _, body, _ in trainer.requests if "seq_id" in body]


def test_a_built_in_loss_goes_by_name(client, trainer):
    config = {"clip_low_threshold": 0.9}
    output = client.forward_backward(DATA, "ppo", config).result(5)
    (body,) = trainer.bodies("forward_backward")
    assert body["model_id"] == "model-0"
    assert body["forward_backward_input"]["loss_fn"] == "ppo"
    assert body["forward_backward_input"]["loss_fn_config"] == config
    assert [row.shape for row in output.logprobs] == [(3,), (2,)]
    assert output.logprobs[0][0] == logprob(1, 2)
    assert output.metrics["plain"] == 1.0


def test_everything_submitted_at_once_takes_effect_in_order(client, trainer):
    futures = []
    for _ in range(5):
        futures += [
            client.forward(DATA),
            client.forward_backward(DATA),
            client.forward_backward_custom(DATA, sum_of_squares),
            client.optim_step(ADAM),
            client.save_state("s"),
        ]
    for future in futures:
        future.result(30)
    assert seqs(trainer) == list(range(1, 31))
    once = ["forward_backward", "forward_backward", "optim_step", "save_weights"]
    assert [op[0] for op in trainer.models["model-0"]] == once * 5


def test_the_next_request_is_sent_before_the_first_has_its_result(client, trainer):
    held = Hold()
    trainer.faults["retrieve_future/request-1"] = [held]
    first = client.forward_backward(DATA)
    client.optim_step(ADAM).result(5)
    assert not first.done()
    held.release()
    assert len(first.result(5).loss_fn_outputs) == 2


def test_unpipelined_requests_wait_for_the_result_of_the_one_before(connect, trainer):
    client = connect(pipelined=False).create_lora_training_client("tiny")
    before = len(trainer.requests)
    for future in [client.forward_backward(DATA), client.optim_step(ADAM)]:
        future.result(5)
    assert trainer.paths()[before:] == [
        "forward_backward",
        "retrieve_future",
        "optim_step",
        "retrieve_future",
    ]


def test_a_custom_step_sends_targets_and_weights_only(client, trainer):
    extra = [
        Datum(d.model_input, {**d.loss_fn_inputs, "advantages": [1.0] * d.model_input.length})
        for d in DATA
    ]

    def objective(data, logprobs):
        return (logprobs * data["advantages"]).sum().sum(), {}

    output = client.forward_backward_custom(extra, objective, single_pass=False).result(30)
    for path in ("forward", "forward_backward"):
        (body,) = trainer.bodies(path)
        given = body[f"{path}_input"]
        assert given["loss_fn"] == "cross_entropy"
        assert {n for d in given["data"] for n in d["loss_fn_inputs"]} == {
            "target_tokens",
            "weights",
        }
    assert trainer.models["model-0"] == [
        ("forward_backward", "cross_entropy", [[-1.0, -1.0, -1.0], [-1.0, -1.0]])
    ]
    assert output.metrics["loss"] == pytest.approx(
        sum(logprob(1, 2) for _ in "a")
        + logprob(2, 3)
        + logprob(3, 4)
        + logprob(1, 2)
        + logprob(2, 3)
    )


@pytest.mark.parametrize("single_pass", [False, True])
def test_an_image_travels_as_it_is_and_counts_as_its_tokens(client, trainer, single_pass):
    image = ImageChunk(b"\x89PNG\x00\xff", "png", expected_tokens=2)
    tokens = ModelInput.from_ints([1]).append(image).append_int(2)
    inputs = {"target_tokens": [0, 0, 2, 3], "weights": [0.0, 0.0, 1.0, 2.0]}
    data = [Datum(tokens, inputs), DATA[1]]
    objective = objectives.bradley_terry()
    client.forward_backward_custom(data, objective, single_pass=single_pass).result(30)
    bodies = [(path, body) for path in PASSES for body in trainer.bodies(path)]
    assert bodies
    for path, body in bodies:
        chunks = body[f"{path}_input"]["data"][0]["model_input"]["chunks"]
        assert [chunk["type"] for chunk in chunks] == ["encoded_text", "image", "encoded_text"]
        assert base64.b64decode(chunks[1]["data"]) == image.data
        assert (chunks[1]["format"], chunks[1]["expected_tokens"]) == ("png", 2)
    ((_, _, (sent, _)),) = trainer.models["model-0"]
    np.testing.assert_allclose(sent, np.multiply(sent[3] / 2, inputs["weights"]), rtol=1e-6)
    assert sent[3] != 0


def test_an_image_that_does_not_say_its_tokens_is_refused_at_once(client, trainer):
    tokens = ModelInput([ImageChunk(b"bytes", "png")])
    with pytest.raises(DataError, match="set expected_tokens"):
        client.forward_backward([Datum(tokens, {"target_tokens": [1]})])
    assert not trainer.paths("forward_backward")


@pytest.mark.parametrize("single_pass", [False, True])
def test_the_sum_is_the_loss_whatever_the_metrics_are_called(client, single_pass):
    def objective(data, logprobs):
        loss = -logprobs.total()
        return loss, {"loss": 5 * loss, "loss:sum": 7.0}

    step = client.forward_backward_custom(DATA, objective, single_pass=single_pass)
    metrics = step.result(30).metrics
    assert metrics["loss"] == pytest.approx(5 * metrics["loss:sum"])
    assert step.result().route == ("one_pass" if single_pass else "two_pass")


def test_a_custom_step_carries_the_gradient(client, trainer):
    output = client.forward_backward_custom(DATA, sum_of_squares).result(30)
    rows = [
        np.array([logprob(1, 2), logprob(2, 3), logprob(3, 4)]),
        np.array([logprob(1, 2), logprob(2, 3)]),
    ]
    weights = [np.array([0.0, 1, 1]), np.array([0.0, 1])]
    scores = [float(row @ w) for row, w in zip(rows, weights, strict=True)]
    ((_, _, sent),) = trainer.models["model-0"]
    for got, w, score in zip(sent, weights, scores, strict=True):
        np.testing.assert_allclose(got, -2 * score * w, rtol=1e-6)
    assert output.metrics["loss"] == pytest.approx(sum(s**2 for s in scores))
    assert output.metrics["score"] == pytest.approx(np.mean(scores))
    assert {"loss:sum", "plain"} <= output.metrics.keys()
    assert all(type(v) is float for v in output.metrics.values())


def test_the_objectives_metrics_win_over_the_trainers(client):
    def objective(data, logprobs):
        return logprobs.sum().sum(), {"plain": jnp.float32(7)}

    assert client.forward_backward_custom(DATA, objective).result(30).metrics["plain"] == 7.0


def test_missing_weights_are_ones_in_the_forward_pass(client, trainer):
    bare = [Datum(ModelInput.from_ints([1, 2]), {"target_tokens": [2, 3]})]
    client.forward_backward_custom(bare, lambda data, lps: ((lps * lps).total(), {})).result(30)
    (body,) = trainer.bodies("forward")
    assert body["forward_input"]["data"][0]["loss_fn_inputs"]["weights"]["data"] == [1.0, 1.0]


def test_a_custom_step_holds_its_place_while_its_loss_is_computed(client, trainer):
    entered, leave = threading.Event(), threading.Event()

    def objective(data, logprobs):
        entered.set()
        assert leave.wait(10)
        return logprobs.sum().sum(), {}

    step = client.forward_backward_custom(DATA, objective)
    after = client.optim_step(ADAM)
    assert entered.wait(10)
    assert trainer.models["model-0"] == []
    leave.set()
    step.result(30), after.result(5)
    assert [op[0] for op in trainer.models["model-0"]] == ["forward_backward", "optim_step"]


class Mine(Exception):
    pass


TO_RAISE: list[type[BaseException]] = []


def objective(data, logprobs):
    raise TO_RAISE[-1]("as it is")


@pytest.mark.filterwarnings("ignore:objective has been made anew")
@pytest.mark.parametrize("single_pass", [True, False])
@pytest.mark.parametrize("error", [Mine, StopIteration, KeyboardInterrupt, SystemExit])
def test_an_objective_that_raises_costs_nothing(client, trainer, error, single_pass):
    TO_RAISE.append(error)
    step = client.forward_backward_custom(DATA, objective, single_pass=single_pass)
    after = client.optim_step(ADAM)
    with pytest.raises(error, match="as it is") as caught:
        step.result(30)
    assert "objective" in [entry.name for entry in caught.traceback]
    after.result(5)
    assert [op[0] for op in trainer.models["model-0"]] == ["optim_step"]
    # Looking whether it needs a forward pass, it raises before there is one.
    assert seqs(trainer) == ([1] if single_pass else [1, 2])


def test_an_objective_that_is_no_loss_is_refused(client, trainer):
    with pytest.raises(ObjectiveError):
        client.forward_backward_custom(DATA, lambda data, lps: (lps.sum(), {})).result(30)
    assert trainer.models["model-0"] == []


@pytest.mark.filterwarnings("ignore:an objective reads an object of type TrainingClient")
def test_an_objective_cannot_wait_for_its_own_model(client):
    def objective(data, logprobs):
        client.forward(DATA).result()
        return logprobs.sum().sum(), {}

    with pytest.raises(RuntimeError, match="cannot submit"):
        client.forward_backward_custom(DATA, objective).result(30)
    assert client.optim_step(ADAM).result(5).metrics is None


def test_a_gradient_beyond_float32_does_not_travel(client, trainer):
    def objective(data, logprobs):
        return ((logprobs * 1e30).sum() * 1e30).sum(), {}

    with pytest.raises(NonFiniteError) as caught:
        client.forward_backward_custom(DATA, objective).result(30)
    assert (caught.value.datum, caught.value.position) == (0, 0)
    assert trainer.models["model-0"] == []
    client.optim_step(ADAM).result(5)
    assert seqs(trainer) == [1]


BAD = {
    "empty": ([], "at least one"),
    "no tokens": ([Datum(ModelInput.from_ints([]), {"target_tokens": []})], "datum 0"),
    "unequal": ([DATA[0], datum([1, 2], [2, 3, 4])], "datum 1, field 'target_tokens'"),
    "missing": ([Datum(ModelInput.from_ints([1]), {})], "target_tokens"),
    "negative": ([datum([1, 2], [2, -3])], "datum 0, field 'target_tokens'"),
    "nan": ([datum([1, 2], [2, 3], [0.0, float("nan")])], "datum 0, field 'weights'"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("how", ["forward", "forward_backward", "custom"])
def test_bad_data_raise_at_the_call_and_nothing_is_sent(client, trainer, case, how):
    data, message = BAD[case]
    before = len(trainer.requests)
    submit = {
        "custom": lambda: client.forward_backward_custom(data, sum_of_squares),
        "forward": lambda: client.forward(data),
        "forward_backward": lambda: client.forward_backward(data),
    }
    with pytest.raises(DataError, match=message):
        submit[how]()
    assert len(trainer.requests) == before
    client.optim_step(ADAM).result(5)
    assert seqs(trainer) == [1]


def test_hyperparameters_must_be_finite_numbers(client, trainer):
    with pytest.raises(DataError, match="learning_rate"):
        client.optim_step(AdamParams(learning_rate=float("nan")))
    with pytest.raises(DataError, match="beta"):
        client.forward_backward(DATA, "dro", {"beta": float("inf")})
    client.optim_step(AdamParams(learning_rate=jnp.float32(0.5))).result(5)  # as optax gives it
    assert trainer.bodies("optim_step")[0]["adam_params"]["learning_rate"] == 0.5


def test_data_are_read_at_the_call_and_never_changed(client, trainer):
    weights = np.array([0.0, 1.0], np.float32)
    held = Hold()
    trainer.faults["optim_step"] = [held]
    first = client.optim_step(ADAM)
    step = client.forward_backward([datum([1, 2], [2, 3], weights)])
    weights[:] = 9.0
    held.release()
    first.result(5), step.result(5)
    assert trainer.models["model-0"][1] == ("forward_backward", "cross_entropy", [[0.0, 1.0]])
    np.testing.assert_array_equal(weights, [9.0, 9.0])


@pytest.mark.parametrize("single_pass", [True, False])
def test_a_custom_step_reads_its_data_at_the_call(client, trainer, single_pass):
    weights, held = np.array([0.0, 1.0], np.float32), Hold()
    data = [datum([1, 2], [2, 3], weights)]
    trainer.faults["optim_step"] = [held]
    client.optim_step(ADAM)
    step = client.forward_backward_custom(data, objectives.cross_entropy(), single_pass=single_pass)
    weights[:] = 9.0
    data.clear()
    held.release()
    assert step.result(30).metrics["loss"] == pytest.approx(-logprob(2, 3))
    assert trainer.models["model-0"][1] == ("forward_backward", "cross_entropy", [[0.0, 1.0]])


def policy_datum() -> Datum:
    return Datum(
        ModelInput.from_ints([1, 2]),
        {"target_tokens": [2, 3], "logprobs": [-1.0, -1.0], "advantages": [1.0, 2.0]},
    )


def refusing(path, body, result):
    """The trainer's answer, but that ppo fails when it runs."""
    name = body.get("forward_backward_input", {}).get("loss_fn")
    return {"error": "no ppo here", "category": "user"} if name == "ppo" else result


def test_a_loss_that_is_refused_when_it_runs_is_sent_as_its_gradient(client, trainer):
    trainer.output = refusing
    first = client.forward_backward_custom([policy_datum()], objectives.ppo())
    after = client.optim_step(ADAM)
    assert first.result(30).route == "two_pass"
    after.result(5)
    second = client.forward_backward_custom([policy_datum()], objectives.ppo())
    assert second.result(30).route == "two_pass"
    applied = [op[:2] for op in trainer.models["model-0"]]
    assert applied == [
        ("forward_backward", "ppo"),  # the double notes it, and then says that it failed
        ("forward_backward", "cross_entropy"),
        ("optim_step", trainer.models["model-0"][2][1]),
        ("forward_backward", "cross_entropy"),
    ]


def test_a_loss_that_was_served_and_fails_later_is_not_sent_twice(client, trainer):
    client.forward_backward_custom([policy_datum()], objectives.ppo()).result(30)
    trainer.output = refusing
    with pytest.raises(RequestFailedError, match="no ppo here"):
        client.forward_backward_custom([policy_datum()], objectives.ppo()).result(30)


def test_a_step_that_fails_either_way_says_nothing_of_its_loss(client, trainer):
    everything = lambda path, body: Answer(400, {"detail": "no"})  # noqa: E731
    trainer.refuse = lambda path, body: (
        everything(path, body) if path in ("forward", "forward_backward") else None
    )
    with pytest.raises(BadRequestError):
        client.forward_backward_custom([policy_datum()], objectives.ppo()).result(30)
    trainer.refuse = lambda path, body: None
    step = client.forward_backward_custom([policy_datum()], objectives.ppo())
    assert step.result(30).route == "by_name"


def test_hyperparameters_may_be_scalars_of_any_library(client, trainer):
    config = {"a": np.float32(0.5), "b": np.int64(2), "c": jnp.float32(0.25), "d": np.array(3.0)}
    client.forward_backward(DATA, "ppo", config).result(5)
    given = trainer.bodies("forward_backward")[0]["forward_backward_input"]["loss_fn_config"]
    assert given == {"a": 0.5, "b": 2.0, "c": 0.25, "d": 3.0}
    for wrong in ("0.9", [1.0, 2.0], None):
        with pytest.raises(DataError, match="beta"):
            client.forward_backward(DATA, "dro", {"beta": wrong})


def test_a_step_moves_the_schedules_of_its_objective(client, trainer):
    objective = objectives.weighted_sum(
        {"nll": objectives.cross_entropy()}, weights={"nll": lambda step: 1.0 + step}
    )
    losses = [
        client.forward_backward_custom(DATA, objective, step=step).result(30).metrics["loss"]
        for step in (0, 3)
    ]
    assert losses[1] == pytest.approx(4 * losses[0])
    with pytest.raises(DataError, match="no schedules"):
        client.forward_backward_custom(DATA, sum_of_squares, step=1)


def test_a_cancelled_request_costs_no_number(client, trainer):
    held = Hold()
    trainer.faults["forward"] = [held]
    first = client.forward(DATA)
    doomed = [client.optim_step(ADAM), client.forward_backward_custom(DATA, sum_of_squares)]
    last = client.save_state("s")
    assert [future.cancel() for future in doomed] == [True, True]
    held.release()
    first.result(5), last.result(5)
    assert not first.cancel()
    assert all(future.cancelled() and future.done() for future in doomed)
    assert [op[0] for op in trainer.models["model-0"]] == ["save_weights"]
    assert seqs(trainer) == [1, 2]


def test_a_custom_step_can_be_cancelled_until_its_backward_pass(client, trainer):
    entered, leave = threading.Event(), threading.Event()

    def objective(data, logprobs):
        entered.set()
        assert leave.wait(10)
        return logprobs.sum().sum(), {}

    step = client.forward_backward_custom(DATA, objective)
    assert entered.wait(10)
    assert step.cancel()
    leave.set()
    client.optim_step(ADAM).result(5)
    assert [op[0] for op in trainer.models["model-0"]] == ["optim_step"]


def test_a_refused_request_gives_its_number_back(client, trainer):
    trainer.refuse = lambda path, body: (
        Answer(422, {"detail": [{"loc": ["body", "adam_params"], "msg": "too bold"}]})
        if path == "optim_step"
        else None
    )
    with pytest.raises(Exception, match=r"body.adam_params: too bold"):
        client.optim_step(ADAM).result(5)
    client.forward_backward(DATA).result(5)
    assert seqs(trainer) == [1, 1]


def test_what_stands_behind_a_failed_request_is_not_sent(client, trainer):
    held = Hold()
    trainer.faults["save_weights"] = [held]
    trainer.faults["forward_backward"] = [Answer(422, {"detail": "no"})]
    futures = [client.save_state("before"), client.forward_backward(DATA), client.optim_step(ADAM)]
    held.release()
    futures[0].result(5)
    failed = threading.Event()
    futures[1].add_done_callback(lambda _: failed.set())
    assert failed.wait(5)
    futures.append(client.optim_step(ADAM))  # nobody has looked at the failure yet
    with pytest.raises(BadRequestError):
        futures[1].result(5)
    with pytest.raises(NotSentError):
        futures[3].result(5)
    with pytest.raises(NotSentError, match="a request before it failed"):
        futures[2].result(5)
    client.optim_step(ADAM).result(5)
    assert [op[0] for op in trainer.models["model-0"]] == ["save_weights", "optim_step"]
    assert seqs(trainer) == [1, 2, 2]


def test_a_failed_forward_pass_holds_nobody_up(client, trainer):
    trainer.faults["forward"] = [Answer(422, {"detail": "no"})]
    first, second = client.forward(DATA), client.optim_step(ADAM)
    with pytest.raises(BadRequestError):
        first.result(5)
    second.result(5)


def test_a_request_that_fails_when_it_runs(client, trainer):
    trainer.output = lambda path, body, result: {"error": "no memory", "category": "server"}
    with pytest.raises(RequestFailedError, match="no memory") as caught:
        client.forward_backward(DATA).result(5)
    assert caught.value.category == "server"
    client.optim_step(ADAM).result(5)
    assert seqs(trainer) == [1, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r["loss_fn_outputs"].pop(), "1 outputs for 2 datums"),
        (lambda r: r["loss_fn_outputs"][1]["logprobs"].update(data=[1.0], shape=[1]), "datum 1"),
        (lambda r: r["loss_fn_outputs"][1]["logprobs"].update(data=[None, 1.0]), "loss_fn_outputs"),
        (lambda r: r.pop("loss_fn_outputs"), "loss_fn_outputs"),
        (
            lambda r: r["loss_fn_outputs"][1].update(more={"data": [1e39], "dtype": "float32"}),
            r"datum 1: the trainer returned inf in 'more'\[0\]",
        ),
        (
            lambda r: r["loss_fn_outputs"][1]["logprobs"].update(data=[1, 2], dtype="int64"),
            "datum 1: the trainer returned logprobs of int64",
        ),
        (
            lambda r: r["loss_fn_outputs"][1]["logprobs"].update(data=[-1.0, 5.0]),
            "datum 1: the trainer returned a logprob of 5",
        ),
        (
            lambda r: r["loss_fn_outputs"][0]["logprobs"].update(data=[-1.0, 1e30, -1.0]),
            r"datum 0: the trainer returned a logprob of 1e\+30",
        ),
    ],
)
def test_an_answer_that_does_not_fit_the_data(client, trainer, change, message):
    def output(path, body, result):
        change(result)
        return result

    trainer.output = output
    with pytest.raises(APIResponseError, match=message):
        client.forward(DATA).result(5)
    with pytest.raises(AmbiguousRequestError, match=message) as caught:
        client.forward_backward(DATA).result(5)
    assert caught.value.may_have_been_applied  # whoever answered


def test_an_answer_that_does_not_fit_is_asked_for_again(client, trainer):
    answer, replies = trainer.retrieve, []

    def retrieve(body):
        replies.append(body)
        return answer(body) if len(replies) > 1 else Answer(200, {"loss_fn_outputs": []})

    trainer.retrieve = retrieve
    assert len(client.forward_backward(DATA).result(5).loss_fn_outputs) == 2
    assert len(replies) == 2


def test_logprobs_without_a_shape_get_that_of_the_targets(client, trainer):
    def output(path, body, result):
        result["loss_fn_outputs"] = [
            {"logprobs": {"data": [-1.0] * 4, "dtype": "float32"}},
        ]
        return result

    trainer.output = output
    trainer.models["model-0"] = []
    wide = Datum(ModelInput.from_ints([1, 2]), {"target_tokens": TensorData([[1, 2], [3, 4]])})
    trainer.run = lambda path, body: output(path, body, {"metrics": {}, "loss_fn_output_type": "x"})
    assert client.forward([wide]).result(5).logprobs[0].shape == (2, 2)


def test_state_and_sampling(client, service, trainer):
    path = client.save_state("a").result(5).path
    client.load_state(path).result(5)
    client.load_state_with_optimizer(path).result(5)
    assert [body["optimizer"] for body in trainer.bodies("load_weights")] == [False, True]
    saved = client.save_weights_for_sampler("b").result(5)
    assert trainer.bodies("save_weights_for_sampler")[0]["path"] == "b"
    assert service.create_sampling_client(model_path=saved.path) is not None
    client.save_weights_and_get_sampling_client()
    body = trainer.bodies("save_weights_for_sampler")[1]
    assert "path" not in body
    assert "sampling_session_seq_id" in body
    assert client.get_info().model_data.model_name == "tiny"


def test_a_sampling_client_of_a_trainer_that_answers_with_a_path(client, trainer):
    trainer.faults["retrieve_future/request-1"] = [Answer(200, {"path": "tinker://saved"})]
    sampler = client.save_weights_and_get_sampling_client()
    assert trainer.bodies("create_sampling_session")[0]["model_path"] == "tinker://saved"
    answer = sampler.sample(ModelInput.from_ints([1]), 2, SamplingParams()).result(5)
    assert len(answer.sequences) == 2
    trainer.faults["retrieve_future/request-3"] = [
        Answer(200, {"type": "save_weights_for_sampler"})
    ]
    with pytest.raises(APIResponseError, match="neither a path nor a sampling_session_id"):
        client.save_weights_and_get_sampling_client()


def test_a_custom_step_that_is_refused_is_not_taken_otherwise(client, trainer):
    trainer.refuse = lambda path, body: (
        Answer(400, {"detail": "not today"}) if path == "forward_backward" else None
    )
    with pytest.raises(BadRequestError, match="not today"):
        client.forward_backward_custom(DATA, sum_of_squares).result(5)
    assert len(trainer.bodies("forward_backward")) == 1


def test_unload_waits_for_all_that_was_submitted(client, trainer):
    held = Hold()
    trainer.faults["retrieve_future/request-1"] = [held]
    first = client.forward(DATA)
    done = client.unload()
    with pytest.raises(ClosedError, match="unloaded"):
        client.forward(DATA)
    assert not done.done()
    held.release()
    assert done.result(5) is None
    assert first.done()
    assert trainer.models == {}


def test_unload_may_be_answered_at_once(client, trainer):
    answer = {"model_id": client.model_id, "status": "unloaded"}  # as hatchery answers
    trainer.faults["unload_model"] = [Answer(200, answer)]
    assert client.unload().result(5) is None
    assert trainer.paths("unload_model", "retrieve_future")[-1] == "unload_model"


def test_an_unload_whose_result_stays_broken_is_given_up(connect, trainer):
    """As skyrl-tx answers where it cannot write the result as JSON."""
    policy = msgspec.structs.replace(QUICK, broken_result=0.02, deadline=60.0)
    model = connect(retry_policy=policy).create_lora_training_client("tiny")
    trainer.faults["retrieve_future"] = [Answer(500, b"Internal Server Error")] * 1000
    with pytest.raises(InternalServerError, match="unload_model has probably been applied"):
        model.unload().result(20)
    assert len(trainer.faults["retrieve_future"]) > 900


def test_unload_names_the_model_in_the_query_too(client, trainer):
    queries = []

    def query(path, body):
        queries.append(trainer.query)

    trainer.refuse = query
    client.unload().result(5)
    assert f"model_id={client.model_id}".encode() in queries


def test_a_training_client_unloads_at_the_end_of_its_block(service, trainer):
    with service.create_lora_training_client("tiny") as client:
        client.optim_step(ADAM)
    assert trainer.models == {}
    trainer.refuse = lambda path, body: Answer(404, {}) if path == "unload_model" else None
    with service.create_lora_training_client("tiny"):
        pass
    assert list(trainer.models) == ["model-1"]


def test_an_error_in_the_block_of_a_training_client_is_the_users(service, trainer):
    with pytest.raises(KeyError, match="mine"), service.create_lora_training_client("tiny"):
        raise KeyError("mine")
    assert trainer.paths("unload_model") in ([], ["unload_model"])  # asked, and not waited for


async def in_a_loop(service: ServiceClient) -> TrainingClient:
    async with service:
        client = await service.create_lora_training_client_async("tiny")
        async with client:
            step = await client.forward_backward_custom_async(DATA, sum_of_squares)
            update = await client.optim_step_async(ADAM)
            done = await asyncio.gather(step.result_async(30), update)
            assert done[0].metrics["loss"] > 0
            sampler = await client.save_weights_and_get_sampling_client_async()
            assert (await sampler.compute_logprobs_async(ModelInput.from_ints([1])))[0] is None
            assert (await client.get_info_async()).model_id == client.model_id
    return client


def test_asyncio_users_are_served(connect):
    client = asyncio.run(in_a_loop(connect()))
    with pytest.raises(ClosedError):
        client.forward(DATA)


@pytest.mark.parametrize("stop", ["", ["end", ""]])
def test_an_empty_stop_text_is_refused(client, trainer, stop):
    sampler = client.save_weights_and_get_sampling_client()
    with pytest.raises(DataError, match="'stop': an empty text is never found"):
        sampler.sample(ModelInput.from_ints([1]), 1, SamplingParams(stop=stop))
    assert not trainer.bodies("asample")


def test_scalars_of_numpy_make_models_and_samples(service, trainer):
    one = np.int64(1)
    client = service.create_lora_training_client("tiny", np.int32(4), np.uint8(7))
    (made,) = trainer.bodies("create_model")
    assert (made["lora_config"]["rank"], made["lora_config"]["seed"]) == (4, 7)
    client.optim_step(AdamParams(learning_rate=np.float32(0.5))).result(10)
    sampler = service.create_sampling_client(base_model="tiny")
    params = SamplingParams(max_tokens=np.int64(3), seed=one, temperature=np.float32(0.5))
    assert sampler.sample(ModelInput.from_ints([1]), one, params).result(10).sequences
    (asked,) = trainer.bodies("asample")
    assert (asked["num_samples"], asked["sampling_params"]["max_tokens"]) == (1, 3)
    with pytest.raises(DataError, match=r"field 'rank': 4\.5"):
        service.create_lora_training_client("tiny", rank=4.5)
