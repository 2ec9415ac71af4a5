"""Who may use the trainer: those with its API key, or with a token that was given for it."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import secrets
import time

TOKEN_SECONDS = 24 * 3600


class Access:
    """Checks keys, and gives out tokens in their place.

    Some clients exchange their key for a JWT at once, and send that from then on.

    Args:
        api_key: the one key; None lets everybody in.
    """

    def __init__(self, api_key: str | None) -> None:
        self._api_key = api_key
        self._secret = secrets.token_bytes(32)

    def allows(self, presented: str | None) -> bool:
        """Whether a request with this ``X-API-Key`` is to be served."""
        if self._api_key is None:
            return True
        if presented is None:
            return False
        if hmac.compare_digest(presented.encode(), self._api_key.encode()):
            return True
        return self._is_token(presented)

    def token(self) -> str:
        """A JWT (RFC 7519, HS256) that is as good as the key for a day."""
        header = _part(json.dumps({"alg": "HS256", "typ": "JWT"}).encode())
        claims = _part(json.dumps({"exp": int(time.time()) + TOKEN_SECONDS}).encode())
        return f"{header}.{claims}.{self._signature(f'{header}.{claims}')}"

    def _is_token(self, presented: str) -> bool:
        signed, _, signature = presented.rpartition(".")
        if not hmac.compare_digest(signature.encode(), self._signature(signed).encode()):
            return False
        claims = signed.partition(".")[2]
        padded = claims + "=" * (-len(claims) % 4)
        return json.loads(base64.urlsafe_b64decode(padded))["exp"] > time.time()

    def _signature(self, signed: str) -> str:
        return _part(hmac.digest(self._secret, signed.encode(), hashlib.sha256))


def _part(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
