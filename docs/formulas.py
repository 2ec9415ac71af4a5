"""Turns the formulas of docstrings, which are plain text, into LaTeX."""

from __future__ import annotations

import re

_TOKEN = re.compile(
    r"\s*(\d+(?:\.\d+)?(?:e-?\d+)?|[A-Za-z]\w*'?|(?<=\))_\w|\*\*|<=|>=|==|!=|\|\||\.\.\.|[-+*/@=<>|(){}\[\],;])"
)
_CODE = re.compile(r"``(.+?)``", re.S)
_SECTION = re.compile(r"^(?:Args|Returns|Yields|Raises|Example|Reference):\n", re.M)
_GREEK = frozenset({"beta", "gamma", "delta", "epsilon", "lambda", "tau"})
_OPERATORS = frozenset({"exp", "log", "max", "min", "sum"})
_SIGNS = {
    "=": "=", "==": "=", "!=": r"\ne", "<": "<", ">": ">", "<=": r"\le", ">=": r"\ge",
    "in": r"\in", "||": r"\,\Vert\,", ",": ",", ";": ";", "...": r"\dots",
}  # fmt: skip


def latex(formula: str) -> str:
    """Writes a formula as LaTeX.

    Args:
        formula: in the notation of the docstrings: Python's operators, ``log x``, ``sum_k x``,
            ``mean_{i in g}(x)``, ``|x|``, ``x if c else y``.

    Returns:
        LaTeX without its dollar signs.

    Raises:
        ValueError: the text is no formula in this notation.
    """
    parser = _Parser(formula)
    text = parser.relations()
    if parser.token:
        raise ValueError(f"{parser.token!r} is not expected in {formula!r}")
    return text


def is_formula(text: str) -> bool:
    """Tells whether a piece of code in a docstring is a formula that :func:`latex` can write."""
    try:
        latex(text)
    except ValueError:
        return False
    return not re.search(r'["\[\]:]|->|\w\.\w*[A-Za-z]|\w+=\w', text)


def formula_paragraph(docstring: str) -> str:
    """Finds the paragraph of a docstring that begins with a formula; empty if there is none."""
    paragraphs = _SECTION.split(docstring)[0].split("\n\n")
    return next((one.strip() for one in paragraphs if one.strip().startswith("``")), "")


def in_markdown(paragraph: str) -> str:
    """Writes the formulas of a paragraph as mathematics: one that it begins with on its own line.

    Args:
        paragraph: of a docstring, with its code in double backticks.
    """
    first = _CODE.match(paragraph)
    if not (first and is_formula(first[1])):
        return _CODE.sub(_inline, paragraph)
    rest = paragraph[first.end() :].lstrip(".,;: \n")
    return f"$$\n{latex(first[1])}\n$$\n\n{_CODE.sub(_inline, rest)}".rstrip()


def _inline(found: re.Match[str]) -> str:
    is_name = re.fullmatch(r"\w{2,}", found[1]) and len(_split(found[1])[0]) > 1
    return found[0] if is_name or not is_formula(found[1]) else f"${latex(found[1])}$"


class _Parser:
    """Reads from left to right, one token ahead."""

    def __init__(self, text: str) -> None:
        self.tokens: list[str] = []
        at = 0
        text = text.rstrip()
        while at < len(text):
            found = _TOKEN.match(text, at)
            if not found:
                raise ValueError(f"{text[at:]!r} is not in the notation")
            self.tokens.append(found[1])
            at = found.end()
        self.tokens.reverse()

    @property
    def token(self) -> str:
        return self.tokens[-1] if self.tokens else ""

    def take(self, expected: str = "") -> str:
        if not self.tokens or (expected and self.token != expected):
            raise ValueError(f"{expected or 'more'} is expected before {self.token!r}")
        return self.tokens.pop()

    def relations(self, stop: str = "") -> str:
        """Sums with relations and commas between them, up to ``stop``."""
        parts: list[str] = []
        while self.token and self.token != stop:
            parts.append(_SIGNS[self.take()] if self.token in _SIGNS else self.choice())
        if not parts:
            raise ValueError("nothing is there")
        return " ".join(parts)

    def choice(self) -> str:
        """``x if condition else y``."""
        value = self.sum()
        if self.token != "if":
            return value
        self.take("if")
        condition: list[str] = []
        while self.token != "else":
            condition.append(_SIGNS[self.take()] if self.token in _SIGNS else self.sum())
        self.take("else")
        return rf"{value}\ \text{{if}}\ {' '.join(condition)}\ \text{{else}}\ {self.sum()}"

    def sum(self) -> str:
        text = "-" + self.product() if self.token == "-" and self.take() else self.product()
        while self.token in ("+", "-"):
            text = f"{text} {self.take()} {self.product()}"
        return text

    def product(self) -> str:
        text = self.power()
        while self.token in ("*", "/", "@"):
            sign = self.take()
            factor = self.power()
            if sign == "/":
                text = rf"\frac{{{_bare(text)}}}{{{_bare(factor)}}}"
            else:
                text = rf"{text} \cdot {factor}"
        return text

    def power(self) -> str:
        base = self.atom()
        if self.token != "**":
            return base
        self.take("**")
        return rf"{base}^{{{_bare(self.atom())}}}"

    def atom(self) -> str:
        token = self.take()
        if token == "(":
            inner = self.relations(")")
            self.take(")")
            text = inner if _is_fraction(inner) else rf"\left({inner}\right)"
            return f"{text}_{{{self.take()[1:]}}}" if self.token.startswith("_") else text
        if token == "|":
            inner = self.relations("|")
            self.take("|")
            return rf"\left|{inner}\right|"
        if token == "-":
            return f"-{self.power()}"
        if token[0].isdigit():
            return token
        if not token[0].isalpha() or token in ("if", "else", "in"):
            raise ValueError(f"{token!r} is not expected")
        return self.named(token)

    def named(self, token: str) -> str:
        """A name with its subscript, what it is applied to, and words that follow one another."""
        name, subscript = _split(token)
        if name.endswith("_") and self.token == "{":
            self.take("{")
            name, subscript = name[:-1], self.relations("}")
            self.take("}")
        prefix = name in _OPERATORS or name == "sigmoid"
        if prefix and self.token and self.token not in "()),/+*":
            space = "" if self.token == "sigmoid" else r"\,"
            return rf"{_symbol(name, subscript)}{space} {self.power()}"
        words = [token]
        while self.token and self.token[0].isalpha() and self.token not in ("if", "else", "in"):
            words.append(self.take())
        if len(words) > 1:
            return rf"\text{{{' '.join(words)}}}"
        text = _symbol(name, subscript)
        if self.token == "(":
            argument = self.atom()
            return rf"\sqrt{{{_bare(argument)}}}" if name == "sqrt" else text + argument
        if self.token == "[":
            self.take("[")
            inner = self.relations("]")
            self.take("]")
            return rf"{text}_{{{inner}}}"
        return text


def _split(token: str) -> tuple[str, str]:
    """Takes the subscript off a name: one letter behind the last underscore, or ``it``."""
    name, _, last = token.rpartition("_")
    return (name, last) if name and (len(last) == 1 or last == "it") else (token, "")


def _symbol(name: str, subscript: str) -> str:
    prime = "'" if name.endswith("'") else ""
    name = name.removesuffix("'")
    if name == "sigmoid":
        text = r"\sigma"
    elif name in _GREEK or name in _OPERATORS:
        text = f"\\{name}"
    elif len(name) == 1 or (len(name) == 2 and name[1].isdigit()):
        text = name if len(name) == 1 else f"{name[0]}_{{{name[1]}}}"
    else:
        text = rf"\text{{{name}}}"
    return f"{text}{prime}_{{{subscript}}}" if subscript else text + prime


def _is_fraction(text: str) -> bool:
    """Tells whether the whole text is one fraction, which needs no parentheses around it."""
    depth = groups = 0
    for position, sign in enumerate(text):
        depth += {"{": 1, "}": -1}.get(sign, 0)
        groups += sign == "}" and depth == 0
        if groups == 2:
            return text.startswith(r"\frac{") and position == len(text) - 1
    return False


def _bare(text: str) -> str:
    """Takes off the parentheses around a whole numerator, denominator or exponent."""
    inner = text.removeprefix(r"\left(").removesuffix(r"\right)")
    if len(text) - len(inner) != len(r"\left(\right)"):
        return text
    depth = 0
    for found in re.finditer(r"\\left|\\right", inner):
        depth += 1 if found[0] == r"\left" else -1
        if depth < 0:
            return text
    return inner
