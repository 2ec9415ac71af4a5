"""Lets holders of the API key, or of a token for it, use the trainer, and no web page."""

from __future__ import annotations

import base64
import hashlib
import hmac
import ipaddress
import json
import secrets
import time
from collections.abc import Collection
from typing import Any

from mintjax.errors import ConfigError

TOKEN_SECONDS = 24 * 3600


class Access:
    """Checks keys, and gives out tokens in their place.

    Some clients exchange their key for a JWT at once, and send that from then on.

    Args:
        api_key: the one key; None lets everybody in who is no web page.
        names: by which the trainer may be addressed where it has no key, beside ``localhost`` and
            addresses in numbers. A name could belong to a web page that has it point here.
    """

    def __init__(self, api_key: str | None, names: Collection[str] = ()) -> None:
        self._api_key = api_key
        self._names = {"localhost", *(name.lower() for name in names)}
        self._secret = secrets.token_bytes(32)

    def allows(self, presented: str | None) -> bool:
        """Returns whether a request with this ``X-API-Key`` is to be served."""
        return self._api_key is None or self._valid_until(presented) > time.time()

    def token(self, presented: str | None) -> str:
        """Makes a JWT (RFC 7519, HS256) that is as good as the key for a day.

        One that is asked for with a token is good for as long as that, so that nobody can renew a
        token for ever without the key.
        """
        now = int(time.time())
        expires = now + TOKEN_SECONDS
        if self._api_key is not None:
            expires = int(min(expires, self._valid_until(presented)))
        claims = {"iat": now, "exp": expires, "sub": "mintjax:user:local", "org_id": "local"}
        signed = f"{_part({'alg': 'HS256', 'typ': 'JWT'})}.{_part(claims)}"
        return f"{signed}.{self._signature(signed)}"

    def web_page(self, host: str, origin: str | None) -> str | None:
        """Says why a request could come from a web page of somebody else; None if it could not.

        Args:
            host: the header ``Host``: what the sender believes to talk to.
            origin: the header ``Origin``, which browsers add and pages cannot change.
        """
        if origin is not None and origin.partition("://")[2] != host:
            return f"Origin: a page of {origin[:100]} cannot use this trainer"
        name = host.rpartition(":")[0] if _has_port(host) else host
        if self._api_key is None and name.lower() not in self._names and not _is_address(name):
            return (
                f"Host: without an API key this trainer answers to an address in numbers, and to "
                f"{', '.join(sorted(self._names))}, not to {name[:100]!r}. Start it with a key, or "
                "with --host set to that name"
            )
        return None

    def _valid_until(self, presented: str | None) -> float:
        """Finds the time until which a key or token is good; 0 if it is none."""
        assert self._api_key is not None
        if presented is None:
            return 0
        if hmac.compare_digest(presented.encode(), self._api_key.encode()):
            return float("inf")
        signed, _, signature = presented.rpartition(".")
        if not hmac.compare_digest(signature.encode(), self._signature(signed).encode()):
            return 0
        claims = signed.partition(".")[2]
        padded = claims + "=" * (-len(claims) % 4)
        return float(json.loads(base64.urlsafe_b64decode(padded))["exp"])

    def _signature(self, signed: str) -> str:
        digest = hmac.digest(self._secret, signed.encode(), hashlib.sha256)
        return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


def check_exposure(host: str, api_key: str | None, open_to_all: bool) -> None:
    """Refuses to let a whole network use a trainer that asks for no key, unless that is meant.

    Args:
        host: the address that is listened on.
        api_key: what is asked of clients, if anything.
        open_to_all: it is meant.

    Raises:
        ConfigError: it is not meant; the message says what to do.
    """
    if api_key is None and not open_to_all and not _is_loopback(host):
        raise ConfigError(
            f"host {host!r} can be reached from other machines, and no API key is asked for: "
            "everybody there could use this trainer. Set MINTJAX_SERVE_API_KEY (api_key=), or say "
            "--open-to-all (open_to_all=True) if that is meant"
        )


def _part(claims: dict[str, Any]) -> str:
    return base64.urlsafe_b64encode(json.dumps(claims).encode()).rstrip(b"=").decode()


def _has_port(host: str) -> bool:
    return ":" in host and not host.endswith("]")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return True


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    return _is_address(host) and ipaddress.ip_address(host).is_loopback
