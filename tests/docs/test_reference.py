"""The reference has a page for everything public."""

import importlib

from docs import built_page, losses_page, reference
from docs.modules import modules
from docs.public import MODULES, everything, names_of
from mintjax import losses

SHOWN = {path for page in reference.PAGES.values() for path in page.shows}


def test_every_public_module_has_a_page():
    assert {module for module in MODULES if module != "mintjax"} <= SHOWN | {"mintjax"}


def test_every_name_that_import_mintjax_offers_is_shown():
    whole = {
        id(getattr(importlib.import_module(module), name))
        for module in SHOWN & set(MODULES)
        for name in names_of(module)
    }
    missing = [
        name
        for name in names_of("mintjax")
        if name not in ("errors", "gradients", "losses", "objectives", "types")
        and id(value := getattr(importlib.import_module("mintjax"), name)) not in whole
        and f"{value.__module__}.{value.__qualname__}" not in SHOWN
    ]
    assert missing == []


def test_methods_are_listed_once():
    names = list(everything())
    assert "mintjax.TrainingClient.forward_backward_custom" in names
    assert len(names) == len(set(names)) > 300


def test_the_pages_of_losses_have_every_loss_and_every_difference():
    pages = losses_page.pages()
    for entry in losses.catalogue():
        assert f"][mintjax.losses.{entry.name}]" in pages["losses.md"]
    for row in losses.DIFFERENCES:
        assert f"### {row.about}\n" in pages["conventions.md"]
        assert all(
            f"- {who}: {what}" in pages["conventions.md"] for who, what in row.others.items()
        )
    for row in losses.CONVENTIONS:
        assert row.trainer in pages["conventions.md"]


def test_references_within_summaries_are_plain_code():
    assert ":func:" not in reference.pages()["reference/index.md"]


def test_the_figure_of_modules_has_a_dot_for_each_arrow():
    table = modules()
    arrows = built_page.arrows(table)
    page = built_page.pages()["built.md"]
    assert page.count("●") == len(arrows) > len(table)
    assert ("client/", "protocol/") in arrows
    assert ("errors.py", "client/") not in arrows
