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

from mintjax.testing._laws import LawError as LawError
from mintjax.testing._laws import Reference as Reference
from mintjax.testing._laws import check_chunk_additivity as check_chunk_additivity
from mintjax.testing._laws import check_finite as check_finite
from mintjax.testing._laws import check_gradient as check_gradient
from mintjax.testing._laws import check_masked_equals_removed as check_masked_equals_removed
from mintjax.testing._laws import check_padding_invariance as check_padding_invariance
from mintjax.testing._laws import check_permutation as check_permutation
from mintjax.testing._strategies import Example as Example
from mintjax.testing._strategies import batches as batches
