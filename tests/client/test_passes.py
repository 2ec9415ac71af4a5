"""Chunks: their sizes, and their order."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mintjax.client.passes import chunks
from mintjax.errors import (
    AmbiguousRequestError,
    BadRequestError,
    NonFiniteError,
    NotSentError,
    RequestFailedError,
)
from mintjax.protocol import messages
from mintjax.types import AdamParams

from .data import DATA, datum
from .double import Answer, logprob

MANY = [datum([i % 50, 1], [2, i % 7], [1.0, float(i)]) for i in range(23)]


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30),
    most=st.integers(1, 10),
    size=st.integers(1, 3000),
)
def test_chunks_are_the_batch_in_order_within_the_limits(lengths, most, size):
    data = [datum([i] * n, [i] * n, [float(i)] * n) for i, n in enumerate(lengths)]
    limits = messages.ClientConfigResponse(
        fwdbwd_max_chunk_len=most, fwdbwd_max_chunk_bytes_count=size
    )
    parts = chunks(data, limits, in_protobuf=False)
    decoded = [json.loads(bytes(part.data)) for part in parts]
    assert [d for part in decoded for d in part] == json.loads(messages.encode(data))
    for part, given_data in zip(parts, decoded, strict=True):
        assert 1 <= len(given_data) <= most
        assert len(given_data) == len(part.shapes) == 1 or len(bytes(part.data)) <= size + most + 2
        assert (
            part.shapes
            == [d.loss_fn_inputs["target_tokens"].shape for d in data[part.first :]][
                : len(part.shapes)
            ]
        )


def test_a_non_finite_number_is_named():
    data = [DATA[0], datum([1, 2], [2, 3], [0.0, np.inf])]
    with pytest.raises(
        NonFiniteError, match=r"datum 1, position 1, input 'weights': inf"
    ) as caught:
        chunks(data, messages.ClientConfigResponse(), in_protobuf=False)
    assert (caught.value.datum, caught.value.position) == (1, 1)


@pytest.fixture
def in_parts(connect, trainer):
    trainer.config = {"fwdbwd_max_chunk_len": 10, "mintjax_reduction": {}}
    return connect().create_lora_training_client("tiny")


def test_a_big_batch_is_sent_in_parts_and_put_together(in_parts, trainer):
    output = in_parts.forward_backward(MANY)
    step = in_parts.optim_step(AdamParams())
    expected = [[logprob(i % 50, 2), logprob(1, i % 7)] for i in range(23)]
    for row, values in zip(output.result(5).logprobs, expected, strict=True):
        np.testing.assert_array_equal(row, values)
    step.result(5)
    assert [body["seq_id"] for body in trainer.bodies("forward_backward")] == [1, 2, 3]
    assert trainer.bodies("optim_step")[0]["seq_id"] == 4
    total = -sum(
        w * lp for i, row in enumerate(expected) for w, lp in zip([1, i], row, strict=True)
    )
    assert output.result().metrics["loss:sum"] == pytest.approx(total)


def test_a_custom_loss_sees_the_whole_batch(in_parts, trainer):
    def objective(data, logprobs):
        scores = logprobs.sum()
        return (scores[0] - scores[-1]) * len(data), {"rows": len(data)}

    output = in_parts.forward_backward_custom(MANY, objective).result(30)
    assert output.metrics["rows"] == 23.0
    sent = [row for op in trainer.models["model-0"] for row in op[2]]
    assert sent == [[-23.0, -23.0], *[[0.0, 0.0]] * 21, [23.0, 23.0]]


def test_parts_one_after_another_where_the_trainer_reorders(connect, trainer):
    trainer.config = {"fwdbwd_max_chunk_len": 10}
    client = connect(pipelined=False).create_lora_training_client("tiny")
    before = len(trainer.requests)
    assert len(client.forward(MANY).result(5).loss_fn_outputs) == 23
    assert trainer.paths()[before:] == ["forward", "retrieve_future"] * 3


def test_a_part_that_is_refused_leaves_the_model_in_doubt(in_parts, trainer):
    trainer.refuse = lambda path, body: (
        Answer(422, {"detail": "no"}) if body.get("seq_id") == 2 else None
    )
    step = in_parts.forward_backward(MANY)
    # The next one is refused when it is submitted, or withheld when its turn comes.
    with pytest.raises((AmbiguousRequestError, NotSentError), match="gradients"):
        in_parts.optim_step(AdamParams()).result(5)
    with pytest.raises(BadRequestError) as caught:
        step.result(5)
    assert caught.value.may_have_been_applied
    assert "gradients" in caught.value.__notes__[0]
    assert [op[0] for op in trainer.models["model-0"]] == ["forward_backward"]


def test_a_part_that_fails_leaves_the_model_in_doubt(in_parts, trainer):
    trainer.output = lambda path, body, result: (
        {"error": "no", "category": "user"} if body["seq_id"] == 2 else result
    )
    with pytest.raises(RequestFailedError) as caught:
        in_parts.forward_backward(MANY).result(5)
    assert "gradients" in caught.value.__notes__[0]
    assert caught.value.may_have_been_applied
    with pytest.raises(AmbiguousRequestError, match="gradients"):
        in_parts.optim_step(AdamParams())


def test_a_forward_pass_that_fails_in_part_costs_nothing(in_parts, trainer):
    trainer.output = lambda path, body, result: (
        {"error": "no", "category": "user"} if body["seq_id"] == 2 else result
    )
    with pytest.raises(RequestFailedError):
        in_parts.forward(MANY).result(5)
    in_parts.optim_step(AdamParams()).result(5)
