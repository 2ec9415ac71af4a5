"""Errors survive a trip to another process."""

from __future__ import annotations

import copy
import pickle

import pytest

from mintjax import errors
from mintjax.errors import MintjaxError


def kinds(base: type) -> list[type]:
    return [base, *(kind for sub in base.__subclasses__() for kind in kinds(sub))]


def make(kind: type) -> MintjaxError:
    if issubclass(kind, errors.APIStatusError):
        return kind(429, "slow down")
    if kind is errors.RequestFailedError:
        return kind("no memory", request_id="r-1", category="server")
    if kind in (errors.DataError, errors.NonFiniteError):
        return kind("bad", datum=3)
    return kind("words")


@pytest.mark.parametrize(
    "kind", [k for k in kinds(MintjaxError) if k.__module__ == "mintjax.errors"]
)
@pytest.mark.parametrize("trip", [lambda e: pickle.loads(pickle.dumps(e)), copy.copy])
def test_an_error_comes_back_as_it_was(kind, trip):
    error = make(kind)
    error.add_note("3 attempts")
    error.may_have_been_applied = True
    again = trip(error)
    assert type(again) is kind
    assert (str(again), again.args, vars(again)) == (str(error), error.args, vars(error))
