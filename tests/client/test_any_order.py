"""Submit, cancel, fail, lose and close in any order: nothing hangs, is lost, or happens twice."""

from __future__ import annotations

import concurrent.futures
from typing import Any

import httpx
import msgspec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from mintjax.client import ServiceClient
from mintjax.errors import MintjaxError
from mintjax.types import AdamParams

from ..examples import examples
from .data import datum
from .double import ADDRESS, QUICK, Answer, Hold, Lose, Trainer

FAULTS = [
    Lose("unsent"),
    Lose("before"),
    Lose("after"),
    Answer(422, {"detail": "no"}),
    Answer(429),
    Answer(500, act=True),
    Answer(503),
    Answer(200, b"garbage", act=True),
]
HASTY = msgspec.structs.replace(QUICK, deadline=0.002, bad_answers=1)
HOWS = ["optim_step", "forward_backward", "forward", "custom", "raising"]
PATHS = ["forward", "forward_backward", "optim_step", "retrieve_future"]


def raising(data: Any, logprobs: Any) -> Any:
    raise LookupError("on purpose")


def linear(data: Any, logprobs: Any) -> Any:
    return (logprobs * data["weights"]).sum().sum(), {}


class AnyOrder(RuleBasedStateMachine):
    """Each update carries a mark, by which the trainer shows what became of it.

    No rule has a precondition on what was taken, because that may depend on a race between
    threads, and Hypothesis needs to draw the same thing when it repeats an example.
    """

    @initialize()
    def begin(self) -> None:
        self.trainer = Trainer()
        transport = httpx.ASGITransport(self.trainer)
        self.service = ServiceClient(ADDRESS, transport=transport, retry_policy=HASTY)
        self.client = self.service.create_lora_training_client("tiny")
        self.submitted: list[tuple[float, Any]] = []
        self.holds: list[Hold] = []
        self.marks = iter(range(1, 10_000))

    def submit(self, how: str) -> None:
        mark = float(next(self.marks))
        data = [datum([1, 2], [2, 3], [mark, 0.0])]
        try:
            if how == "optim_step":
                future: Any = self.client.optim_step(AdamParams(learning_rate=mark))
            elif how == "forward_backward":
                future = self.client.forward_backward(data)
            elif how == "forward":
                future = self.client.forward(data)
            else:
                objective = linear if how == "custom" else raising
                future = self.client.forward_backward_custom(data, objective)
        except MintjaxError:  # closed, or in doubt: said at once
            return
        self.submitted.append((mark if how not in ("forward", "raising") else 0.0, future))

    @rule(hows=st.lists(st.sampled_from(HOWS), min_size=1, max_size=5))
    def some_more(self, hows: list[str]) -> None:
        for how in hows:
            self.submit(how)

    @rule(
        path=st.sampled_from(PATHS),
        fault=st.sampled_from(FAULTS),
        times=st.sampled_from([1, 1, 1, 4]),
    )
    def fault(self, path: str, fault: Any, times: int) -> None:
        self.trainer.faults[path] += [fault] * times

    @rule(path=st.sampled_from(PATHS))
    def hold(self, path: str) -> None:
        self.holds.append(Hold())
        self.trainer.faults[path].append(self.holds[-1])

    @rule()
    def release(self) -> None:
        while self.holds:
            self.holds.pop().release()

    @rule(which=st.integers(0, 100))
    def cancel(self, which: int) -> None:
        if self.submitted:
            self.submitted[which % len(self.submitted)][1].cancel()

    @rule(which=st.integers(0, 100))
    def look(self, which: int) -> None:
        self.release()
        if self.submitted:
            self.outcome(self.submitted[which % len(self.submitted)][1])

    @rule()
    def close(self) -> None:
        if len(self.submitted) > 12:
            self.service.close()

    def outcome(self, future: Any) -> Any:
        try:
            return future.exception(10)
        except concurrent.futures.CancelledError as cancelled:
            return cancelled

    def teardown(self) -> None:
        if not hasattr(self, "service"):
            return
        self.release()
        outcomes = [(mark, self.outcome(future)) for mark, future in self.submitted]
        self.service.close()
        applied = [
            abs(op[1]["learning_rate"] if op[0] == "optim_step" else op[2][0][0])
            for op in self.trainer.models["model-0"]
        ]
        assert applied == sorted(set(applied)), "once each, in the order of submission"
        for mark, error in outcomes:
            typed = (MintjaxError, LookupError, concurrent.futures.CancelledError)
            assert error is None or isinstance(error, typed), error
            if not mark:
                continue
            if error is None:
                assert mark in applied
            elif mark in applied:
                unsure = getattr(error, "may_have_been_applied", False)
                assert unsure or "closed" in str(error), error


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(
    settings.get_profile("default"), max_examples=examples(30), stateful_step_count=25
)
