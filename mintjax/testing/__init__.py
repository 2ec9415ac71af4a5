"""Property tests for losses: strategies for batches, and the laws a loss must obey.

Needs Hypothesis, which the extra ``test`` brings.

    from hypothesis import given
    from mintjax import testing

    @given(testing.batches(block=2))
    def test_my_loss(example):
        testing.check_gradient(my_loss, *example)
        testing.check_permutation(my_loss, *example, block=2)

A law that fails raises :class:`LawError`, and Hypothesis prints the smallest batch that breaks it.
"""

from mintjax.testing._laws import (
    LawError,
    Reference,
    check_chunk_additivity,
    check_finite,
    check_gradient,
    check_masked_equals_removed,
    check_padding_invariance,
    check_permutation,
)
from mintjax.testing._strategies import Example, batches

__all__ = [
    "Example",
    "LawError",
    "Reference",
    "batches",
    "check_chunk_additivity",
    "check_finite",
    "check_gradient",
    "check_masked_equals_removed",
    "check_padding_invariance",
    "check_permutation",
]
