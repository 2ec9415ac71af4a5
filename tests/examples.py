"""Numbers of examples that property tests try: few by default, many under the thorough profile."""

from hypothesis import settings

THOROUGH = not settings.default.derandomize
"""Whether the tests run under ``--hypothesis-profile=thorough``, with fresh randomness."""


def examples(few: int) -> int:
    """Gives the number of examples for a test whose examples are slow.

    Args:
        few: under the default profile; the thorough profile has its own number.
    """
    return settings.default.max_examples if THOROUGH else few
