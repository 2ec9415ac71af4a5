"""All laws, for all objectives; 5,000 batches each with

pytest tests/objectives/test_laws.py --hypothesis-profile=thorough
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mintjax import testing

from .specimens import SPECIMENS, Specimen

# Enough by default to meet each kind of batch.
EXAMPLES = 20 if settings().max_examples <= 100 else settings().max_examples


def check_all(specimen: Specimen, example: testing.Example) -> None:
    """Every law that applies."""
    objective, block = specimen.objective, specimen.block
    testing.check_finite(objective, *example)
    testing.check_gradient(objective, *example, reference=specimen.reference)
    testing.check_permutation(objective, *example, block=block)
    testing.check_padding_invariance(objective, *example)
    if "weights" in example.data[0].loss_fn_inputs:
        testing.check_masked_equals_removed(objective, *example)
    if specimen.sums:
        testing.check_chunk_additivity(objective, *example, block=block)


@pytest.mark.parametrize("name", SPECIMENS)
@given(data=st.data())
@settings(max_examples=EXAMPLES)
def test_every_objective_obeys_every_law(name, data):
    specimen = SPECIMENS[name]
    kinds = testing.batches(block=specimen.block, max_length=120, poison=True, **specimen.batches)
    check_all(specimen, data.draw(kinds))


@given(example=testing.batches(max_blocks=2, max_length=3000, poison=True))
@settings(max_examples=max(15, settings().max_examples // 50))
def test_long_rows_obey_the_laws(example):
    specimen = SPECIMENS["ppo"]
    testing.check_finite(specimen.objective, *example)
    testing.check_gradient(specimen.objective, *example, reference=specimen.reference)
    testing.check_masked_equals_removed(specimen.objective, *example)
