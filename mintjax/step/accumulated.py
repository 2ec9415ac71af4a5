"""Counts the datums whose gradients a trainer holds between two optimizer steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mintjax.errors import DataError


@dataclass(eq=False)
class Sent:
    """A request that the trainer has accepted and that changes what is accumulated.

    Args:
        datums: how many datums' gradients it adds.
        announced: how many datums its gradient was scaled for, if it was scaled for a number.
        clears: it leaves nothing accumulated, as an optimizer step does.
        outcome: what became of it.
    """

    datums: int = 0
    announced: int | None = None
    clears: bool = False
    outcome: Literal["under way", "applied", "unknown"] = "under way"


class Accumulated:
    """Counts the datums whose gradients are in the trainer.

    A request counts from the moment the trainer has accepted it. It ceases to count when it has
    failed, so a failed optimizer step leaves accumulated what was so before.
    """

    def __init__(self) -> None:
        self._sent: list[Sent] = []

    def accepted(self, request: Sent) -> None:
        """Notes that the trainer has accepted a request."""
        self._sent.append(request)

    def applied(self, request: Sent) -> None:
        """Notes that a request has succeeded."""
        request.outcome = "applied"
        if request.clears and request in self._sent:
            del self._sent[: self._sent.index(request) + 1]

    def failed(self, request: Sent) -> None:
        """Notes that a request has failed and changed nothing."""
        if request in self._sent:
            self._sent.remove(request)

    def lost(self, request: Sent) -> None:
        """Notes that nobody knows whether a request was applied."""
        request.outcome = "unknown"

    def datums_in_step(self, datums: int, announced: int | None) -> int:
        """Says how many datums a custom step's gradient must be scaled for.

        Args:
            datums: how many the step has.
            announced: how many the user says there will be before the optimizer step, if at all.

        Raises:
            DataError: more are in the trainer, or to come, than were announced; or their number
                is not known.
        """
        held, before = self._held()
        total = announced or datums
        if held + datums > total or before not in (None, total) or (held and not announced):
            raise DataError(
                f"this trainer averages over the datums of all passes before an optimizer step, "
                f"so each custom step must be told their number beforehand: {held} are "
                f"accumulated, {datums} are to be added, announced were {announced or 'none'}. "
                "Pass the same datums_in_step to each, or take the optimizer step first",
                field="datums_in_step",
            )
        return total

    def check_step(self) -> None:
        """Checks that the optimizer step divides by the number that gradients were scaled for.

        Raises:
            DataError: other than the announced number of datums are accumulated, or their number
                is not known.
        """
        held, announced = self._held()
        if announced is not None and announced != held:
            raise DataError(
                f"{announced} datums were announced before this optimizer step and {held} came; "
                "the trainer would divide by the wrong number. Send the others first, or drop "
                "what is accumulated with load_state",
                field="datums_in_step",
            )

    def _held(self) -> tuple[int, int | None]:
        """Counts the datums in the trainer, and those that were announced, if any were."""
        last = max((i for i, one in enumerate(self._sent) if one.clears), default=-1)
        current = self._sent[max(last, 0) :]
        if any(one.outcome == "unknown" for one in current):
            raise DataError(
                "this trainer averages over the datums that are accumulated, and their number is "
                "not known, because a request was never answered. Go on from a checkpoint with "
                "load_state",
                field="datums_in_step",
            )
        announced = {one.announced for one in current if one.announced is not None}
        return sum(one.datums for one in current), max(announced, default=None)
