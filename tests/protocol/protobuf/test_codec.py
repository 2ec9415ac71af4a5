"""Protocol buffers: to the bit both ways, as the protobuf library reads and writes them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import hypothesis.extra.numpy as hnp
import ml_dtypes
import msgspec
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mintjax.errors import ConfigError, DataError, NonFiniteError
from mintjax.protocol import messages, protobuf
from mintjax.protocol.messages import SparseSampleResponse, SparseTensor
from mintjax.protocol.protobuf import messages_pb2 as pb
from mintjax.ragged import Ragged
from mintjax.tensors import TensorData
from mintjax.types import (
    Datum,
    EncodedTextChunk,
    ForwardBackwardOutput,
    ImageChunk,
    ModelInput,
    PromptAltTokens,
    SampledSequence,
    SampleResponse,
)

from . import sdk_messages

Request = messages.ForwardRequest | messages.ForwardBackwardRequest

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
integers = st.integers(-(2**63), 2**63 - 1)
shapes = hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=3)
tensors = hnp.arrays(np.float32, shapes, elements=finite) | hnp.arrays(
    np.int64, shapes, elements=integers
)
names = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)
tokens = st.lists(st.integers(0, 2**31 - 1), max_size=5).map(EncodedTextChunk)
datums = st.builds(
    Datum,
    st.lists(tokens, max_size=3).map(ModelInput),
    st.dictionaries(names.map("mine {}".format), tensors, max_size=3),
)
configs = st.none() | st.dictionaries(
    names, st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=3
)
numbers = st.none() | st.integers(1, 2**31 - 1)


def same(one: dict[str, TensorData], other: dict[str, TensorData]) -> bool:
    """To the bit, in dtype and shape."""

    def exactly(columns: dict[str, TensorData]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
        return {k: (v.dtype.name, v.shape, v.tobytes()) for k, v in columns.items()}

    return exactly(one) == exactly(other)


@st.composite
def requests(draw: st.DrawFn) -> Request:
    data = draw(st.lists(datums, max_size=4))
    given = messages.ForwardBackwardInput(data, draw(names), draw(configs))
    kind = draw(st.sampled_from([messages.ForwardRequest, messages.ForwardBackwardRequest]))
    return kind(given, draw(names), draw(numbers))


@st.composite
def outputs(draw: st.DrawFn) -> ForwardBackwardOutput:
    # entries that hold no number cannot be counted
    countable = tensors.filter(lambda array: 0 not in array.shape[1:])
    rows = st.dictionaries(st.sampled_from(["logprobs", "elementwise_loss", ""]), countable)
    return ForwardBackwardOutput(
        loss_fn_outputs=[
            {name: TensorData(array) for name, array in row.items()}
            for row in draw(st.lists(rows, max_size=5))
        ],
        metrics=draw(configs) or {},
        loss_fn_output_type=draw(st.sampled_from(["ArrayRecord", "Other"])),
    )


def fields_of(message):
    """Reads a message's fields by hand: numbers, and bytes or integers."""
    at = 0

    def varint():
        nonlocal at
        number = shift = 0
        while True:
            byte = message[at]
            at += 1
            number |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return number

    while at < len(message):
        tag = varint()
        number = varint()
        if tag & 7 == 2:
            number, at = message[at : at + number], at + number
        yield tag >> 3, number


def given_of(request):
    if isinstance(request, messages.ForwardRequest):
        return request.forward_input
    return request.forward_backward_input


class TestRequests:
    @given(requests())
    def test_what_is_encoded_is_decoded_to_the_bit(self, request):
        back = protobuf.decode_request(protobuf.encode_request(request))
        assert type(back) is type(request)
        assert (back.model_id, back.seq_id) == (request.model_id, request.seq_id)
        sent, got = given_of(request), given_of(back)
        assert (got.loss_fn, got.loss_fn_config) == (sent.loss_fn, sent.loss_fn_config)
        assert [datum.model_input for datum in got.data] == [d.model_input for d in sent.data]
        for one, other in zip(got.data, sent.data, strict=True):
            assert same(one.loss_fn_inputs, other.loss_fn_inputs)

    @given(requests())
    def test_the_library_reads_the_same_message(self, request):
        message = pb.ForwardBackwardRequest.FromString(protobuf.encode_request(request))
        sent = given_of(request)
        assert (message.model_id, message.seq_id) == (request.model_id, request.seq_id or 0)
        assert message.forward_only == isinstance(request, messages.ForwardRequest)
        assert dict(message.loss_fn_config) == (sent.loss_fn_config or {})
        assert {k: v.number for k, v in message.loss_fn_config_v2.items()} == message.loss_fn_config
        for one, other in zip(message.data, sent.data, strict=True):
            chunks = [np.frombuffer(chunk.encoded_text.tokens, "<i4") for chunk in one.model_input]
            assert [list(c) for c in chunks] == [c.tokens for c in other.model_input.chunks]
            assert one.loss_fn_inputs.keys() == other.loss_fn_inputs.keys()
            for name, tensor in one.loss_fn_inputs.items():
                column = other.loss_fn_inputs[name]
                assert tensor.dense == column.tobytes()
                assert tuple(tensor.shape) == column.shape
                assert pb.DType.Name(tensor.dtype) == f"DTYPE_{column.dtype.name.upper()}"
        size = message.ByteSize()
        message.DiscardUnknownFields()
        assert message.ByteSize() == size

    @given(requests())
    def test_what_the_library_writes_is_read_the_same(self, request):
        body = protobuf.encode_request(request)
        again = pb.ForwardBackwardRequest.FromString(body).SerializeToString()
        one, other = protobuf.decode_request(again), protobuf.decode_request(body)
        assert msgspec.to_builtins(given_of(one), enc_hook=repr) == msgspec.to_builtins(
            given_of(other), enc_hook=repr
        )

    @given(st.lists(datums, max_size=3))
    def test_datums_may_be_encoded_one_by_one(self, data):
        whole = messages.ForwardRequest(
            messages.ForwardBackwardInput(data, "cross_entropy"), "m", 1
        )
        encoded = protobuf.EncodedData(b"".join(map(protobuf.encode_datum, data)))
        parts = messages.ForwardRequest(
            messages.ForwardBackwardInput(encoded, "cross_entropy"), "m", 1
        )
        assert protobuf.encode_request(parts) == protobuf.encode_request(whole)

    @pytest.mark.parametrize(
        "view", [lambda x: x[::2], lambda x: x.T, lambda x: x[:, 1:], np.flip, np.asfortranarray]
    )
    def test_views_are_written_in_the_order_of_their_rows(self, view):
        array = view(np.arange(12, dtype=np.float32).reshape(4, 3))
        datum = Datum(ModelInput.from_ints([1]), {"mine": TensorData(array)})
        message = pb.ForwardBackwardRequest.FromString(protobuf.encode_datum(datum)).data[0]
        tensor = message.loss_fn_inputs["mine"]
        assert tensor.dense == array.tobytes()
        assert tuple(tensor.shape) == array.shape

    @given(
        st.builds(
            ImageChunk,
            st.binary(min_size=1, max_size=300),
            st.sampled_from(["png", "jpeg"]),
            st.none() | st.integers(1, 2**31 - 1),
        )
    )
    def test_an_image_is_the_message_that_the_protocol_has(self, image):
        datum = Datum(ModelInput([EncodedTextChunk([1]), image, EncodedTextChunk([2])]), {})
        body = protobuf.encode_datum(datum)
        chunks = pb.ForwardBackwardRequest.FromString(body).data[0].model_input
        assert [chunk.WhichOneof("kind") for chunk in chunks] == [
            "encoded_text",
            None,
            "encoded_text",
        ]
        # The protocol's ImageChunk is field 2 of Chunk: data 1, format 2, expected_tokens 3.
        fields = dict(fields_of(dict(fields_of(chunks[1].SerializeToString()))[2]))
        expected = {1: image.data, 2: image.format.encode()}
        if image.expected_tokens is not None:
            expected[3] = image.expected_tokens
        assert fields == expected
        request = messages.ForwardRequest(messages.ForwardBackwardInput([datum], "x"), "m")
        with pytest.raises(DataError, match=r"datum 0.*this trainer reads text only"):
            protobuf.decode_request(protobuf.encode_request(request))

    def test_a_scalar_is_read_as_an_array_of_one(self):
        datum = Datum(ModelInput.from_ints([1]), {"outcomes": TensorData(1.0)})
        request = messages.ForwardRequest(messages.ForwardBackwardInput([datum], "x"), "m")
        back = protobuf.decode_request(protobuf.encode_request(request))
        assert given_of(back).data[0].loss_fn_inputs["outcomes"].tolist() == [1.0]

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_what_json_cannot_say_is_not_said_here(self, bad):
        good = Datum(ModelInput.from_ints([1]), {"weights": [1.0]})
        spoilt = Datum(ModelInput.from_ints([1, 2]), {"weights": [1.0, bad]})
        request = messages.ForwardRequest(messages.ForwardBackwardInput([good, spoilt], "x"), "m")
        with pytest.raises(NonFiniteError, match=r"datum 1, position 1, input 'weights'") as caught:
            protobuf.encode_request(request)
        assert (caught.value.datum, caught.value.position) == (1, 1)

    def test_a_token_that_is_no_int32(self):
        datum = Datum(ModelInput.from_ints([1, 2**31]), {})
        request = messages.ForwardRequest(messages.ForwardBackwardInput([datum], "x"), "m")
        with pytest.raises(DataError, match=r"datum 0, field 'model_input': .*int32"):
            protobuf.encode_request(request)

    @pytest.mark.parametrize("seq_id", [-1, 2**31])
    def test_a_number_that_is_no_int32(self, seq_id):
        request = messages.ForwardRequest(messages.ForwardBackwardInput([], "x"), "m", seq_id)
        with pytest.raises(DataError, match="field 'seq_id'"):
            protobuf.encode_request(request)


def message_of(tensor: pb.Tensor, name: str = "mine") -> bytes:
    """A request whose second datum has one column, as given."""
    request = pb.ForwardBackwardRequest(model_id="m", seq_id=3)
    for _ in range(2):
        request.data.add().model_input.add().encoded_text.tokens = b"\1\0\0\0\2\0\0\0"
    request.data[1].loss_fn_inputs[name].CopyFrom(tensor)
    return request.SerializeToString()


def read(tensor: pb.Tensor) -> TensorData:
    return given_of(protobuf.decode_request(message_of(tensor))).data[1].loss_fn_inputs["mine"]


class TestTensors:
    @given(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=5))
    def test_int32_is_widened(self, values):
        sent = np.array(values, "<i4")
        got = read(pb.Tensor(dense=sent.tobytes(), dtype=3, shape=[len(values)]))
        assert got.dtype == np.int64
        assert got.tolist() == values

    @given(hnp.arrays(np.uint16, 5))
    def test_bfloat16_is_the_upper_half_of_a_float32(self, bits):
        expected = bits.view(ml_dtypes.bfloat16).astype(np.float32)
        tensor = pb.Tensor(dense=bits.tobytes(), dtype=4, shape=[5])
        if np.isfinite(expected).all():
            assert read(tensor).tobytes() == expected.tobytes()
        else:
            with pytest.raises(DataError, match="not finite"):
                read(tensor)

    @given(
        hnp.arrays(
            np.float32,
            hnp.array_shapes(min_dims=2, max_dims=2),
            elements=st.sampled_from([0.0, 1.5, -2.0]),
        )
    )
    def test_sparse_rows_are_made_dense(self, dense):
        at = np.nonzero(dense)
        counts = np.count_nonzero(dense, axis=1)
        csr = pb.SparseCsr(
            values=dense[at].tobytes(),
            crow_indices=np.cumsum([0, *counts]).astype("<i8").tobytes(),
            col_indices=at[1].astype("<i8").tobytes(),
        )
        got = read(pb.Tensor(sparse_csr=csr, dtype=1, shape=dense.shape))
        np.testing.assert_array_equal(got, dense)

    def test_numbers_without_a_shape_are_flat(self):
        assert read(pb.Tensor(dense=b"\0" * 8, dtype=1)).shape == (2,)
        assert read(pb.Tensor(dense=b"\0" * 8, dtype=2)).shape == (1,)

    @pytest.mark.parametrize(
        ("tensor", "words"),
        [
            (pb.Tensor(dense=b"123", dtype=1), "3 bytes do not divide into numbers of 4 bytes"),
            (pb.Tensor(dense=b"1234", dtype=2), "4 bytes do not divide into numbers of 8 bytes"),
            (pb.Tensor(dense=b"1234", dtype=0), "no dtype of number 0"),
            (pb.Tensor(dense=b"1234", dtype=9), "no dtype of number 9"),
            (pb.Tensor(dense=b"\0" * 8, dtype=1, shape=[3]), "do not fill the shape"),
            (pb.Tensor(dense=b"\0" * 8, dtype=1, shape=[-1]), "negative size"),
            (pb.Tensor(dense=b"\0" * 8, dtype=1, shape=[2**62, 2**62]), "do not fill"),
            (pb.Tensor(dtype=1, shape=[1]), "holds no numbers"),
            (pb.Tensor(dense=b"\0\0\x80\x7f", dtype=1, shape=[1]), "inf at position 0"),
            (pb.Tensor(dense=b"\0\0\xc0\x7f", dtype=1, shape=[1]), "nan at position 0"),
            (pb.Tensor(sparse_csr=pb.SparseCsr(), dtype=1, shape=[1, 1]), "sparse"),
            (pb.Tensor(sparse_csr=pb.SparseCsr(), dtype=1, shape=[1]), "sparse"),
            (
                pb.Tensor(
                    sparse_csr=pb.SparseCsr(crow_indices=b"\0" * 16),
                    dtype=1,
                    shape=[1, 2**62],
                ),
                "too large",
            ),
        ],
    )
    def test_what_is_no_tensor(self, tensor, words):
        with pytest.raises(DataError, match=words) as caught:
            read(tensor)
        assert (caught.value.datum, caught.value.field) == (1, "mine")

    def test_a_chunk_that_is_no_text(self):
        image = b"\x12\x02\x0a\x00"  # field 2 of a chunk
        with pytest.raises(DataError, match="'model_input': a chunk is not text"):
            protobuf.decode_request(b"\x1a\x06\x0a\x04" + image)

    @pytest.mark.parametrize("token", [-1, -(2**31)])
    def test_a_negative_token(self, token):
        request = pb.ForwardBackwardRequest()
        chunk = request.data.add().model_input.add()
        chunk.encoded_text.tokens = np.array([0, token], "<i4").tobytes()
        with pytest.raises(DataError, match=f"datum 0.*{token} at position 1 is negative"):
            protobuf.decode_request(request.SerializeToString())

    def test_a_setting_without_a_value(self):
        request = pb.ForwardBackwardRequest()
        request.loss_fn_config_v2["kind"].SetInParent()
        with pytest.raises(DataError, match=r"kind.*no value"):
            protobuf.decode_request(request.SerializeToString())

    def test_a_setting_that_is_not_finite(self):
        request = pb.ForwardBackwardRequest()
        request.loss_fn_config_v2["kind"].number = np.nan
        with pytest.raises(DataError, match=r"kind.*not finite"):
            protobuf.decode_request(request.SerializeToString())

    def test_a_setting_may_be_a_text(self):
        request = messages.ForwardBackwardRequest(
            messages.ForwardBackwardInput([], "custom", {"loss_id": "é", "a": 1.5}), "m", 1
        )
        body = protobuf.encode_request(request)
        assert given_of(protobuf.decode_request(body)).loss_fn_config == {"loss_id": "é", "a": 1.5}
        parsed = pb.ForwardBackwardRequest.FromString(body)
        assert parsed.loss_fn_config_v2["loss_id"].text == "é"
        assert dict(parsed.loss_fn_config) == {"a": 1.5}

    def test_the_newer_settings_win(self):
        request = pb.ForwardBackwardRequest(loss_fn_config={"a": 1.0, "b": 2.0})
        request.loss_fn_config_v2["b"].number = 3.0
        back = protobuf.decode_request(request.SerializeToString())
        assert given_of(back).loss_fn_config == {"a": 1.0, "b": 3.0}

    def test_the_number_of_a_request_that_is_refused(self):
        body = message_of(pb.Tensor(dense=b"123", dtype=1))
        assert protobuf.number_of(body) == ("m", 3)
        assert protobuf.number_of(b"\xff") is None


class TestOutputs:
    @given(outputs())
    def test_what_is_encoded_is_decoded_to_the_bit(self, output):
        back = protobuf.decode_output(protobuf.encode_output(output))
        assert back.metrics == output.metrics
        assert back.loss_fn_output_type == output.loss_fn_output_type
        for one, other in zip(back.loss_fn_outputs, output.loss_fn_outputs, strict=True):
            assert same(one, other)

    @given(outputs())
    def test_what_the_library_writes_is_read_the_same(self, output):
        body = protobuf.encode_output(output)
        again = pb.ForwardBackwardOutput.FromString(body).SerializeToString()
        one, other = protobuf.decode_output(again), protobuf.decode_output(body)
        assert one.metrics == other.metrics
        for mine, theirs in zip(one.loss_fn_outputs, other.loss_fn_outputs, strict=True):
            assert same(mine, theirs)

    def test_a_result_without_outputs(self):
        output = ForwardBackwardOutput(loss_fn_outputs=[], metrics={"seconds": 0.5})
        back = protobuf.decode_output(protobuf.encode_output(output))
        assert (back.loss_fn_outputs, back.metrics) == ([], {"seconds": 0.5})

    def test_the_library_reads_rows_one_after_another(self):
        rows = [np.arange(n, dtype=np.float32) for n in (2, 0, 3)]
        output = ForwardBackwardOutput(loss_fn_outputs=[{"logprobs": TensorData(r)} for r in rows])
        [record] = pb.ForwardBackwardOutput.FromString(
            protobuf.encode_output(output)
        ).loss_fn_outputs
        field = record.fields["logprobs"]
        assert record.num_datums == 3
        assert np.frombuffer(field.data, "<f4").tolist() == [0, 1, 0, 1, 2]
        assert np.frombuffer(field.offsets, "<i8").tolist() == [0, 8, 8, 20]
        assert list(field.trailing_shape) == []

    def test_rows_are_views_of_the_body_that_a_ragged_takes_as_they_are(self):
        rows = [np.arange(n, dtype=np.float32) for n in (2, 5, 3)]
        output = ForwardBackwardOutput(loss_fn_outputs=[{"logprobs": TensorData(r)} for r in rows])
        sent = protobuf.encode_output(output)
        got = protobuf.decode_output(sent).logprobs
        body = np.frombuffer(sent, np.uint8)
        assert all(np.shares_memory(row, body) for row in got)
        ragged = Ragged.from_rows(got)
        assert all(np.shares_memory(one, other) for one, other in zip(ragged, got, strict=True))
        np.testing.assert_array_equal(ragged.sum(), [1, 10, 3])

    def test_records_written_before_they_were_counted(self):
        message = pb.ForwardBackwardOutput(loss_fn_output_type="module:ArrayRecord")
        for _ in range(2):
            field = message.loss_fn_outputs.add().fields["logprobs"]
            field.data, field.dtype = np.arange(3, dtype="<f4").tobytes(), 1
            field.offsets = np.array([0, 4, 12], "<i8").tobytes()
        got = protobuf.decode_output(message.SerializeToString())
        assert [row.tolist() for row in got.logprobs] == [[0], [1, 2], [0], [1, 2]]
        assert got.loss_fn_output_type == "ArrayRecord"

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"offsets": [0, 4]}, "do not cut 12 bytes into 2 rows"),
            ({"offsets": []}, "do not cut"),
            ({"offsets": [0, 4, 8]}, "do not cut"),
            ({"offsets": [0, 4, 16]}, "do not cut"),
            ({"offsets": [4, 8, 12]}, "do not cut"),
            ({"offsets": [0, 3, 12]}, "do not cut"),
            ({"offsets": [0, 16, 12]}, "do not cut"),
            ({"offsets": [0, -4, 12]}, "do not cut"),
            ({"offsets": [0, 2**62, 12]}, "do not cut"),
            ({"trailing_shape": [2]}, "do not cut"),
            ({"trailing_shape": [2**62, 2**62]}, "do not cut"),
            ({"trailing_shape": [0]}, "logprobs"),
            ({"trailing_shape": [-3]}, "entries of shape"),
            ({"trailing_shape": [1] * 100}, "entries of shape"),
            ({"dtype": 2}, "12 bytes do not divide into numbers of 8 bytes"),
            ({"dtype": 7}, "no dtype of number 7"),
        ],
    )
    def test_what_is_no_record(self, change, words):
        message = pb.ForwardBackwardOutput()
        record = message.loss_fn_outputs.add(num_datums=2)
        field = record.fields["logprobs"]
        columns = {
            "data": b"\0" * 12,
            "offsets": [0, 4, 12],
            "dtype": 1,
            "trailing_shape": [],
            **change,
        }
        field.data, field.dtype = columns["data"], columns["dtype"]
        field.offsets = np.array(columns["offsets"], "<i8").tobytes()
        field.trailing_shape.extend(columns["trailing_shape"])
        with pytest.raises(DataError, match=words) as caught:
            protobuf.decode_output(message.SerializeToString())
        assert caught.value.field == "logprobs"

    @pytest.mark.parametrize("counts", [[-1], [2**62], [2**20, 1]])
    def test_a_record_of_nothing_that_claims_much(self, counts):
        message = pb.ForwardBackwardOutput()
        for count in counts:
            message.loss_fn_outputs.add(num_datums=count)
        with pytest.raises(DataError, match="datums"):
            protobuf.decode_output(message.SerializeToString())

    def test_a_metric_that_is_not_finite(self):
        message = pb.ForwardBackwardOutput(metrics={"loss:sum": np.inf})
        with pytest.raises(DataError, match=r"loss:sum.*inf is not finite"):
            protobuf.decode_output(message.SerializeToString())
        output = ForwardBackwardOutput(loss_fn_outputs=[{"logprobs": TensorData([1.0, np.nan])}])
        with pytest.raises(NonFiniteError, match=r"datum 0, position 1, output 'logprobs'"):
            protobuf.encode_output(output)


def outcome(decode, body):
    try:
        return decode(body)
    except DataError as error:
        return error


class TestGarbage:
    @given(st.binary(max_size=200))
    @example(b"\xff\xff\xff\xff")
    @example(b"\x0a\xff\xff\xff\xff\x0f")
    @example(b"{}")
    def test_bytes(self, body):
        for decode in (protobuf.decode_output, protobuf.decode_request):
            got = outcome(decode, body)
            assert isinstance(got, DataError | ForwardBackwardOutput | Request)

    @given(outputs(), st.data())
    def test_a_message_that_was_spoilt(self, output, data):
        body = bytearray(protobuf.encode_output(output))
        for _ in range(data.draw(st.integers(1, 3))):
            if body:
                body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
        spoilt = bytes(body[: data.draw(st.integers(0, len(body)))])
        got = outcome(protobuf.decode_output, spoilt)
        if not isinstance(got, DataError):  # then it is what the library reads
            message = pb.ForwardBackwardOutput.FromString(spoilt)
            assert got.metrics == dict(message.metrics)
            self.check_rows(got.loss_fn_outputs, message)

    def check_rows(self, rows, message):
        first = 0
        for record in message.loss_fn_outputs:
            count = record.num_datums
            for name, field in record.fields.items():
                offsets = np.frombuffer(field.offsets, "<i8")
                count = count or len(offsets) - 1
                for i, row in enumerate(rows[first : first + count]):
                    sent = field.data[offsets[i] : offsets[i + 1]]
                    if field.dtype in (1, 2):
                        assert row[name].tobytes() == sent
                    assert row[name].shape[1:] == tuple(field.trailing_shape)
            first += count
        assert first == len(rows)


class TestTheOfficialClient:
    """What the message classes of the official client wrote, and what is in it."""

    golden = json.loads((Path(__file__).parent / "golden.json").read_text())

    def test_its_request(self):
        request = protobuf.decode_request(bytes.fromhex(self.golden["request"]))
        assert sdk_messages.plain_request(request) == self.golden["request_values"]

    def test_its_output(self):
        output = protobuf.decode_output(bytes.fromhex(self.golden["output"]))
        assert sdk_messages.plain_output(output) == self.golden["output_values"]


@pytest.mark.parametrize("prompt", [None, [None, -0.5]])
@pytest.mark.parametrize("logprobs", [None, [-1.0, -2.0]])
def test_a_sample_may_be_without_logprobs(logprobs, prompt):
    sequence = SampledSequence(tokens=[3, 4], logprobs=logprobs, stop_reason="stop")
    encoded = protobuf.encode_sample(SampleResponse(sequences=[sequence], prompt_logprobs=prompt))
    message = pb.SampleResponse.FromString(encoded)
    [found] = message.sequences
    assert np.frombuffer(found.tokens, "<i4").tolist() == [3, 4]
    assert np.frombuffer(found.logprobs, "<f4").tolist() == (logprobs or [])
    assert np.isnan(np.frombuffer(message.prompt_logprobs, "<f4")).tolist() == (
        [] if prompt is None else [True, False]
    )


topk_rows = st.lists(
    st.none() | st.lists(st.tuples(st.integers(1, 9), finite), min_size=1, max_size=3), max_size=3
)


def matrices(dtype):
    elements = finite if dtype == "float32" else st.integers(0, 2**31 - 1)
    return hnp.arrays(
        dtype, hnp.array_shapes(min_dims=2, max_dims=2, max_side=3), elements=elements
    )


@st.composite
def alternatives(draw):
    tokens = draw(matrices("int64"))
    logprobs = draw(hnp.arrays("float32", tokens.shape, elements=finite))
    return PromptAltTokens(tokens=TensorData(tokens), logprobs=TensorData(logprobs))


sequences = st.builds(
    SampledSequence,
    tokens=st.lists(st.integers(0, 2**31 - 1), max_size=5),
    logprobs=st.none() | st.lists(finite, max_size=5),
    stop_reason=st.sampled_from(["stop", "length"]),
    topk_logprobs=st.none() | topk_rows,
)
samples = st.builds(
    SampleResponse,
    sequences=st.lists(sequences, max_size=3),
    prompt_logprobs=st.none() | st.lists(st.none() | finite, max_size=5),
    topk_prompt_logprobs=st.none() | topk_rows,
    target_prompt_logprobs=st.none() | st.builds(TensorData, matrices("float32")),
    prompt_alt_tokens=st.none() | alternatives(),
    prompt_cache_hit_tokens=st.integers(0, 2**31 - 1),
)


def plain(response):
    """Everything in a response as lists, with the dtypes and shapes of its arrays."""
    return messages.encode(response)


@given(samples)
def test_samples_are_read_as_they_were_written(response):
    encoded = protobuf.encode_sample(response)
    assert plain(protobuf.decode_sample(encoded)) == plain(response)
    as_json = messages.decode(messages.encode(response), SampleResponse)
    assert plain(as_json) == plain(response)


@given(matrices("float32"))
def test_sparse_targets_are_read_as_the_dense_matrix(array):
    rows, cols = np.nonzero(array)
    sparse = SparseTensor(
        data=array[rows, cols].tolist(),
        dtype="float32",
        shape=list(array.shape),
        sparse_crow_indices=[0, *np.cumsum(np.bincount(rows, minlength=len(array))).tolist()],
        sparse_col_indices=cols.tolist(),
    )
    response = SparseSampleResponse(sequences=[], target_prompt_logprobs=sparse)
    encoded = protobuf.encode_sample(response)
    written = pb.SampleResponse.FromString(encoded).target_prompt_logprobs
    assert list(written.shape) == list(array.shape)
    indices = np.frombuffer(written.sparse_csr.col_indices, "<i8")
    assert indices.tolist() == sparse.sparse_col_indices
    for read in (
        protobuf.decode_sample(encoded),
        messages.decode(messages.encode(response), SampleResponse),
    ):
        np.testing.assert_array_equal(read.target_prompt_logprobs, array)


@given(samples)
def test_samples_that_the_library_wrote_are_read(response):
    message = pb.SampleResponse()
    for sequence in response.sequences:
        written = message.sequences.add()
        written.stop_reason = pb.StopReason.Value(f"STOP_REASON_{sequence.stop_reason.upper()}")
        written.tokens = np.array(sequence.tokens, "<i4").tobytes()
        if sequence.logprobs is not None:
            written.logprobs = np.array(sequence.logprobs, "<f4").tobytes()
        if sequence.topk_logprobs is not None:
            write_topk(written.topk_sampled_logprobs, sequence.topk_logprobs)
    if response.topk_prompt_logprobs is not None:
        write_topk(message.topk_prompt_logprobs, response.topk_prompt_logprobs)
    message.prompt_cache_hit_tokens = response.prompt_cache_hit_tokens
    if response.target_prompt_logprobs is not None:
        write_tensor(message.target_prompt_logprobs, response.target_prompt_logprobs)
    if (drawn := response.prompt_alt_tokens) is not None:
        write_tensor(message.prompt_alt_tokens.tokens, drawn.tokens)
        write_tensor(message.prompt_alt_tokens.logprobs, drawn.logprobs)
    if response.prompt_logprobs is not None:
        row = [np.nan if one is None else one for one in response.prompt_logprobs]
        message.prompt_logprobs = np.array(row, "<f4").tobytes()
    body = message.SerializeToString() + b"\x7a\x02\x08\x01"  # a field of a newer version
    assert plain(protobuf.decode_sample(body)) == plain(response)
    assert pb.SampleResponse.FromString(protobuf.encode_sample(response)) == message


def write_topk(written, rows):
    written.k = max((len(row) for row in rows if row), default=0)
    written.length = len(rows)
    padded = [[*(row or []), *[(0, -99999.0)] * (written.k - len(row or []))] for row in rows]
    flat = [cell for row in padded for cell in row]
    written.token_ids = np.array([token for token, _ in flat], "<i4").tobytes()
    written.logprobs = np.array([logprob for _, logprob in flat], "<f4").tobytes()


def write_tensor(written, array):
    written.dense = array.tobytes()
    written.dtype = pb.DTYPE_INT64 if array.dtype == np.int64 else pb.DTYPE_FLOAT32
    written.shape.extend(array.shape)


@given(samples, st.data())
def test_what_is_read_from_garbage_in_place_of_samples_is_a_response(response, data):
    encoded = protobuf.encode_sample(response)
    cut = data.draw(st.integers(0, len(encoded)))
    change = data.draw(st.binary(max_size=3))
    try:
        found = protobuf.decode_sample(encoded[:cut] + change)
    except DataError:  # and nothing else
        return
    for sequence in found.sequences:
        assert sequence.stop_reason in ("stop", "length")
        assert np.isfinite(sequence.logprobs or []).all()
    assert np.isfinite([x for x in found.prompt_logprobs or [] if x is not None]).all()


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"\x0a\x02\x08\x07", "a stop reason of 7"),
        (b"\x0a\x06\x1a\x04\x00\x00\xc0\x7f", "nan at position 0 is not finite"),
        (b"\x0a\x05\x12\x03\x00\x00\x00", "3 bytes do not divide into numbers of 4 bytes"),
        (b"\x0a\x09\x08", "not a SampleResponse: it ends within a field"),
        (b"\x1a\x0a\x0a\x04abcd\x18\x02\x20\x01", "1 tokens and 0 logprobs at 1 positions of 2"),
        (b"\x1a\x06\x20\xff\xff\xff\xff\x0f", "at 4294967295 positions of 0 each"),
        (b"\x2a\x0a\x0a\x04abcd\x18\x01\x20\x03", "do not fill"),
        (b"\x2a\x13\x0a\x04abcd\x18\x01\x20" + b"\xff" * 9 + b"\x01", r"a shape of \[-1\]"),
        (b"\x2a\x0a\x0a\x04\x00\x00\xc0\x7f\x18\x01\x20\x01", "nan at position 0 is not finite"),
        (b"\x32\x00", "do not go together"),
    ],
)
def test_samples_that_cannot_be_are_refused(body, words):
    with pytest.raises(DataError, match=words):
        protobuf.decode_sample(body)


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "mintjax.protocol.protobuf.messages_pb2")
    for name in [name for name in sys.modules if name.split(".")[0] == "google"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "google.protobuf", None)
    for call in (protobuf.require, lambda: protobuf.decode_request(b"")):
        with pytest.raises(ConfigError, match=r'pip install "mintjax\[protobuf\]"'):
            call()
    output = ForwardBackwardOutput(loss_fn_outputs=[{"logprobs": TensorData([-1.0])}])
    assert protobuf.decode_output(protobuf.encode_output(output)).logprobs == [-1.0]
