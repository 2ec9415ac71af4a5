"""Finds out what a trainer divides losses by, before it gets a gradient that was computed here."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from typing import Literal, get_args

from mintjax.client import remembered
from mintjax.client.connection import Connection
from mintjax.errors import APIResponseError, APIStatusError, UnknownReductionError
from mintjax.protocol import messages
from mintjax.step.probe import Measurement
from mintjax.step.reduction import SUM, Reduction, Unit
from mintjax.step.reported import reported_sum, returns_the_sum
from mintjax.step.routes import Backward
from mintjax.types import ForwardBackwardOutput

logger = logging.getLogger("mintjax.client")

PROMISE_A_SUM = ("tinker.thinkingmachines.dev", "mint.macaron.xin")
"""The hosts of trainers whose documentation says that losses are summed."""

GRADIENTS: Literal["gradients"] = "gradients"
"""Asks for a check of the trainer's own requests that take gradients of logprobs."""

Measure = Callable[[Reduction | Literal["gradients"] | None], Awaitable[Measurement]]
"""Measures on a throwaway model; given a reduction, checks only whether the trainer has it."""


async def reduction_of(
    connection: Connection, measure: Measure, one_target: bool
) -> Reduction | None:
    """Says what the trainer divides losses by.

    In this order: what is known of this connection, what the user says, what an embedded trainer
    says of itself, what the documentation of a hosted trainer promises, what was measured by an
    earlier process and is confirmed by a short measurement, and a measurement. What was measured
    is confirmed in the same way after the trainer was away, because it may have been started with
    other settings.

    Args:
        connection: the session.
        measure: how.
        one_target: each token has one target, not several candidates.

    Returns:
        None where nobody has said it, and it need not be known, because the trainer has requests
        that take the gradient of logprobs as it is.

    Raises:
        UnknownReductionError: it was measured in vain, now or before on this connection.
        APIError: the trainer refuses, or fails.
    """
    facts = connection.facts
    async with connection.measuring:
        _forget_after_outage(connection)
        if facts.reduction is None:
            known = _said(connection)
            if known is None and one_target and await _takes_gradients(connection, measure):
                return None
            facts.is_said = known is not None
            if known is None and not connection.settings.measure:
                known = _assumed(connection)
            facts.reduction = known or await measured(connection, measure)
        return facts.reduction


def _forget_after_outage(connection: Connection) -> None:
    """Forgets what was measured before the trainer was away."""
    facts, outages = connection.facts, connection.transport.outages
    if facts.outages == outages:
        return
    facts.outages = outages
    facts.gradients_tried = False
    is_said = facts.is_said or connection.settings.reduction is not None
    if facts.measured is not None and facts.reduction == facts.measured and not is_said:
        facts.reduction = None
        logger.info(
            "%s was away, and may have been started with other settings: what it makes of losses "
            "is confirmed",
            connection.transport.address,
        )


def check_sum(connection: Connection, sent: Backward, output: ForwardBackwardOutput) -> None:
    """Holds the loss that the trainer reports against the sum of those that were sent.

    That is done where the trainer is taken to sum, and where it has reported sums while it was
    measured, whatever it divides gradients by. What is known of the trainer is forgotten where
    they differ, so that the next step measures.

    Raises:
        UnknownReductionError: they differ.
    """
    facts = connection.facts
    if facts.reduction is None or facts.sums_reported is False:
        return
    promised = facts.reduction.sums and "loss:sum" in output.metrics
    if facts.sums_reported is None and not promised:
        return
    if returns_the_sum(sent.loss_fn, sent.data, output, sent.config) is not False:
        return
    taken = str(facts.reduction)
    again = "the next custom step measures the trainer anew"
    if connection.settings.reduction is not None:
        again = "ServiceClient(reduction=...) says otherwise; leave it out to have it measured"
    elif not connection.settings.measure:
        again = "service.probe() measures it"
    else:
        facts.reduction, facts.measured, facts.is_contradicted = None, None, True
    raise UnknownReductionError(
        f"the trainer reports a loss of {reported_sum(output):.6g}, which is not the sum of the "
        f"losses of {sent.loss_fn} that were sent; it was taken to make of losses {taken}. The "
        "gradient that it has added may be another than the objective's: go on from a checkpoint; "
        f"{again}"
    )


async def _takes_gradients(connection: Connection, measure: Measure) -> bool:
    """Finds out, once, whether the trainer has requests that take the gradient of logprobs.

    Such requests are tried on a throwaway model, because what a trainer says of them is no proof.
    """
    facts = connection.facts
    if facts.takes_gradients is None:
        try:
            await connection.capabilities()
        except (APIResponseError, APIStatusError) as error:
            logger.info("no use of get_server_capabilities: %s", error)
        facts.takes_gradients = facts.takes_gradients or False
    if facts.takes_gradients and not facts.gradients_tried and connection.settings.measure:
        address, began = connection.transport.address, time.monotonic()
        try:
            found = await measure(GRADIENTS)
        except UnknownReductionError as error:
            facts.takes_gradients = False
            logger.warning(
                "the requests of %s that take gradients of logprobs do not add the gradients that "
                "they are sent, and are not used: %s",
                address,
                error,
            )
        else:
            facts.gradients_tried = True
            logger.warning(
                "%s takes gradients of logprobs as they are, as %d steps on a throwaway model have "
                "shown in %.1f s; what it divides its own losses by is not measured",
                address,
                found.steps,
                time.monotonic() - began,
            )
    return facts.takes_gradients


async def measured(connection: Connection, measure: Measure, *, anew: bool = False) -> Reduction:
    """Measures what the trainer divides losses by, and remembers it.

    Args:
        connection: the session.
        measure: how.
        anew: measure although an earlier process has, or this one in vain.

    Raises:
        UnknownReductionError: it cannot be told.
    """
    facts, address = connection.facts, connection.transport.address
    if facts.unknown is not None and not anew:
        raise UnknownReductionError(facts.unknown)
    is_remote = connection.settings.transport is None
    earlier = None if anew else _earlier(connection)
    began = time.monotonic()
    found: Measurement | None = None
    if earlier is not None:
        try:
            found = await measure(earlier[0])
        except UnknownReductionError as error:
            logger.info("what was measured on %s no longer holds: %s", earlier[1], error)
    try:
        found = found or await measure(None)
    except UnknownReductionError as error:
        facts.unknown = (
            f"{error}. No gradient of a custom loss is sent to {address}, because it would arrive "
            "as another one; ServiceClient(reduction=...) says by hand what this trainer does"
        )
        if is_remote:
            remembered.remember(address, None)
        raise UnknownReductionError(facts.unknown) from None
    facts.reduction, facts.sums_reported = found.reduction, found.reports_sum
    facts.measured, facts.outages = found.reduction, connection.transport.outages
    said = _said(connection)
    facts.is_said = found.reduction == said
    facts.is_contradicted |= said is not None and not facts.is_said
    facts.unknown = None
    if is_remote:
        remembered.remember(address, found.reduction)
    logger.log(
        logging.INFO if anew else logging.WARNING,
        "%s makes of the losses of tokens %s: measured by %d steps on a throwaway model in %.1f s; "
        "a batch that was held out moved as predicted within %.2g%%",
        address,
        found.reduction,
        found.steps,
        time.monotonic() - began,
        100 * found.error,
    )
    return found.reduction


async def measured_anew(connection: Connection, measure: Measure) -> Reduction:
    """Measures what the trainer divides losses by, whatever is known of it, and remembers it.

    Raises:
        UnknownReductionError: it cannot be told.
    """
    async with connection.measuring:
        return await measured(connection, measure, anew=True)


def _earlier(connection: Connection) -> tuple[Reduction, str] | None:
    """Finds what was measured before, and when."""
    if connection.facts.measured is not None:
        return connection.facts.measured, "this connection"
    if connection.settings.transport is not None:
        return None
    return remembered.reduction_of(connection.transport.address)


def _said(connection: Connection) -> Reduction | None:
    settings, address = connection.settings, connection.transport.address
    if settings.reduction is not None:
        return settings.reduction
    if connection.facts.is_contradicted:
        return None
    stated = connection.encoding.limits.mintjax_reduction
    if stated is not None:
        return _read(stated)
    if settings.transport is None and settings.url.host in PROMISE_A_SUM:
        logger.info("%s sums losses, as its documentation says; this was not measured", address)
        return SUM
    return None


def _assumed(connection: Connection) -> Reduction:
    logger.warning(
        "what %s divides losses by is not known and was not measured; gradients of custom losses "
        "are sent as if it summed",
        connection.transport.address,
    )
    return SUM


def _read(stated: messages.StatedReduction) -> Reduction | None:
    units: list[Unit | None] = []
    for name in (stated.per_sequence, stated.per_request, stated.per_step):
        if name is not None and name not in get_args(Unit):
            return None  # a newer trainer's; it is measured
        units.append(_UNITS.get(name) if name else None)
    return Reduction(units[0], per_request=units[1], per_step=units[2])


_UNITS: dict[str, Unit] = {unit: unit for unit in get_args(Unit)}
