"""MinT's own endpoints."""

from __future__ import annotations

import numpy as np
import pytest

from mintjax import mint
from mintjax.errors import DataError, NonFiniteError
from mintjax.tensors import TensorData
from mintjax.types import AdamParams, ModelInput


def one(weights=(1.0, 0.0), tokens=(1, 2)):
    given = ModelInput.from_ints(list(tokens))
    return mint.ReverseKLDatum(given, given, TensorData([2, 3]), TensorData(list(weights)))


def test_reverse_kl_stands_in_the_line(client, trainer):
    future = mint.forward_backward_reverse_kl(client, [one(), one()], "tinker://reference", 2.0)
    client.optim_step(AdamParams()).result(5)
    output = future.result(5)
    assert [np.asarray(o.loss).tolist() for o in output.outputs] == [[0.5], [0.5]]
    assert output.metrics == {"kl:mean": 0.5}
    (body,) = trainer.bodies("mint/forward_backward_reverse_kl")
    assert body["seq_id"] == 1
    assert body["type"] == "mint_forward_backward_reverse_kl"
    assert body["temperature"] == 2.0
    assert body["reference_model_path"] == "tinker://reference"
    assert body["data"][0]["weights"] == {"data": [1.0, 0.0], "dtype": "float32", "shape": [2]}


@pytest.mark.parametrize(
    ("data", "temperature", "error"),
    [
        ([], 1.0, DataError),
        ([one()], 0.0, DataError),
        ([one(tokens=(1,))], 1.0, DataError),
        ([one(weights=(float("nan"), 0.0))], 1.0, NonFiniteError),
    ],
)
def test_reverse_kl_refuses(client, trainer, data, temperature, error):
    with pytest.raises(error):
        mint.forward_backward_reverse_kl(client, data, "tinker://reference", temperature)
    assert trainer.bodies("mint/forward_backward_reverse_kl") == []


def test_checkpoints_are_interpolated(service, trainer):
    made = mint.interpolate_checkpoints(service, ["tinker://a", "tinker://b"], [0.5, 0.5]).result(5)
    assert made.path == "tinker://mixed"
    (body,) = trainer.bodies("mint/checkpoints/interpolate")
    assert body["coefficients"] == [0.5, 0.5]
    assert body["output_checkpoint_type"] == "sampler"
    for coefficients in ([0.5], [0.5, float("inf")]):
        with pytest.raises(DataError, match="coefficients"):
            mint.interpolate_checkpoints(service, ["tinker://a", "tinker://b"], coefficients)
