"""Objectives called on padded arrays: the numbers of the columns of datums, padding never seen."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mintjax
from mintjax import Batch, Ragged, objectives, testing
from mintjax.errors import DataError

from ..examples import THOROUGH, examples, some
from .specimens import SPECIMENS
from .test_laws import OWN_WAY

WIDTH = 24
NAMES = sorted(SPECIMENS) if THOROUGH else sorted(OWN_WAY)


def padded(rows, mask, poison):
    """Rows as a padded array, with poison where the mask is false."""
    made = np.full((*mask.shape, *rows[0].shape[1:]), poison, rows[0].dtype)
    made[mask] = np.concatenate(rows)
    return made


def marks(draw, lengths):
    """A mask with so many tokens in each row: on the left, on the right, or anywhere."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["prefix", "left", "holes"]))
    mask = np.arange(WIDTH) < np.array(lengths)[:, None]
    if kind == "left":
        return mask[:, ::-1].copy()
    return mask if kind == "prefix" else rng.permuted(mask, axis=1)


@pytest.mark.parametrize("name", some(NAMES, 7))
@given(data=st.data())
@settings(max_examples=min(examples(2), 5))  # each compiles, for every objective
def test_padded_arrays_give_what_datums_give(name, data):
    specimen = SPECIMENS[name]
    kinds = testing.batches(
        block=specimen.block, max_blocks=2, max_length=WIDTH, **specimen.batches
    )
    example = data.draw(kinds)
    poison = data.draw(st.sampled_from([np.nan, np.inf, -np.inf]))
    want = mintjax.value_and_logprob_grads(specimen.objective, *example)
    mask = marks(data.draw, [len(row) for row in example.logprobs])
    columns = {"mask": mask}
    for column in set(example.data[0].loss_fn_inputs) - {"target_tokens"}:
        rows = [datum.loss_fn_inputs[column].to_numpy() for datum in example.data]
        columns[column] = padded(rows, mask, poison) if rows[0].ndim else np.stack(rows)
    step = jax.jit(jax.value_and_grad(lambda lp, data: specimen.objective(data, lp), has_aux=True))
    (loss, metrics), grads = step(padded(example.logprobs, mask, poison), columns)
    close = {"rtol": 3e-5, "atol": 3e-5}
    np.testing.assert_allclose(loss, want.loss, **close)
    for metric, value in metrics.items():
        np.testing.assert_allclose(value, want.metrics[metric], err_msg=metric, **close)
    assert (np.asarray(grads)[~mask] == 0).all()
    np.testing.assert_allclose(np.asarray(grads)[mask], np.concatenate(want.grads), **close)


# One objective, and the ways to call it

ROWS = [np.float32([-1, -2, -3]), np.float32([-0.5])]
REF = [np.float32([-1.5, -1, -3]), np.float32([-2])]
WEIGHTS = [np.float32([0, 1, 1]), np.float32([1])]
LENGTHS = np.array([3, 1])
MASK = np.arange(4) < LENGTHS[:, None]
DPO = objectives.dpo()


def wide(rows, dtype=np.float32):
    return padded(rows, MASK, np.nan).astype(dtype)


def arrays(dtype=np.float32):
    return {"weights": wide(WEIGHTS, dtype), "ref_logprobs": wide(REF, dtype)}


WANT = np.log1p(np.exp(0.25))  # the chosen answer has lost 1 nat, the other has gained 1.5


@pytest.mark.parametrize(
    ("data", "logprobs"),
    [
        ({**arrays(), "lengths": LENGTHS}, wide(ROWS)),
        ({**arrays(), "mask": MASK}, jnp.asarray(wide(ROWS))),
        ({**arrays(), "mask": MASK.astype(int).tolist()}, wide(ROWS)),
        (Batch.from_padded(arrays(), MASK), Ragged.from_padded(wide(ROWS), MASK)),
        (Batch.from_padded(arrays(), LENGTHS), ROWS),
        ({"weights": WEIGHTS, "ref_logprobs": Ragged.from_rows(REF)}, Ragged.from_rows(ROWS)),
    ],
)
def test_the_ways_to_call_an_objective_agree(data, logprobs):
    loss, metrics = DPO(data, logprobs)
    assert loss == pytest.approx(WANT, rel=1e-6)
    assert metrics["pairs"] == 1


def test_a_sum_of_objectives_and_an_own_function_take_them_too():
    def own(data, logprobs):
        assert isinstance(data, Batch)
        return logprobs.dot(data["weights"]).sum(), {}

    both = objectives.weighted_sum({"dpo": DPO, "own": own}, {"own": 0.5})
    loss, _ = both({**arrays(), "lengths": LENGTHS}, wide(ROWS))
    assert loss == pytest.approx(WANT + 0.5 * (-2 - 3 - 0.5), rel=1e-6)


def test_bfloat16_is_summed_in_float32_and_its_gradient_is_bfloat16():
    logprobs = jnp.asarray(wide(ROWS), jnp.bfloat16)
    data = {**arrays(jnp.bfloat16), "lengths": LENGTHS}
    with jax.numpy_dtype_promotion("strict"):
        step = jax.jit(jax.value_and_grad(lambda lp: DPO(data, lp)[0]))
        loss, grads = step(logprobs)
    assert loss.dtype == jnp.float32
    assert loss == pytest.approx(WANT, rel=1e-6)  # these logprobs are exact in bfloat16
    assert grads.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("data", "logprobs", "message"),
    [
        (arrays(), wide(ROWS), "either a mask"),
        ({"ref_logprobs": wide(REF), "lengths": LENGTHS}, wide(ROWS), "dpo reads it"),
        ({**arrays(), "lengths": LENGTHS}, ROWS, "a mask and lengths are for padded arrays"),
        ({**arrays(), "lengths": LENGTHS}, np.ones(2), "logprobs need an axis of tokens"),
        ({**arrays(), "lengths": LENGTHS}, np.ones((2, 5)), "field 'weights'|field 'logprobs'"),
        ({"weights": wide(WEIGHTS), "ref_logprobs": REF}, ROWS, "field 'weights'"),
        ({"weights": WEIGHTS, "ref_logprobs": REF[::-1]}, ROWS, "field 'ref_logprobs': row 0"),
    ],
)
def test_what_does_not_fit_is_refused(data, logprobs, message):
    with pytest.raises((DataError, ValueError), match=message):
        DPO(data, logprobs)
