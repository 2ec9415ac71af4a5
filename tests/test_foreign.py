"""Values of other libraries are taken for mintjax's own, and travel as these do."""

import itertools
import json
from types import SimpleNamespace

import jax.numpy as jnp
import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import mintjax
from mintjax import Batch, EncodedTextChunk, ModelInput, Ragged, TensorData
from mintjax.errors import DataError
from mintjax.protocol import messages
from mintjax.types import AdamParams, SamplingParams, as_datum, as_model_input, as_params

from .foreign import IMITATION, DmelChunk, ImageChunk

FINITE = st.floats(-1e6, 1e6, width=32)


@st.composite
def columns(draw, tokens):
    """Columns of one datum, of the dtypes and shapes that the protocol has."""
    shapes = st.sampled_from([(tokens,), (tokens, 3)])
    floats = st.builds(lambda s: hnp.arrays(np.float32, s, elements=FINITE), shapes)
    ints = st.builds(lambda s: hnp.arrays(np.int64, s, elements=st.integers(0, 9)), shapes)
    return {
        "target_tokens": draw(draw(ints)),
        "weights": draw(draw(floats)),
        "anything": draw(draw(st.one_of(floats, ints))),
    }


def as_sparse(types, array):
    """The form in which the SDK keeps a matrix that is mostly zeros."""
    rows, cols = np.nonzero((array != 0) | np.signbit(array))  # -0.0 is no hole
    pointers = [0, *np.cumsum(np.bincount(rows, minlength=len(array))).tolist()]
    values = array[rows, cols]
    if types is IMITATION:
        return types.TensorData(values, list(array.shape), pointers, cols.tolist())
    name, shape = array.dtype.name, list(array.shape)
    return types.TensorData(values, name, shape, pointers, cols.tolist())


def as_torch(array):
    return pytest.importorskip("torch", reason="needs torch").from_numpy(array)


@given(data=st.data(), tokens=st.lists(st.integers(0, 9), min_size=1, max_size=5))
def test_the_sdks_datum_travels_as_mintjaxs(foreign, data, tokens):
    arrays = data.draw(columns(len(tokens)))
    own = mintjax.Datum(ModelInput.from_ints(tokens), arrays)
    forms = [foreign.TensorData.from_numpy, lambda array: as_sparse(foreign, array)]
    given = {
        name: data.draw(st.sampled_from(forms[: array.ndim]))(array)
        for name, array in arrays.items()
    }
    theirs = as_datum(foreign.Datum(foreign.ModelInput.from_ints(tokens), given))
    assert messages.encode(theirs) == messages.encode(own)
    mixed = mintjax.Datum(foreign.ModelInput.from_ints(tokens), given)
    assert messages.encode(mixed) == messages.encode(own)


@pytest.mark.parametrize("form", ["jax", "torch", "imitation"])
@given(array=hnp.arrays(st.sampled_from(["f4", "f8", "f2", "i8", "i4", "u1", "?"]), (2, 3)))
def test_a_column_of_any_library_is_numpys(form, array):
    make = {"jax": jnp.asarray, "torch": as_torch, "imitation": IMITATION.TensorData.from_numpy}
    with np.errstate(over="ignore"):
        theirs = make[form](array)
    reference = np.asarray(theirs) if form == "jax" else array  # JAX has 32 bits
    try:
        own = TensorData(reference)
    except DataError as error:
        with pytest.raises(DataError, match=str(error)[:20]):
            TensorData(theirs)
        return
    assert TensorData(theirs).dtype == own.dtype
    np.testing.assert_array_equal(TensorData(theirs), own)


def test_memory_is_shared_where_the_dtype_allows(foreign):
    floats, ints = np.ones(3, np.float32), np.ones(3, np.int64)
    tensor = foreign.TensorData.from_numpy
    datum = foreign.Datum(
        foreign.ModelInput.from_ints([1, 2, 3]),
        {"weights": tensor(floats), "target_tokens": tensor(ints)},
    )
    taken = as_datum(datum)
    assert np.shares_memory(taken.loss_fn_inputs["weights"], floats)
    assert np.shares_memory(taken.loss_fn_inputs["target_tokens"], ints)
    assert taken.model_input.chunks[0].tokens is datum.model_input.chunks[0].tokens
    assert as_datum(taken) is taken
    own = [taken]
    assert Batch(own)[0] is taken
    on_device = jnp.ones(3)
    assert np.shares_memory(TensorData(on_device), np.asarray(on_device))


def test_torch_shares_its_memory_too_whatever_its_graph():
    torch = pytest.importorskip("torch", reason="needs torch")
    leaf = torch.ones(3, requires_grad=True)
    assert np.shares_memory(TensorData(leaf), leaf.detach().numpy())
    assert TensorData(torch.tensor([True, False])).dtype == bool
    np.testing.assert_array_equal(TensorData(torch.full((2,), 1.5, dtype=torch.bfloat16)), 1.5)
    with pytest.raises(DataError, match="field 'x': NumPy cannot hold this torch tensor"):
        mintjax.Datum(ModelInput.from_ints([1]), {"x": torch.ones(2).to_sparse()})


def test_padded_arrays_may_be_torchs():
    torch = pytest.importorskip("torch", reason="needs torch")
    logprobs = torch.tensor([[-1.0, -2.0], [-3.0, np.nan]], requires_grad=True)
    columns = {"weights": torch.ones(2, 2), "lengths": torch.tensor([2, 1])}
    assert mintjax.objectives.cross_entropy()(columns, logprobs)[0] == 6
    marked = Ragged.from_padded(logprobs, torch.tensor([[True, True], [True, False]]))
    np.testing.assert_array_equal(marked.sum(), [-3, -3])
    with pytest.raises(DataError, match="NumPy cannot hold this: Can't call numpy"):
        TensorData(list(logprobs[0]))


def test_an_objective_and_its_gradient_take_them(foreign):
    weights = np.array([0, 1, 2], np.float32)
    data = [
        foreign.Datum(
            foreign.ModelInput.from_ints([1, 2, 3]),
            {"weights": foreign.TensorData.from_numpy(weights)},
        )
    ]
    logprobs = [foreign.TensorData.from_numpy(np.full(3, -1, np.float32))]
    result = mintjax.value_and_logprob_grads(
        lambda data, lp: (lp.dot(data["weights"]).sum(), {}), data, logprobs
    )
    assert result.loss == -3
    np.testing.assert_array_equal(result.grads[0], weights)


@given(numbers=st.lists(st.floats(0, 1), min_size=6, max_size=6), top_k=st.integers(1, 9))
def test_parameters_travel_as_mintjaxs(foreign, numbers, top_k):
    names = AdamParams.__struct_fields__
    adam = dict(zip(names, numbers, strict=True))
    own, theirs = AdamParams(**adam), as_params(AdamParams, foreign.AdamParams(**adam))
    assert messages.encode(theirs) == messages.encode(own)
    for stop in (None, "x", ["a", "b"], [1, 2]):
        given = {"max_tokens": top_k, "top_k": top_k, "temperature": numbers[0], "stop": stop}
        own = SamplingParams(**given)
        theirs = as_params(SamplingParams, foreign.SamplingParams(**given))
        # The SDK's default is 1, which is 1.0 to whoever reads it.
        assert json.loads(messages.encode(theirs)) == json.loads(messages.encode(own))
    assert as_params(AdamParams, own_adam := AdamParams()) is own_adam


def test_what_cannot_travel_is_refused_and_says_what_to_do():
    text = IMITATION.ModelInput.from_ints([1, 2])
    sound = IMITATION.ModelInput([*text.chunks, DmelChunk()])
    with pytest.raises(DataError, match=r"datum 1, field 'model_input': .*DmelChunk.*sdk_loss"):
        Batch([IMITATION.Datum(text), IMITATION.Datum(sound)])
    with pytest.raises(DataError, match=r"datum 0, field 'model_input_spans': .*provenance"):
        Batch([IMITATION.Datum(text, {}, model_input_spans=[(0, 2)])])
    with pytest.raises(DataError, match=r"datum 0: list is no datum"):
        Batch([[1, 2]])
    with pytest.raises(DataError, match=r"list has no chunks of tokens; ModelInput.from_ints"):
        as_model_input([1, 2])
    with pytest.raises(DataError, match=r"sets type, which this client does not send"):
        as_params(AdamParams, SimpleNamespace(type="dimuon", learning_rate=1e-3, beta1=0.9))
    with pytest.raises(DataError, match=r"0.1 has nothing of AdamParams"):
        as_params(AdamParams, 0.1)


def test_an_image_of_another_library_is_taken_with_all_it_says():
    text = IMITATION.ModelInput.from_ints([1, 2])
    taken = as_model_input(IMITATION.ModelInput([*text.chunks, ImageChunk(3, b"bytes", "jpeg")]))
    assert taken == ModelInput([EncodedTextChunk([1, 2]), mintjax.ImageChunk(b"bytes", "jpeg", 3)])


def test_an_image_is_written_as_the_sdk_writes_it():
    types = pytest.importorskip("tinker", reason="needs the official SDK: pip install tinker").types
    theirs = types.ImageChunk(data=b"\x89PNG\x00\xff", format="png", expected_tokens=3)
    own = as_model_input(types.ModelInput(chunks=[theirs]))
    assert json.loads(messages.encode(own)) == {"chunks": [json.loads(theirs.model_dump_json())]}


def test_no_field_of_the_sdks_is_forgotten(foreign):
    """A field that a new version adds shall be carried, or refused, and never dropped."""
    for own, theirs in itertools.product(
        [AdamParams, SamplingParams], [foreign.AdamParams, foreign.SamplingParams]
    ):
        if own.__name__ != theirs.__name__:
            continue
        names = getattr(theirs, "model_fields", None) or theirs.__dataclass_fields__
        assert set(names) == set(own.__struct_fields__)
        assert msgspec.structs.asdict(as_params(own, theirs())) == {
            name: getattr(theirs(), name) for name in names
        }
