"""Formulas of docstrings become LaTeX."""

import re

import pytest

from docs.formulas import formula_paragraph, in_markdown, is_formula, latex
from mintjax import losses

FORMULAS = {entry.name: entry.formula for entry in losses.catalogue() if entry.formula}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("r * A", r"r \cdot A"),
        ("-r", "-r"),
        ("a - (b - c)", r"a - \left(b - c\right)"),
        ("(a + b) / (2 * c)", r"\frac{a + b}{2 \cdot c}"),
        ("(a) / (b) * (c)", r"\frac{a}{b} \cdot \left(c\right)"),
        ("(4 / tau) * x", r"\frac{4}{\tau} \cdot x"),
        ("(x + 1)**2", r"\left(x + 1\right)^{2}"),
        ("log sigmoid(x)", r"\log \sigma\left(x\right)"),
        ("log p_k - log q", r"\log\, p_{k} - \log\, q"),
        ("sum_{i in g, t}(x_it)", r"\sum_{i \in g , t}\left(x_{it}\right)"),
        ("|x - y| <= 3", r"\left|x - y\right| \le 3"),
        ("target_logprobs", r"\text{target_logprobs}"),
        ("logits[target]", r"\text{logits}_{\text{target}}"),
        ("second largest r", r"\text{second largest r}"),
        ("r if low <= r else 0", r"r\ \text{if}\ \text{low} \le r\ \text{else}\ 0"),
        ("k3 + f'(x)", r"k_{3} + f'\left(x\right)"),
        ("KL(p || m)", r"\text{KL}\left(p \,\Vert\, m\right)"),
    ],
)
def test_examples(text, expected):
    assert latex(text) == expected


@pytest.mark.parametrize("text", ["", "a +", "(a", "a)", "a ? b", "|a", "* a"])
def test_what_is_no_formula_is_refused(text):
    with pytest.raises(ValueError, match=r"expected|notation|nothing"):
        latex(text)


@pytest.mark.parametrize("text", ["[P]", "x.sum()", 'data["weights"]', "where=mask", "x[0::2]"])
def test_code_is_no_formula(text):
    assert not is_formula(text)


@pytest.mark.parametrize("name", FORMULAS)
def test_every_formula_of_the_losses_is_written_whole(name):
    text = latex(FORMULAS[name])
    letters = "".join(re.findall(r"[a-z]", re.sub(r"\\[a-zA-Z]+", "", text)))
    # Names and words stay as they are; operators and Greek letters become commands.
    for word in re.findall(r"[a-z]{3,}", FORMULAS[name]):
        assert word in letters or f"\\{word}" in text or word in ("sigmoid", "sqrt")
    assert text.count("{") == text.count("}")
    assert text.count(r"\left") == text.count(r"\right")


def test_a_letter_with_a_subscript_is_mathematics_and_an_argument_is_code():
    assert in_markdown("with ``H_K``, ``m`` and ``label_smoothing``") == (
        "with $H_{K}$, $m$ and ``label_smoothing``"
    )


def test_a_paragraph_opens_with_its_formula():
    docstring = "A loss.\n\n``loss = -r * A`` with\n``r = exp(d)``, ``weights``.\n\nArgs:\n  x"
    assert formula_paragraph(docstring) == "``loss = -r * A`` with\n``r = exp(d)``, ``weights``."
    assert in_markdown(formula_paragraph(docstring)) == (
        "$$\n\\text{loss} = -r \\cdot A\n$$\n\nwith\n$r = \\exp\\left(d\\right)$, ``weights``."
    )
