"""The table of all losses, and the page of conventions."""

from __future__ import annotations

import inspect
import pathlib
import re

import pytest

from mintjax import losses, objectives
from mintjax.losses._citations import CONFIRMED, MARK, citations

ENTRIES = {entry.name: entry for entry in losses.catalogue()}
WITHOUT_A_FORMULA = {"policy_summary", "preference_summary", "calibration_summary"}


def test_every_function_is_in_one_family():
    functions = {name for name in losses.__all__ if inspect.isfunction(getattr(losses, name))} - {
        "catalogue",
        "conventions",
        "counterparts",
        "describe",
    }
    listed = [name for names in losses.FAMILIES.values() for name in names]
    assert len(listed) == len(set(listed))
    assert set(listed) == functions


@pytest.mark.parametrize("name", ENTRIES)
def test_an_entry_says_formula_inputs_source_and_when(name):
    entry = ENTRIES[name]
    assert entry.formula or name in WITHOUT_A_FORMULA
    assert entry.inputs == tuple(
        p.name
        for p in inspect.signature(getattr(losses, name)).parameters.values()
        if p.kind is p.POSITIONAL_OR_KEYWORD
    )
    if entry.family != "diagnostics":
        assert entry.source
    split = name.endswith(("_token", "_log_ratios", "_log_weight"))  # a part of another
    if entry.family not in ("diagnostics",) and not split:
        assert entry.when, name
        assert entry.others, name


CITED = {(name, c.work, c.number): c for name, entry in ENTRIES.items() for c in entry.citations}


@pytest.mark.parametrize("key", CITED, ids=lambda key: f"{key[0]}-{key[2]}")
def test_the_number_of_an_equation_is_confirmed_or_marked(key):
    cited = CITED[key]
    assert bool(cited.confirmed_by) != cited.marked, cited


def test_every_number_is_read_and_every_confirmation_is_of_one():
    for entry in ENTRIES.values():
        assert ("eq." in entry.source) == bool(entry.citations), entry.source
        assert entry.source.count("unconfirmed") == entry.source.count("unconfirmed)")
    cited = {(c.work, c.number) for c in CITED.values()}
    confirmed = {(work, n) for work, numbers in CONFIRMED.items() for n in numbers}
    assert confirmed <= cited
    assert len(CITED) > 50


def test_citations_are_read_with_their_marks():
    source = f'A 2020, "One", eq. 3 {MARK}, and eq. 4.7; B, "Two", eq. 1, 2 and 5, in section 6.'
    read = [(c.work, c.number, c.marked) for c in citations(source)]
    assert read == [
        ("One", "3", True),
        ("One", "4.7", False),
        ("Two", "1", False),
        ("Two", "2", False),
        ("Two", "5", False),
    ]


def test_what_trainers_serve_is_told_from_the_table():
    assert "Tinker (hosted)" in ENTRIES["gspo"].served_by
    assert ENTRIES["dpo"].served_by == ()
    assert len(ENTRIES["cross_entropy"].served_by) == len(losses.CONVENTIONS)
    for row in losses.CONVENTIONS:
        assert set(row.losses) <= set(ENTRIES)


def test_a_loss_that_is_served_by_name_has_the_settings_of_its_function():
    assert {row.loss for row in losses.FORMULAS} == set(losses.FAMILIES["served by name"])
    for row in losses.FORMULAS:
        assert row.config == ENTRIES[row.loss].settings
        columns = {"logprobs": "sampling_logprobs"}
        read = [columns.get(name, name) for name in row.inputs]
        assert ENTRIES[row.loss].inputs == ("target_logprobs", *read)


def test_the_list_has_every_loss_with_its_settings():
    text = losses.describe()
    for entry in ENTRIES.values():
        assert f"\n{entry.name}\n    {entry.formula}" in text
    assert "alpha=0.25" in text


def test_every_counterpart_is_here():
    for library, names in losses.COUNTERPARTS.items():
        text = losses.counterparts(library)
        assert len(text.splitlines()) == len(names) + 2
        for name, here in names.items():
            assert f"| {name} " in text
            assert library in text
            called = re.findall(r"objectives\.(\w+)", here)
            plain = here.split(",")[0] if not called else ""
            assert all(hasattr(objectives, each) for each in called), here
            assert not plain or hasattr(losses, plain), here


def test_the_readme_counts_the_counterparts():
    readme = (pathlib.Path(__file__).parents[2] / "README.md").read_text()
    for library, names in losses.COUNTERPARTS.items():
        missing = [f"`{name}`" for name, here in names.items() if not here]
        assert f"| {library} | {len(names)} | {', '.join(missing) or 'none'} |" in readme


def test_the_page_of_conventions_has_every_point_and_trainer():
    text = losses.conventions()
    for row in losses.DIFFERENCES:
        assert row.about in text
        assert row.others
        for who in row.others:
            assert who in text
    for trainer in losses.CONVENTIONS:
        assert trainer.trainer in text


def test_objectives_have_the_defaults_of_their_losses():
    for name in objectives.__all__:
        made = getattr(objectives, name)
        if not (isinstance(made, type) and issubclass(made, objectives.LossObjective)):
            continue
        for setting in getattr(made, "settings", ()):
            default = inspect.signature(made.loss).parameters[setting].default
            assert getattr(made(), setting) == default, (name, setting)
