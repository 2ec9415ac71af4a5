"""Objectives of mintjax under the official SDK's ``forward_backward_custom``."""

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mintjax
from mintjax import objectives
from mintjax.errors import DataError, NonFiniteError
from mintjax.interop import sdk_loss, torch_objective
from mintjax.protocol.messages import ClientConfigResponse

from .foreign import IMITATION, ImageChunk

NEEDS_TORCH = "needs torch: pip install torch==2.13.0"


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason=NEEDS_TORCH)


def first_only(data, logprobs):
    return logprobs.sum()[0] * 2.0, {"rows": len(data)}


def anchored(data, logprobs):
    """Reads columns of several kinds, which the SDK knows nothing about."""
    shifted = (logprobs - data["anchor"]) * data["weights"]
    return (shifted.sum() * data["scale"]).sum(), {"anchor": data["anchor"].total()}


OBJECTIVES = {
    "bradley_terry": objectives.bradley_terry(),
    "ppo": objectives.ppo(),
    "dro": objectives.dro(),
    "first_only": first_only,
    "anchored": anchored,
}


def columns_of(rng, size):
    return {
        "target_tokens": rng.integers(0, 99, size),
        "weights": rng.random(size).astype(np.float32),
        "logprobs": -rng.exponential(size=size).astype(np.float32),
        "advantages": rng.standard_normal(size).astype(np.float32),
        "anchor": rng.standard_normal(size).astype(np.float32),
        "scale": np.array(rng.random(), np.float32),
    }


def make(types, sizes, seed=0):
    """The same datums as mintjax's and as another library's, and their logprobs."""
    rng = np.random.default_rng(seed)
    own, theirs, rows = [], [], []
    for size in sizes:
        columns = columns_of(rng, size)
        tokens = rng.integers(0, 99, size).tolist()
        own.append(mintjax.Datum(mintjax.ModelInput.from_ints(tokens), columns))
        given = {name: types.TensorData.from_numpy(array) for name, array in columns.items()}
        theirs.append(types.Datum(types.ModelInput.from_ints(tokens), given))
        rows.append(-rng.exponential(size=size).astype(np.float32))
    return own, theirs, rows


def as_the_sdk_does(torch, callback, data, rows):
    """The part of the SDK's custom step that is here: loss, metrics and gradient."""
    leaves = [torch.tensor(row).clone().detach().requires_grad_(True) for row in rows]
    loss, metrics = callback(data, leaves)
    loss.backward()
    assert all(leaf.grad is not None for leaf in leaves)
    return loss.item(), metrics, [leaf.grad.numpy() for leaf in leaves]


@pytest.mark.parametrize("name", OBJECTIVES)
@settings(max_examples=5)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=3), seed=st.integers(0, 99))
def test_the_sdk_gets_the_value_the_metrics_and_every_leafs_gradient(
    foreign, torch, name, sizes, seed
):
    objective = OBJECTIVES[name]
    own, theirs, rows = make(foreign, [*sizes, *sizes], seed)
    expected = mintjax.value_and_logprob_grads(objective, own, rows)
    loss, metrics, grads = as_the_sdk_does(torch, sdk_loss(objective), theirs, rows)
    assert (loss, metrics) == (expected.loss, expected.metrics)
    for grad, ours in zip(grads, expected.grads, strict=True):
        np.testing.assert_array_equal(grad, ours)


def test_it_scales_and_adds_up_with_what_torch_computes(torch):
    _, theirs, rows = make(IMITATION, [4, 3])
    once = as_the_sdk_does(torch, sdk_loss(objectives.ppo()), theirs, rows)

    def mixed(data, logprobs):
        loss, metrics = sdk_loss(objectives.ppo())(data, logprobs)
        return 0.5 * loss + logprobs[0].sum(), metrics

    loss, _, grads = as_the_sdk_does(torch, mixed, theirs, rows)
    assert loss == pytest.approx(0.5 * once[0] + rows[0].sum(), rel=1e-6)
    np.testing.assert_allclose(grads[0], 0.5 * once[2][0] + 1, rtol=1e-6)
    np.testing.assert_allclose(grads[1], 0.5 * once[2][1], rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_rows_of_several_candidates_and_of_any_float(torch, dtype):
    rows = [torch.full((n, 3), -2.0, dtype=getattr(torch, dtype)) for n in (2, 4)]
    leaves = [row.requires_grad_(True) for row in rows]
    data = [
        IMITATION.Datum(
            IMITATION.ModelInput.from_ints([1] * n),
            {"w": IMITATION.TensorData.from_numpy(np.arange(3 * n, dtype="f4").reshape(n, 3))},
        )
        for n in (2, 4)
    ]
    loss, _ = sdk_loss(lambda data, lp: ((lp * data["w"]).total(), {}))(data, leaves)
    loss.backward()
    for leaf, datum in zip(leaves, data, strict=True):
        assert leaf.grad.dtype == leaf.dtype
        np.testing.assert_array_equal(leaf.grad.float(), datum.loss_fn_inputs["w"].numbers)


def test_datums_with_images_are_the_sdks_to_send(torch):
    chunks = [*IMITATION.ModelInput.from_ints([1, 2]).chunks, ImageChunk(expected_tokens=3)]
    weights = IMITATION.TensorData.from_numpy(np.arange(5, dtype=np.float32))
    data = [IMITATION.Datum(IMITATION.ModelInput(chunks), {"weights": weights})]
    loss = sdk_loss(lambda data, lp: (lp.dot(data["weights"]).sum(), {}))
    _, _, (grad,) = as_the_sdk_does(torch, loss, data, [np.zeros(5, np.float32)])
    np.testing.assert_array_equal(grad, np.arange(5))


def test_a_loss_that_is_not_finite_never_reaches_the_sdk(torch):
    _, theirs, rows = make(IMITATION, [3])
    with pytest.raises(NonFiniteError, match="the loss of"):
        as_the_sdk_does(torch, sdk_loss(lambda d, lp: (lp.total() / 0.0, {})), theirs, rows)


def test_a_loss_of_torchs_own_passes_through(torch):
    _, theirs, rows = make(IMITATION, [3, 2])
    loss = torch_objective(lambda data, lps: (sum((lp**2).sum() for lp in lps), {}))
    _, _, grads = as_the_sdk_does(torch, sdk_loss(loss), theirs, rows)
    np.testing.assert_allclose(grads[1], 2 * rows[1], rtol=1e-6)


def sent_by(data, *names):
    """The datums with the columns that every version of the SDK takes."""
    return [
        type(datum)(datum.model_input, {name: datum.loss_fn_inputs[name] for name in names})
        for datum in data
    ]


def test_columns_that_stay_here_belong_to_the_datums_that_travel(torch):
    own, theirs, rows = make(IMITATION, [4, 3])
    expected = as_the_sdk_does(torch, sdk_loss(objectives.ppo()), theirs, rows)
    narrow = sent_by(theirs, "target_tokens")
    loss, _, grads = as_the_sdk_does(torch, sdk_loss(objectives.ppo(), own), narrow, rows)
    assert loss == expected[0]
    np.testing.assert_array_equal(np.concatenate(grads), np.concatenate(expected[2]))
    with pytest.raises(DataError, match="datum 0, field 'target_tokens': it differs"):
        as_the_sdk_does(torch, sdk_loss(objectives.ppo(), own[::-1]), narrow, rows)
    with pytest.raises(DataError, match="reads 1 datums, and the SDK has 2"):
        as_the_sdk_does(torch, sdk_loss(objectives.ppo(), own[:1]), narrow, rows)


def drive_the_sdk(url):
    """Two steps of the official SDK with each of two objectives: the metrics of each."""
    import tinker

    service = tinker.ServiceClient(base_url=url, api_key="tml-test")
    takes_all = tuple(map(int, tinker.__version__.split(".")[:2])) >= (0, 38)
    _, data, _ = make(tinker.types, SIZES)
    narrow = sent_by(data, "target_tokens", "weights")
    for name in DRIVEN:
        model = service.create_lora_training_client("mintjax/nano", 4, seed=1)
        for step in range(2):
            if takes_all and step == 0:
                update = model.forward_backward_custom(data, sdk_loss(OBJECTIVES[name]))
            else:
                loss_fn = sdk_loss(OBJECTIVES[name], data)
                update = model.forward_backward_custom(narrow, loss_fn)
            yield update.result().metrics
            model.optim_step(tinker.AdamParams(learning_rate=1e-2)).result()


SIZES = [5, 9, 3, 7]
DRIVEN = ["bradley_terry", "anchored"]


def test_the_sdk_trains_as_mintjax_does(torch, engine):
    pytest.importorskip("tinker", reason="needs the official SDK: pip install tinker")
    local = pytest.importorskip("mintjax.local", reason="needs the extra local")
    config = ClientConfigResponse(proto_write_fwdbwd=True)
    run = "import json, sys; from tests.test_interop import drive_the_sdk as drive;"
    run += "print(json.dumps(list(drive(sys.argv[1]))))"
    with (
        local.running_server(engine, api_key="tml-test", config=config) as url,
        # In a process of its own, because the SDK leaves sockets and threads behind.
        subprocess.Popen([sys.executable, "-c", run, url], stdout=subprocess.PIPE) as sdk,
        local.trainer(engine) as service,
    ):
        own, _, _ = make(IMITATION, SIZES)
        expected = []
        for name in DRIVEN:
            with service.create_lora_training_client("mintjax/nano", 4, seed=1) as model:
                for _ in range(2):
                    update = model.forward_backward_custom(own, OBJECTIVES[name])
                    expected.append(update.result().metrics)
                    model.optim_step(mintjax.AdamParams(learning_rate=1e-2)).result()
        found = json.loads(sdk.communicate()[0])
    assert len(found) == len(expected) == 2 * len(DRIVEN)
    for theirs, ours in zip(found, expected, strict=True):
        for name in ours.keys() - {"loss:sum", "surrogate_loss:sum"}:  # the SDK's versions differ
            assert theirs[name] == pytest.approx(ours[name], rel=1e-4, abs=1e-5), name
