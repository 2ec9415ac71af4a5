"""Decides from the end of an attempt whether the trainer may have the request."""

from __future__ import annotations

from http import HTTPStatus
from typing import Literal, NamedTuple

Ending = Literal[
    "unsent", "cut", "unreadable", "unavailable", "throttled", "conflict", "refused", "foreign"
]
Repeats = Literal["until the deadline", "a few times", "never"]


class Verdict(NamedTuple):
    """The knowledge of a request after an attempt.

    Args:
        in_doubt: the trainer may have taken it in, in this attempt or in one before.
        repeats: how often it may be sent again after such an end.
    """

    in_doubt: bool
    repeats: Repeats


def ending_of(status: int, detail: str) -> Ending:
    """Names what an HTTP status other than success says.

    Args:
        status: of the answer.
        detail: the trainer's own ``detail``; empty where the answer has none, or where it is not
            certain that the answer is the trainer's.
    """
    own_words = detail and detail != _phrase(status)  # a framework repeats the status's name
    if status == 501 and own_words:  # a loss that this trainer does not serve
        return "refused"
    if status in (408, 425) or status >= 500:
        return "unavailable"
    if status == 409:
        return "conflict" if own_words else "unavailable"
    if status == 429:
        return "throttled" if own_words else "unavailable"
    if 400 <= status != 410 and own_words:
        return "refused"
    return "foreign"


def verdict(ending: Ending, in_doubt: bool) -> Verdict:
    """Says whether the trainer may have a request, and whether to send it again.

    A request is in doubt from the first attempt that may have reached the trainer without a clear
    answer. Nothing takes the doubt away but the trainer's acceptance: a proxy's answer proves
    nothing, and a refusal says nothing of an earlier attempt that may still be under way.

    =============  ==========================================  ==================  ===============
    ending         how the attempt ended                       in doubt            sent again
    =============  ==========================================  ==================  ===============
    unsent         no connection came about                    as before           until deadline
    cut            connection lost, or time up, once sending   yes                 until deadline
    unreadable     2xx: not the protocol's, or another's       yes                 a few times
    unavailable    408, 425, other 5xx; 409, 429 without it    yes                 until deadline
    throttled      429 with the trainer's own ``detail``       as before           until deadline
    conflict       409 with it: the number is taken            yes                 a few times
    refused        other 4xx and 501 with it, except 410       as before           never
    foreign        1xx, 3xx, 410; 4xx without it               yes                 a few times
    =============  ==========================================  ==================  ===============

    When no further attempt is made, the number of a request in doubt is not used again. The number
    of any other is free for the next request. ``may_have_been_applied`` is True for a request in
    doubt, unless it is one that changes nothing, such as a forward pass.

    Args:
        ending: of this attempt.
        in_doubt: whether the request was in doubt before it.
    """
    return Verdict(in_doubt or _LEAVES_DOUBT[ending], _REPEATS[ending])


_LEAVES_DOUBT: dict[Ending, bool] = {
    "unsent": False,
    "cut": True,
    "unreadable": True,
    "unavailable": True,
    "throttled": False,
    "conflict": True,
    "refused": False,
    "foreign": True,
}
_REPEATS: dict[Ending, Repeats] = {
    "unsent": "until the deadline",
    "cut": "until the deadline",
    "unreadable": "a few times",
    "unavailable": "until the deadline",
    "throttled": "until the deadline",
    "conflict": "a few times",
    "refused": "never",
    "foreign": "a few times",
}


def _phrase(status: int) -> str:
    return HTTPStatus(status).phrase if status in HTTPStatus.__members__.values() else ""
