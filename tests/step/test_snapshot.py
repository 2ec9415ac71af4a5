import numpy as np
import pytest

from mintjax import Datum, ModelInput
from mintjax.errors import DataError
from mintjax.step.snapshot import snapshot


def test_what_happens_to_the_data_afterwards_changes_nothing():
    targets, weights = np.array([2, 3]), np.array([0.5, 1.0], np.float32)
    datum = Datum(ModelInput.from_ints([1, 2]), {"target_tokens": targets, "weights": weights})
    data = [datum]
    taken = snapshot(data)
    targets[:], weights[:] = 9, 9
    datum.model_input.chunks[0].tokens[:] = [9, 9]
    datum.loss_fn_inputs["advantages"] = datum.loss_fn_inputs.pop("weights")
    data.clear()
    assert len(taken) == 1
    assert taken[0].model_input.to_ints() == [1, 2]
    np.testing.assert_array_equal(taken[0].loss_fn_inputs["target_tokens"], [2, 3])
    np.testing.assert_array_equal(taken[0].loss_fn_inputs["weights"], [0.5, 1])
    assert taken.names == {"target_tokens", "weights"}


def test_nothing_cannot_be_copied():
    with pytest.raises(DataError, match="at least one"):
        snapshot([])
