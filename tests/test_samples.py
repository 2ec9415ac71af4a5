"""The likeliest tokens are the same as rows and as matrices."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mintjax.samples import NO_LOGPROB, SampledSequence, SampleResponse, TopkLogprobs

LOGPROBS = st.floats(-100, 0, width=32)
ROWS = st.lists(
    st.none() | st.lists(st.tuples(st.integers(0, 9), LOGPROBS), min_size=1, max_size=4)
)


@given(ROWS)
def test_rows_and_matrices_say_the_same(rows):
    made = TopkLogprobs.from_rows(rows)
    assert made.to_rows() == rows
    width = max((len(row) for row in rows if row), default=0)
    assert made.token_ids.shape == made.logprobs.shape == (len(rows), width)
    assert (made.logprobs == np.float32(NO_LOGPROB)).sum() == sum(
        width - len(row or ()) for row in rows
    )


def test_a_result_gives_arrays_where_there_is_something():
    bare = SampledSequence(tokens=[3, 4])
    assert bare.logprobs_np is bare.topk_logprobs_np is None
    assert bare.tokens_np.tolist() == [3, 4]
    full = SampledSequence(tokens=[3], logprobs=[-0.5], topk_logprobs=[[(3, -0.5)]])
    assert full.logprobs_np.tolist() == [-0.5]
    assert full.topk_logprobs_np.token_ids.tolist() == [[3]]
    answer = SampleResponse(sequences=[full], prompt_logprobs=[None, -1.0])
    assert np.isnan(answer.prompt_logprobs_np).tolist() == [True, False]
    assert answer.topk_prompt_logprobs_np is None
