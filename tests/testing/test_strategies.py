"""The strategies make the kinds of batch they promise."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, find, given, settings

from mintjax import testing

from ..examples import examples

SEARCH = settings(
    max_examples=400,
    suppress_health_check=list(HealthCheck),
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],  # what is found is not shrunk
)


def distances(example: testing.Example) -> np.ndarray:
    """The log-ratios of all tokens that count."""
    return np.concatenate(
        [
            (row - datum.loss_fn_inputs["logprobs"].to_numpy())[
                datum.loss_fn_inputs["weights"].to_numpy() != 0
            ]
            for datum, row in zip(example.data, example.logprobs, strict=True)
        ]
    )


KINDS = {
    "a single token": lambda e: [len(row) for row in e.logprobs] == [1],
    "a long row": lambda e: max(map(len, e.logprobs)) > 1000,
    "a row masked whole": lambda e: any(
        not datum.loss_fn_inputs["weights"].any() for datum in e.data
    ),
    "on policy": lambda e: len(distances(e)) > 3 and not distances(e).any(),
    "an extreme ratio": lambda e: bool((np.abs(distances(e)) > 40).any()),
    "several rows": lambda e: len(e.data) == 4,
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_batch_is_found(kind):
    found = find(testing.batches(), KINDS[kind], settings=SEARCH)
    assert KINDS[kind](found)


@given(testing.batches(block=3, max_length=30))
@settings(max_examples=examples(10))
def test_blocks_stay_whole_and_columns_fit(example):
    assert len(example.data) % 3 == 0
    for datum, row in zip(example.data, example.logprobs, strict=True):
        assert row.dtype == np.float32
        assert datum.model_input.length == len(row)
        for value in datum.loss_fn_inputs.values():
            assert value.shape == row.shape


@given(testing.batches(candidates=3, columns=("outcomes", "desirable"), max_length=5))
@settings(max_examples=examples(5))
def test_candidates_and_numbers_per_datum(example):
    for datum, row in zip(example.data, example.logprobs, strict=True):
        assert row.shape[1] == 3
        assert (datum.loss_fn_inputs["outcomes"].sum(-1) == 1).all()
        assert datum.loss_fn_inputs["desirable"].shape == ()


@given(testing.batches(columns={"mine": lambda rng, shape: np.full(shape, 7.0)}, max_length=5))
@settings(max_examples=examples(5))
def test_columns_of_ones_own(example):
    for datum in example.data:
        assert (datum.loss_fn_inputs["mine"] == 7).all()


@given(testing.batches(poison=True, max_length=10))
@settings(max_examples=examples(12))
def test_poison_stays_behind_the_mask(example):
    for datum, row in zip(example.data, example.logprobs, strict=True):
        counts = datum.loss_fn_inputs["weights"].to_numpy() != 0
        assert np.isfinite(row[counts]).all()
        assert np.isfinite(datum.loss_fn_inputs["advantages"].to_numpy()[counts]).all()
