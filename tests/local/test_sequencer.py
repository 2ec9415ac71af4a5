"""Order, at most once, and no request that waits for one that will never come."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import closing
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mintjax.local.sequencer import (
    MAX_INTERLEAVED,
    ForgottenError,
    MissingNumberError,
    OtherContentError,
    Sequencer,
    UnknownRequestError,
)
from mintjax.local.slices import Slices

TIMEOUT = 10.0


@pytest.fixture
def sequencer() -> Iterator[Sequencer]:
    sequencer = Sequencer()
    yield sequencer
    sequencer.close()


class Log:
    """Works that write down when they ran."""

    def __init__(self) -> None:
        self.ran: list[object] = []

    def work(self, name: object) -> Callable[[], bytes]:
        def run() -> bytes:
            self.ran.append(name)
            return str(name).encode()

        return run


def flush(sequencer: Sequencer) -> None:
    """Wait until everything that could run has run."""
    sequencer.result(sequencer.submit(lambda: b"")).result(TIMEOUT)


@given(st.permutations(range(1, 8)))
def test_numbers_decide_whatever_the_order_of_arrival(arrival):
    log, sequencer = Log(), Sequencer()
    ids = {n: sequencer.submit(log.work(n), line="m", number=n) for n in arrival}
    results = {n: sequencer.result(ids[n]).result(TIMEOUT) for n in arrival}
    sequencer.close()
    assert log.ran == sorted(arrival)
    assert results == {n: str(n).encode() for n in arrival}


@given(
    st.permutations(range(1, 8)),
    st.sets(st.integers(1, 7)),
    st.lists(st.integers(1, 7), max_size=10),
    st.randoms(use_true_random=False),
)
def test_each_once_and_in_order_with_refusals_and_repeats(arrival, refused, repeats, random):
    log, sequencer = Log(), Sequencer()
    events = [*arrival, *repeats]
    random.shuffle(events)
    ids: dict[int, str] = {}
    for n in events:
        if n in refused:
            sequencer.reject("m", n)
            continue
        request_id = sequencer.submit(log.work(n), line="m", number=n)
        assert ids.setdefault(n, request_id) == request_id
    for request_id in ids.values():
        sequencer.result(request_id).result(TIMEOUT)
    sequencer.close()
    assert log.ran == sorted(set(arrival) - refused)


@given(st.permutations([("a", 1), ("a", 2), ("a", 3), ("b", 1), ("b", 2), ("b", 3)]))
def test_lines_keep_their_own_order(arrival):
    log, sequencer = Log(), Sequencer()
    for line, n in arrival:
        sequencer.submit(log.work((line, n)), line=line, number=n)
    flush(sequencer)
    sequencer.close()
    for line in "ab":
        assert [n for name, n in log.ran if name == line] == [1, 2, 3]


def test_a_line_that_waits_holds_up_no_other(sequencer):
    held = sequencer.submit(lambda: b"held", line="a", number=2)
    free = sequencer.submit(lambda: b"free", line="b", number=1)
    assert sequencer.result(free).result(TIMEOUT) == b"free"
    assert not sequencer.result(held).done()
    assert sequencer.waits_for(held) == 1
    assert sequencer.waits_for(free) is None


def test_without_a_number_arrival_decides(sequencer):
    log = Log()
    for name in "cab":
        sequencer.submit(log.work(name), line="m")
    flush(sequencer)
    assert log.ran == ["c", "a", "b"]


class TestRefusals:
    def test_a_refused_number_can_be_used_again(self, sequencer):
        log = Log()
        sequencer.submit(log.work(1), line="m", number=1)
        sequencer.reject("m", 2)
        sequencer.submit(log.work(2), line="m", number=2)
        sequencer.submit(log.work(3), line="m", number=3)
        flush(sequencer)
        assert log.ran == [1, 2, 3]

    def test_or_be_left_out(self, sequencer):
        log = Log()
        sequencer.reject("m", 1)
        sequencer.submit(log.work(2), line="m", number=2)
        flush(sequencer)
        assert log.ran == [2]

    def test_it_frees_those_that_waited_for_it(self, sequencer):
        log = Log()
        sequencer.submit(log.work(2), line="m", number=2)
        flush(sequencer)
        assert log.ran == []
        sequencer.reject("m", 1)
        flush(sequencer)
        assert log.ran == [2]

    def test_used_again_late_it_runs_once(self, sequencer):
        log = Log()
        sequencer.reject("m", 1)
        sequencer.submit(log.work(2), line="m", number=2)
        first = sequencer.submit(log.work(1), line="m", number=1)
        again = sequencer.submit(log.work(1), line="m", number=1)
        flush(sequencer)
        assert first == again
        assert log.ran == [2, 1]

    def test_a_number_that_was_taken_cannot_be_refused(self, sequencer):
        log = Log()
        sequencer.submit(log.work(2), line="m", number=2)
        sequencer.reject("m", 2)
        sequencer.submit(log.work(1), line="m", number=1)
        sequencer.reject("m", 1)
        flush(sequencer)
        assert log.ran == [1, 2]


class TestRepeats:
    def test_a_key_is_enough(self, sequencer):
        log = Log()
        first = sequencer.submit(log.work("once"), key=("path", "k"))
        again = sequencer.submit(log.work("twice"), key=("path", "k"))
        flush(sequencer)
        assert first == again
        assert log.ran == ["once"]

    def test_a_number_seen_again_has_the_first_result(self, sequencer):
        first = sequencer.submit(lambda: b"first", line="m", number=1)
        sequencer.result(first).result(TIMEOUT)
        again = sequencer.submit(lambda: b"again", line="m", number=1)
        assert sequencer.result(again).result(TIMEOUT) == b"first"

    def test_even_when_the_result_is_forgotten(self):
        log, sequencer = Log(), Sequencer(max_results=2)
        first = sequencer.submit(log.work(1), line="m", number=1)
        for n in range(2, 6):
            sequencer.submit(log.work(n), line="m", number=n)
        flush(sequencer)
        assert sequencer.submit(log.work(1), line="m", number=1) == first
        flush(sequencer)
        with pytest.raises(ForgottenError):
            sequencer.result(first)
        sequencer.close()
        assert log.ran == [1, 2, 3, 4, 5]


class TestOtherContent:
    @pytest.mark.parametrize("where", [{"line": "m", "number": 1}, {"key": "k"}])
    def test_is_refused_and_the_first_stands(self, sequencer, where):
        log = Log()
        first = sequencer.submit(log.work("first"), content=b"first", **where)
        with pytest.raises(OtherContentError, match="came before, with another content"):
            sequencer.submit(log.work("other"), content=b"other", **where)
        assert sequencer.submit(log.work("again"), content=b"first", **where) == first
        flush(sequencer)
        with pytest.raises(OtherContentError):
            sequencer.submit(log.work("late"), content=b"late", **where)
        assert sequencer.result(first).result(TIMEOUT) == b"first"
        assert log.ran == ["first"]

    def test_a_number_that_was_refused_may_come_with_another(self, sequencer):
        log = Log()
        sequencer.reject("m", 1)
        sequencer.submit(log.work(1), line="m", number=1, content=b"better")
        flush(sequencer)
        assert log.ran == [1]


class TestAMissingNumber:
    def test_is_not_waited_for_without_end(self, sequencer):
        log = Log()
        held = [sequencer.submit(log.work(n), line="m", number=n) for n in (3, 4)]
        sequencer.give_up(held[0], 3600)
        assert not sequencer.result(held[0]).done()
        sequencer.give_up(held[0], 0)
        for request_id in held:
            with pytest.raises(MissingNumberError, match="seq_id 1, which comes before"):
                sequencer.result(request_id).result(TIMEOUT)
        again = {n: sequencer.submit(log.work(n), line="m", number=n) for n in (4, 2, 1, 3)}
        results = {n: sequencer.result(again[n]).result(TIMEOUT) for n in again}
        assert results == {n: str(n).encode() for n in (4, 2, 1, 3)}
        assert log.ran.index(1) < log.ran.index(2)

    def test_what_does_not_wait_is_left_alone(self, sequencer):
        done = sequencer.submit(lambda: b"done", line="m", number=1)
        sequencer.give_up(done, 0)
        sequencer.give_up("nobody's", 0)
        assert sequencer.result(done).result(TIMEOUT) == b"done"

    def test_one_that_was_given_up_stays_so_until_it_is_sent_again(self, sequencer):
        log = Log()
        sequencer.submit(log.work(2), line="m", number=2, key="k")
        sequencer.give_up(sequencer.submit(log.work(2), line="m", number=2), 0)
        sequencer.submit(log.work(1), line="m", number=1)
        flush(sequencer)
        assert log.ran == [1]
        sequencer.submit(log.work(2), line="m", number=2, key="k", content=b"other")
        flush(sequencer)
        assert log.ran == [1, 2]


class Slow:
    """A work of slices, each of which waits until it may go on."""

    def __init__(self) -> None:
        self.begun, self.may_go_on, self.ended = (threading.Event() for _ in range(3))

    def work(self) -> Slices[bytes]:
        try:
            while True:
                self.begun.set()
                assert self.may_go_on.wait(TIMEOUT)
                yield
        finally:
            self.ended.set()


class TestSlices:
    def test_their_result_is_what_they_return(self, sequencer):
        def work() -> Slices[bytes]:
            yield
            yield
            return b"done"

        for interleaved in (False, True):
            request_id = sequencer.submit(work, interleaved=interleaved)
            assert sequencer.result(request_id).result(TIMEOUT) == b"done"

    def test_others_run_in_between(self, sequencer):
        slow = Slow()
        slow.may_go_on.set()
        long = sequencer.submit(slow.work, interleaved=True)
        for n in (1, 2):
            other = sequencer.submit(lambda: b"other", line="m", number=n)
            assert sequencer.result(other).result(TIMEOUT) == b"other"
        assert not sequencer.result(long).done()

    def test_but_not_where_others_count_on_the_effect(self, sequencer):
        log = Log()

        def work() -> Slices[bytes]:
            for i in range(3):
                log.ran.append(i)
                yield
            return b""

        sequencer.submit(work, line="m", number=1)
        sequencer.submit(log.work("next"), line="m", number=2)
        flush(sequencer)
        assert log.ran == [0, 1, 2, "next"]

    def test_several_advance_in_turn_and_the_rest_begin_later(self, sequencer):
        order: list[int] = []
        may_begin = threading.Event()

        def work(n: int) -> Slices[bytes]:
            for _ in range(9):
                order.append(n)
                yield
            return b""

        held = sequencer.submit(lambda: b"" if may_begin.wait(TIMEOUT) else b"?")
        numbers = range(MAX_INTERLEAVED + 1)
        ids = [sequencer.submit(partial(work, n), interleaved=True) for n in numbers]
        may_begin.set()
        for request_id in (held, *ids):
            sequencer.result(request_id).result(TIMEOUT)
        assert [order.count(n) for n in numbers] == [9] * len(numbers)
        assert order.index(1) < len(order) - 1 - order[::-1].index(0)  # 0 did not run to its end
        assert set(order[: order.index(MAX_INTERLEAVED)]) == set(numbers[:-1])

    def test_one_that_raises_fails_alone(self, sequencer):
        def work() -> Slices[bytes]:
            yield
            raise ZeroDivisionError("mine")

        bad = sequencer.submit(work, interleaved=True)
        with pytest.raises(ZeroDivisionError, match="mine"):
            sequencer.result(bad).result(TIMEOUT)
        flush(sequencer)

    def test_one_can_be_cancelled(self, sequencer):
        slow = Slow()
        under_way = sequencer.submit(slow.work, interleaved=True)
        assert slow.begun.wait(TIMEOUT)
        queued = sequencer.submit(slow.work, interleaved=True)
        sequencer.cancel(under_way)
        sequencer.cancel(queued)
        slow.may_go_on.set()
        for request_id in (under_way, queued):
            with pytest.raises(CancelledError):
                sequencer.result(request_id).result(TIMEOUT)
        assert slow.ended.wait(TIMEOUT)
        flush(sequencer)

    def test_what_others_count_on_is_not_cancelled(self, sequencer):
        waiting = sequencer.submit(lambda: b"done", line="m", number=2)
        sequencer.cancel(waiting)
        sequencer.submit(lambda: b"", line="m", number=1)
        assert sequencer.result(waiting).result(TIMEOUT) == b"done"
        with pytest.raises(UnknownRequestError):
            sequencer.cancel("nobody's")

    @pytest.mark.parametrize("interleaved", [False, True])
    def test_closing_does_not_wait_for_their_end(self, sequencer, interleaved):
        slow = Slow()
        slow.may_go_on.set()
        endless = sequencer.result(sequencer.submit(slow.work, interleaved=interleaved))
        assert slow.begun.wait(TIMEOUT)
        sequencer.close()
        assert slow.ended.is_set()
        with pytest.raises(CancelledError):
            endless.result(TIMEOUT)


class TestFailures:
    def test_one_that_raises_fails_alone(self, sequencer):
        def fail() -> bytes:
            raise ZeroDivisionError("mine")

        bad = sequencer.submit(fail, line="m", number=1)
        good = sequencer.submit(lambda: b"fine", line="m", number=2)
        with pytest.raises(ZeroDivisionError, match="mine"):
            sequencer.result(bad).result(TIMEOUT)
        assert sequencer.result(good).result(TIMEOUT) == b"fine"

    def test_ids_that_were_never_given_out(self, sequencer):
        real = sequencer.submit(lambda: b"", line="m", number=1)
        prefix = real.split(":", 1)[0]
        for request_id in ("", "x", "::", f"{prefix}:m:2", f"{prefix}:n:1", f"{prefix}:9", "9:m:1"):
            with pytest.raises(UnknownRequestError):
                sequencer.result(request_id)


class TestMemory:
    def test_the_oldest_are_forgotten_beyond_the_limit(self):
        sequencer = Sequencer(max_results=3)
        ids = [sequencer.submit(lambda: b"x") for _ in range(3)]
        sequencer.result(sequencer.submit(lambda: b"")).result(TIMEOUT)
        sequencer.close()
        with pytest.raises(ForgottenError):
            sequencer.result(ids[0])
        assert sequencer.result(ids[1]).result(TIMEOUT) == b"x"

    def test_unretrieved_results_outlive_retrieved_ones(self):
        sequencer = Sequencer(max_results=2)
        kept = sequencer.submit(lambda: b"kept")
        given_out = sequencer.submit(lambda: b"given out")
        sequencer.result(given_out).result(TIMEOUT)
        barrier = sequencer.submit(lambda: b"")  # by then both results are filed
        sequencer.retrieved(given_out)
        sequencer.result(barrier).result(TIMEOUT)
        sequencer.close()
        assert sequencer.result(kept).result(TIMEOUT) == b"kept"
        with pytest.raises(ForgottenError):
            sequencer.result(given_out)

    def test_bytes_count_too(self):
        sequencer = Sequencer(max_result_bytes=100)
        ids = [sequencer.submit(lambda: b"x" * 60) for _ in range(3)]
        sequencer.result(ids[-1]).result(TIMEOUT)
        sequencer.close()
        with pytest.raises(ForgottenError):
            sequencer.result(ids[0])
        assert len(sequencer.result(ids[-1]).result(TIMEOUT)) == 60

    def test_a_request_that_has_run_lets_go_of_its_data(self, sequencer):
        import gc
        import weakref

        class Data:
            pass

        data = Data()
        reference = weakref.ref(data)

        def work(data: Data = data) -> bytes:
            return b"" if data else b"?"

        request_id = sequencer.submit(work)
        del data, work
        sequencer.result(request_id).result(TIMEOUT)
        flush(sequencer)
        gc.collect()
        assert reference() is None


class TestGroups:
    @given(
        groups=st.lists(st.sampled_from("ab"), max_size=12),
        fails=st.sets(st.integers(0, 11)),
        asked=st.lists(st.integers(0, 11), max_size=4),
    )
    def test_each_that_has_finished_is_listed_once_to_who_follows_the_cursor(
        self, groups, fails, asked
    ):
        def work(i):
            return lambda: 1 / 0 if i in fails else b"x" * i

        with closing(Sequencer()) as sequencer:
            ids, seen, cursor = [], [], 0
            for i, group in enumerate(groups):
                ids.append(sequencer.submit(work(i), group=group))
                if i in asked and group == "a":
                    with sequencer.watching("a", cursor) as finished:
                        finished.result(TIMEOUT)  # there is at least this one, sooner or later
                    seen += sequencer.finished("a", cursor)
                    cursor = seen[-1].at
            flush(sequencer)
            seen += sequencer.finished("a", cursor)
        expected = [
            (ids[i], None if i in fails else i) for i, group in enumerate(groups) if group == "a"
        ]
        assert [(one.request_id, one.size) for one in seen] == expected

    def test_closing_ends_the_watching(self, sequencer):
        with sequencer.watching("nobody", 0) as finished:
            assert not finished.done()
            sequencer.close()
            assert finished.done()

    def test_the_forgotten_are_listed_no_more(self):
        with closing(Sequencer(max_results=2)) as sequencer:
            ids = [sequencer.submit(lambda: b"", group="a") for _ in range(4)]
            with sequencer.watching("a", 3) as finished:
                finished.result(TIMEOUT)
            assert [one.request_id for one in sequencer.finished("a", 0)] == ids[2:]


class TestEnding:
    def test_dropping_a_line_cancels_what_waits_in_it(self, sequencer):
        waiting = sequencer.result(sequencer.submit(lambda: b"", line="m", number=2))
        sequencer.drop("m")
        with pytest.raises(CancelledError):
            waiting.result(TIMEOUT)

    def test_closing_finishes_what_runs_and_cancels_the_rest(self):
        sequencer, started, may_end = Sequencer(), threading.Event(), threading.Event()

        def slow() -> bytes:
            started.set()
            may_end.wait(TIMEOUT)
            return b"done"

        running = sequencer.result(sequencer.submit(slow))
        queued = sequencer.result(sequencer.submit(lambda: b"never"))
        held = sequencer.result(sequencer.submit(lambda: b"never", line="m", number=2))
        started.wait(TIMEOUT)
        closing = threading.Thread(target=sequencer.close)
        closing.start()
        may_end.set()
        closing.join(TIMEOUT)
        assert running.result(TIMEOUT) == b"done"
        assert queued.cancelled()
        assert held.cancelled()
        late = sequencer.submit(lambda: b"never")
        assert sequencer.result(late).cancelled()

    def test_closing_twice_is_closing(self, sequencer):
        sequencer.close()
        sequencer.close()
        assert sequencer.result(sequencer.submit(lambda: b"")).cancelled()


def test_many_threads_submit_at_once(sequencer):
    log = Log()
    numbers = [list(range(start, 201, 8)) for start in range(1, 9)]

    def submit(mine: list[int]) -> None:
        for n in reversed(mine):
            sequencer.submit(log.work(n), line="m", number=n)

    threads = [threading.Thread(target=submit, args=(mine,)) for mine in numbers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
    flush(sequencer)
    assert log.ran == list(range(1, 201))
