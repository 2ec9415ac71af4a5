"""What is accumulated in a trainer between two optimizer steps."""

from __future__ import annotations

from mintjax.errors import DataError
from mintjax.step.reduction import Reduction


class Accumulated:
    """How many datums' gradients are in the trainer, where it will divide by their number."""

    def __init__(self) -> None:
        self._datums = 0
        self._announced: int | None = None

    def divisor(self, reduction: Reduction, datums: int, announced: int | None) -> int | None:
        """What the trainer will divide a custom step's gradient by; None if by nothing.

        Args:
            reduction: the trainer's.
            datums: how many the step has.
            announced: how many the user says there will be before the optimizer step, if at all.

        Raises:
            DataError: more are in the trainer, or to come, than were announced.
        """
        if not reduction.over_datums:
            return None
        total = announced or datums
        before = self._announced if self._announced is not None else total
        if self._datums + datums > total or before != total or (self._datums and not announced):
            raise DataError(
                f"this trainer averages over the datums of all passes before an optimizer step, "
                f"so each custom step must be told their number beforehand: {self._datums} are "
                f"accumulated, {datums} are to be added, announced were {announced or 'none'}. "
                "Pass the same datums_in_step to each, or take the optimizer step first",
                field="datums_in_step",
            )
        return total

    def add(self, datums: int, divisor: int | None = None) -> None:
        """Note a pass that was sent, its gradient multiplied by ``divisor`` beforehand."""
        self._datums += datums
        self._announced = divisor or self._announced

    def step(self) -> None:
        """Note an optimizer step that is about to be sent.

        Raises:
            DataError: other than the announced number of datums are accumulated.
        """
        datums, announced = self._datums, self._announced
        if announced is not None and announced != datums:
            raise DataError(
                f"{announced} datums were announced before this optimizer step and {datums} came; "
                "the trainer would divide by the wrong number. Send the others first",
                field="datums_in_step",
            )
        self.forget()

    def forget(self) -> None:
        """Note that nothing is accumulated any more."""
        self._datums, self._announced = 0, None
