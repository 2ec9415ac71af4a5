"""All laws, for all objectives; 5,000 batches each with

pytest tests/objectives/test_laws.py --hypothesis-profile=thorough
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mintjax import testing

from ..examples import THOROUGH, examples, some
from .specimens import SPECIMENS, Specimen

# By default some batches for those whose way of evaluation is their own. Those that are another
# loss in the same frame are differenced once, because each costs a program or two to compile.
ALONE, FRAMED = examples(2), examples(1)
OWN_WAY = {
    "cross_entropy",
    "ppo",
    "dppo",
    "gspo",
    "gmpo",
    "vespo",
    "kl_k3",
    "sampled_entropy",
    "dpo",
    "rpo",
    "simpo",
    "orpo",
    "ipo_per_token",
    "kto",
    "bco",
    "plackett_luce",
    "distillation_reverse_kl",
}


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


def draw(name: str, data: st.DataObject) -> testing.Example:
    """A batch that the objective takes."""
    specimen = SPECIMENS[name]
    kinds = testing.batches(block=specimen.block, max_length=120, poison=True, **specimen.batches)
    return data.draw(kinds)


@pytest.mark.parametrize("name", some(sorted(OWN_WAY), 5))
@given(data=st.data())
@settings(max_examples=ALONE)
def test_every_objective_obeys_every_law(name, data):
    check_all(SPECIMENS[name], draw(name, data))


@pytest.mark.parametrize("name", some(sorted(set(SPECIMENS) - OWN_WAY), 5))
@given(data=st.data())
@settings(max_examples=FRAMED)
def test_every_other_loss_in_the_same_frame_obeys_every_law(name, data):
    specimen, example = SPECIMENS[name], draw(name, data)
    if THOROUGH:
        check_all(specimen, example)
    testing.check_gradient(specimen.objective, *example, reference=specimen.reference)


@given(example=testing.batches(max_blocks=2, max_length=3000, poison=True))
@settings(max_examples=100 if THOROUGH else 2)
def test_long_rows_obey_the_laws(example):
    specimen = SPECIMENS["ppo"]
    testing.check_finite(specimen.objective, *example)
    testing.check_gradient(specimen.objective, *example, reference=specimen.reference)
    testing.check_masked_equals_removed(specimen.objective, *example)
