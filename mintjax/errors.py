"""The errors that mintjax raises, as a small hierarchy.

Everything that mintjax raises on its own account is a :class:`MintjaxError`. An exception raised
inside a user's objective is never wrapped: it arrives with its own type and traceback.

    MintjaxError
    ├── DataError (ValueError)            the data: which datum, which field, what to do
    ├── ObjectiveError (TypeError)        the objective returned something that is no loss
    ├── NonFiniteError (FloatingPointError)  a NaN or an infinity, caught before it is sent
    ├── RowAccessError (TypeError)        (in ragged) a row of traced length was asked for
    ├── TransformationError (TypeError)   a JAX transformation that cannot reach the trainer
    ├── StaleError (RuntimeError)         params or gradients of another version of the model
    ├── ConfigError (ValueError)          an argument or environment variable of the client
    ├── ClosedError                       the client was closed
    ├── NotCopyableError (TypeError)      a client or future that was to be copied or pickled
    └── APIError                          the trainer, or the way to it
        ├── APIConnectionError (ConnectionError)
        │   └── APITimeoutError (TimeoutError)
        ├── APIResponseError              an answer that is not the protocol's
        ├── APIStatusError                an HTTP status that is final
        │   ├── BadRequestError           400, 422 and the other 4xx
        │   ├── AuthenticationError       401, 403
        │   ├── BillingError              402
        │   ├── NotFoundError             404
        │   ├── RateLimitError            429, when the retries are used up
        │   └── InternalServerError       5xx, when the retries are used up
        ├── RequestFailedError            the request was accepted, and failed when it ran
        ├── AmbiguousRequestError         sent, never answered: it may have been applied
        └── NotSentError                  withheld, because what it would have built on failed
"""

from __future__ import annotations

from typing import Any, TypeVar

E = TypeVar("E", bound=BaseException)


class MintjaxError(Exception):
    """The base of every error that mintjax raises itself; it can be pickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.args, self.__dict__)


def _rebuild(kind: type[E], args: tuple[Any, ...], state: dict[str, Any]) -> E:
    # Not kind(*args): an __init__ that composes the message takes other arguments than that.
    error = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error


class DataError(MintjaxError, ValueError):
    """The data cannot be used.

    Args:
        message: what is wrong and what to do about it.
        datum: position of the datum in the list that was passed, or None where it concerns all.
        field: the input at fault (``"target_tokens"``, ``"weights"``, ...), or None.

    Attributes:
        reason: the message, without the place.
    """

    def __init__(self, message: str, *, datum: int | None = None, field: str | None = None) -> None:
        where = [] if datum is None else [f"datum {datum}"]
        where += [] if field is None else [f"field {field!r}"]
        super().__init__(f"{', '.join(where)}: {message}" if where else message)
        self.reason = message
        self.datum = datum
        self.field = field


class ObjectiveError(MintjaxError, TypeError):
    """The objective returned something other than ``(scalar loss, dict of scalar metrics)``."""


class NonFiniteError(MintjaxError, FloatingPointError):
    """A value that must be finite is not; nothing was sent.

    Args:
        message: what is not finite, where, and what to do about it.
        datum: position of the datum, or None.
        position: flat position of the token within that datum, or None.
    """

    def __init__(
        self, message: str, *, datum: int | None = None, position: int | None = None
    ) -> None:
        super().__init__(message)
        self.datum = datum
        self.position = position


class TransformationError(MintjaxError, TypeError):
    """A JAX transformation (``vmap``, ``jvp``, a second derivative) that no trainer can follow."""


class StaleError(MintjaxError, RuntimeError):
    """Params or gradients that do not belong to the model as the trainer has it now."""


class UnknownReductionError(MintjaxError):
    """It cannot be told what a trainer divides losses by, so no custom gradient is sent to it.

    The message says what was measured. ``ServiceClient(reduction=...)`` says it by hand.
    """


class ConfigError(MintjaxError, ValueError):
    """The client cannot be set up so: a base URL, a key or an option; the message says which."""


class ClosedError(MintjaxError):
    """The client was closed, before the call or while it was under way."""


class NotCopyableError(MintjaxError, TypeError):
    """A client or a future cannot be copied or pickled; the message says what to do instead."""


class APIError(MintjaxError):
    """The trainer, or the connection to it, did not do what was asked.

    Attributes:
        may_have_been_applied: False where the request certainly had no effect and never will, so
            that it can be submitted again. True where it may have taken effect all the same.
    """

    may_have_been_applied: bool = False


class APIConnectionError(APIError, ConnectionError):
    """No connection to the trainer; the message names the address and how long was tried."""


class APITimeoutError(APIConnectionError, TimeoutError):
    """No answer within the time allowed."""


class APIResponseError(APIError):
    """The answer does not follow the protocol; the message says at which field."""


class APIStatusError(APIError):
    """The trainer answered with a status that is final.

    Args:
        status_code: the HTTP status.
        message: the trainer's own ``detail`` where it gave one.
    """

    def __init__(self, status_code: int, message: str) -> None:
        super().__init__(f"HTTP {status_code}: {message}")
        self.status_code = status_code
        self.message = message


class BadRequestError(APIStatusError):
    """400, 422 or another 4xx: the request is at fault; the message is the trainer's."""


class AuthenticationError(APIStatusError):
    """401 or 403: the API key is missing, wrong, or not allowed to do this."""


class BillingError(APIStatusError):
    """402: billing is paused for this account."""


class NotFoundError(APIStatusError):
    """404: the model, checkpoint, session or path is unknown to the trainer."""


class RateLimitError(APIStatusError):
    """429, still after every retry that the deadline allowed."""


class InternalServerError(APIStatusError):
    """5xx, still after every retry that the deadline allowed."""


class RequestFailedError(APIError):
    """The trainer accepted the request and failed when it ran it.

    Args:
        message: the trainer's own words.
        request_id: the trainer's name of the request.
        category: ``"user"`` (the request is at fault), ``"server"`` or ``"unknown"``.
    """

    def __init__(self, message: str, *, request_id: str, category: str) -> None:
        super().__init__(f"{message} (request {request_id}, category {category})")
        self.request_id = request_id
        self.category = category


class AmbiguousRequestError(APIError):
    """A request was sent and not clearly answered: the trainer may or may not have applied it.

    The model's weights are then unknown. Go on from a checkpoint.
    """


class NotSentError(APIError):
    """The request was withheld, because one before it failed; submit it again after that one."""
