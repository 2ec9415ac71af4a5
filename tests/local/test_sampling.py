"""Sampling: seeded, within its limits, and consistent with the forward pass."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mintjax.errors import DataError
from mintjax.local import sampling, tokenizer
from mintjax.local.model import BASE_MODELS
from mintjax.local.sampling import Wanted
from mintjax.local.tokenizer import END, VOCAB_SIZE
from mintjax.protocol.messages import PromptTargets, SampleRequest
from mintjax.types import Datum, ModelInput, SamplingParams

from .data import batch

PROMPT = tokenizer.encode("to be or not")
NANO = BASE_MODELS["mintjax/nano"]


@pytest.fixture(scope="module")
def model_and_source(engine):
    """A model that was trained a little, and its sampler checkpoint."""
    from mintjax.types import AdamParams, LoraConfig

    model_id = engine.create_model("mintjax/nano", LoraConfig(4, seed=1))
    engine.forward_backward(model_id, batch(), "cross_entropy")
    engine.optim_step(model_id, AdamParams(learning_rate=1e-2))
    return model_id, engine.save_weights_for_sampler(model_id, "test")


@pytest.fixture(scope="module")
def sample(engine, model_and_source):
    def sample(prompt=PROMPT, *, num_samples=1, wanted=sampling.NOTHING, **params):
        params = SamplingParams(**{"max_tokens": 12, "seed": 3, **params})
        return engine.sample(
            model_and_source[1],
            prompt,
            params,
            num_samples=num_samples,
            wanted=wanted,
        )

    return sample


@pytest.fixture(scope="module")
def forward(engine, model_and_source):
    """All next-token logprobs after each token of a text, by the forward pass."""

    def forward(tokens):
        everything = np.broadcast_to(np.arange(VOCAB_SIZE), (len(tokens), VOCAB_SIZE))
        datum = Datum(
            ModelInput.from_ints(tokens),
            {"target_tokens": everything, "weights": np.zeros(everything.shape)},
        )
        return engine.forward(model_and_source[0], [datum], "cross_entropy").logprobs[0]

    return forward


def test_the_same_seed_gives_the_same(sample):
    first, again, other = sample(), sample(), sample(seed=4)
    assert first == again
    assert first.sequences[0].tokens != other.sequences[0].tokens


def test_without_a_seed_samples_differ(sample):
    assert sample(seed=None, max_tokens=20) != sample(seed=None, max_tokens=20)


def test_a_sample_does_not_depend_on_how_many_there_are(sample):
    alone, many = sample(), sample(num_samples=35)
    assert many.sequences[0].tokens == alone.sequences[0].tokens
    assert len(many.sequences) == 35
    assert len({tuple(sequence.tokens) for sequence in many.sequences}) == 35


def test_temperature_0_is_the_likeliest_token(sample, forward):
    [sequence] = sample(temperature=0).sequences
    log_p = forward(PROMPT + sequence.tokens)[len(PROMPT) - 1 : -1]
    assert sequence.tokens == log_p.argmax(axis=-1).tolist()


def test_logprobs_are_the_forward_pass_s(sample, forward):
    response = sample(wanted=Wanted(True), temperature=0.7)
    [sequence] = response.sequences
    text = PROMPT + sequence.tokens
    log_p = forward(text)[np.arange(len(text) - 1), text[1:]]
    assert response.prompt_logprobs[0] is None
    np.testing.assert_allclose(response.prompt_logprobs[1:], log_p[: len(PROMPT) - 1], atol=1e-5)
    np.testing.assert_allclose(sequence.logprobs, log_p[len(PROMPT) - 1 :], atol=1e-5)


def test_prompt_logprobs_only_if_asked_for(sample):
    assert sample().prompt_logprobs is None


def test_a_prompt_of_one_token(sample):
    everything = Wanted(True, None, 2, 2, places([], width=3), 4)
    response = sample([65], wanted=everything)
    assert response.prompt_logprobs == response.topk_prompt_logprobs == [None]
    assert response.target_prompt_logprobs.shape == (0, 3)
    assert response.prompt_alt_tokens.tokens.shape == (0, 4)
    assert response.sequences[0].tokens


def places(cells, width):
    """Cells ``(row, column, token)`` of the prompt's targets, all others being -1."""
    tokens = np.full((len(PROMPT) - 1 if cells else 0, width), -1)
    for row, column, token in cells:
        tokens[row, column] = token
    layout = PromptTargets(data=tokens.ravel().tolist(), shape=list(tokens.shape))
    request = SampleRequest(ModelInput.from_ints(PROMPT if cells else [65]), SamplingParams())
    request.target_prompt_logprobs = layout
    return sampling.wanted_of(request).places


@pytest.mark.parametrize("last", [None, 1, 3])
def test_the_likeliest_tokens_are_the_forward_pass_s(sample, forward, last):
    response = sample(wanted=Wanted(True, last, 4, 3), temperature=0.7)
    [sequence] = response.sequences
    text = PROMPT + sequence.tokens
    log_p = forward(text)
    left_out = len(PROMPT) - (last or len(PROMPT) - 1)
    assert [row is None for row in response.topk_prompt_logprobs] == [
        row is None for row in response.prompt_logprobs
    ]
    assert response.topk_prompt_logprobs[:left_out] == [None] * left_out
    rows = response.topk_prompt_logprobs[left_out:] + sequence.topk_logprobs
    for row, expected in zip(rows, log_p[left_out - 1 :], strict=False):
        tokens, logprobs = zip(*row, strict=True)
        np.testing.assert_allclose(logprobs, np.sort(expected)[::-1][: len(row)], atol=1e-5)
        np.testing.assert_allclose(expected[list(tokens)], logprobs, atol=1e-5)
    assert {len(row) for row in response.topk_prompt_logprobs[left_out:]} == {4}
    assert {len(row) for row in sequence.topk_logprobs} == {3}


@given(
    cells=st.lists(
        st.tuples(
            st.integers(0, len(PROMPT) - 2), st.integers(0, 2), st.integers(0, VOCAB_SIZE - 1)
        ),
        min_size=1,
        max_size=5,
    )
)
def test_targets_of_the_prompt_are_the_forward_pass_s(sample, forward, cells):
    asked = places(cells, width=3)
    found = sample(wanted=Wanted(places=asked), max_tokens=1).target_prompt_logprobs
    tokens = asked.tokens.reshape(-1, 3)
    log_p = np.take_along_axis(forward(PROMPT)[:-1], tokens, 1)
    np.testing.assert_allclose(found, np.where(tokens < 0, 0, log_p), atol=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_alternatives_are_drawn_from_the_model(sample, forward, temperature):
    draws = 20_000
    drawn = sample(
        wanted=Wanted(alternatives=draws), temperature=temperature, max_tokens=1
    ).prompt_alt_tokens
    log_p = forward(PROMPT)[:-1]
    for tokens, logprobs, expected in zip(drawn.tokens, drawn.logprobs, log_p, strict=True):
        np.testing.assert_allclose(logprobs, expected[tokens], atol=1e-5)
        p = np.exp((expected - expected.max()) / temperature)
        p /= p.sum()
        found = np.bincount(tokens, minlength=VOCAB_SIZE) / draws
        assert (abs(found - p) <= 5 * np.sqrt(p / draws) + 1e-4).all()


def test_alternatives_without_temperature_are_the_likeliest(sample, forward):
    drawn = sample(wanted=Wanted(alternatives=2), temperature=0).prompt_alt_tokens
    likeliest = forward(PROMPT)[:-1].argmax(-1)
    np.testing.assert_array_equal(drawn.tokens, np.stack([likeliest, likeliest], 1))


def test_what_is_wanted_changes_no_sample(sample):
    everything = Wanted(True, 2, 2, 2, places([(0, 0, 7)], width=1), 3)
    assert sample(wanted=everything).sequences[0].tokens == sample().sequences[0].tokens


@pytest.mark.parametrize("k", [1, 3])
def test_top_k(sample, forward, k):
    for sequence in sample(num_samples=8, top_k=k, temperature=2.0).sequences:
        log_p = forward(PROMPT + sequence.tokens)[len(PROMPT) - 1 : -1]
        likeliest = np.argsort(-log_p, axis=-1)[:, :k]
        assert all(
            token in row for token, row in zip(sequence.tokens, likeliest.tolist(), strict=True)
        )


def test_top_p(sample, forward):
    p = 0.2
    for sequence in sample(num_samples=8, top_p=p).sequences:
        log_p = forward(PROMPT + sequence.tokens)[len(PROMPT) - 1 : -1]
        for token, row in zip(sequence.tokens, log_p, strict=True):
            likelier = np.exp(row[row > row[token] + 1e-5]).sum()
            assert likelier < p + 1e-5


def test_draws_follow_the_probabilities():
    log_p = np.log(np.array([0.5, 0.3, 0.2], np.float32))
    source = np.random.default_rng(0)
    draws = [sampling._draw(log_p, SamplingParams(), source) for _ in range(4000)]
    np.testing.assert_allclose(np.bincount(draws) / 4000, [0.5, 0.3, 0.2], atol=0.03)
    flat = SamplingParams(temperature=1e6)
    draws = [sampling._draw(log_p, flat, source) for _ in range(4000)]
    np.testing.assert_allclose(np.bincount(draws) / 4000, 1 / 3, atol=0.03)
    cut = SamplingParams(top_p=0.6)
    draws = [sampling._draw(log_p, cut, source) for _ in range(4000)]
    np.testing.assert_allclose(np.bincount(draws, minlength=3) / 4000, [5 / 8, 3 / 8, 0], atol=0.03)


def test_max_tokens_ends_it(sample):
    [sequence] = sample(max_tokens=1, temperature=0).sequences
    assert (len(sequence.tokens), sequence.stop_reason) == (1, "length")


def test_a_stop_token_ends_it_and_is_kept(sample):
    [whole] = sample().sequences
    [cut] = sample(stop=[whole.tokens[4]]).sequences
    end = whole.tokens.index(whole.tokens[4]) + 1
    assert cut.tokens == whole.tokens[:end]
    assert cut.logprobs == whole.logprobs[:end]
    assert cut.stop_reason == "stop"


def test_a_stop_string_ends_it():
    tokens = tokenizer.encode("so it ends")
    assert sampling._stops(tokens, "ends")
    assert sampling._stops(tokens, ["nothing", "t en"])
    assert not sampling._stops(tokens, ["endsx"])
    assert not sampling._stops(tokens, None)
    assert sampling._stops(tokenizer.encode("naïve é"), "é")


def test_the_end_of_text_ends_it():
    assert sampling._stops([65, END], None)


def test_a_base_model_can_be_sampled(engine):
    response = engine.sample("mintjax/nano", PROMPT, SamplingParams(max_tokens=3, seed=1))
    assert 1 <= len(response.sequences[0].tokens) <= 3


def test_sampling_up_to_the_end_of_the_context(sample):
    prompt = PROMPT * (2045 // len(PROMPT))
    room = NANO.max_context_length - len(prompt)
    [sequence] = sample(prompt, max_tokens=None, top_k=5).sequences
    assert len(sequence.tokens) == room or sequence.stop_reason == "stop"


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("prompt", {"prompt": []}),
        ("prompt", {"prompt": [VOCAB_SIZE]}),
        ("prompt", {"prompt": [-1]}),
        ("prompt", {"prompt": [1] * NANO.max_context_length}),
        ("num_samples", {"num_samples": 0}),
        ("num_samples", {"num_samples": 10**9}),
        ("sampling_params.max_tokens", {"max_tokens": 0}),
        ("sampling_params.max_tokens", {"max_tokens": NANO.max_context_length}),
        ("sampling_params.temperature", {"temperature": -0.1}),
        ("sampling_params.temperature", {"temperature": float("nan")}),
        ("sampling_params.top_k", {"top_k": 0}),
        ("sampling_params.top_k", {"top_k": -2}),
        ("sampling_params.top_p", {"top_p": 0.0}),
        ("sampling_params.top_p", {"top_p": 1.5}),
        ("sampling_params.seed", {"seed": -1}),
        ("sampling_params.stop", {"stop": [VOCAB_SIZE]}),
        ("sampling_params.stop", {"stop": ""}),
        ("sampling_params.stop", {"stop": ["end", ""]}),
    ],
)
def test_names_what_is_out_of_range(field, change):
    prompt, num_samples = change.pop("prompt", PROMPT), change.pop("num_samples", 1)
    with pytest.raises(DataError, match=f"field '{field}'"):
        sampling.check_request(NANO, prompt, SamplingParams(**change), num_samples)
