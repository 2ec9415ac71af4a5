"""Finds out what a trainer divides losses by, before it gets a gradient that was computed here."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from typing import get_args

from mintjax.client import remembered
from mintjax.client.connection import Connection
from mintjax.errors import APIResponseError, APIStatusError, UnknownReductionError
from mintjax.protocol import messages
from mintjax.step.probe import Measurement
from mintjax.step.reduction import SUM, Reduction, Unit

logger = logging.getLogger("mintjax.client")

PROMISE_A_SUM = ("tinker.thinkingmachines.dev", "mint.macaron.xin")
"""The hosts of trainers whose documentation says that losses are summed."""

Measure = Callable[[Reduction | None], Awaitable[Measurement]]
"""Measures on a throwaway model; given a reduction, checks only whether the trainer has it."""


async def reduction_of(
    connection: Connection, measure: Measure, one_target: bool
) -> Reduction | None:
    """Says what the trainer divides losses by.

    In this order: what is known of this connection, what the user says, what an embedded trainer
    says of itself, what the documentation of a hosted trainer promises, what was measured by an
    earlier process and is confirmed by a short measurement, and a measurement.

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
        if facts.reduction is None:
            known = _said(connection)
            if known is None and one_target and await _takes_gradients(connection):
                return None
            if known is None and not connection.settings.measure:
                known = _assumed(connection)
            facts.reduction = known or await measured(connection, measure)
        return facts.reduction


async def _takes_gradients(connection: Connection) -> bool:
    """Asks, once, whether the trainer has requests that take the gradient of logprobs."""
    facts = connection.facts
    if facts.takes_gradients is None:
        try:
            await connection.capabilities()
        except (APIResponseError, APIStatusError) as error:
            logger.info("no use of get_server_capabilities: %s", error)
        facts.takes_gradients = facts.takes_gradients or False
        if facts.takes_gradients:
            logger.info(
                "%s takes gradients of logprobs as they are, so what it divides its own losses by "
                "is not measured",
                connection.transport.address,
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
    earlier = remembered.reduction_of(address) if is_remote and not anew else None
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


def _said(connection: Connection) -> Reduction | None:
    settings, address = connection.settings, connection.transport.address
    if settings.reduction is not None:
        return settings.reduction
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
