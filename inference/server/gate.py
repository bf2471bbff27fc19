"""Who may ask: calls in another host's name, calls from other sites' pages, and calls without an API key are refused.

A page of any site that a browser shows can send requests to 127.0.0.1, and read the answers too once its own name resolves to
that address (DNS rebinding). A browser tells the name that it called in Host, and whose page it runs in Origin.
"""

from __future__ import annotations

import hmac
from collections.abc import Collection, Sequence
from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from inference.server.refused import Refused

# They say nothing of anybody's requests: the page as it is before it has asked, and whether the server is up.
OPEN = ("/", "/health")


class Gate:
    """Before an ASGI application: raises Refused for what may not ask, and notes in scope["state"]["owner"] who asks.

    `keys`: where there are any, all but OPEN needs one of them as `Authorization: Bearer KEY`. `names`: what the server may be
    called besides localhost and addresses. `origins`: sites whose pages may ask too, "*" for all. The owner is the key; without
    keys, the client's address.
    """

    def __init__(
        self, app: ASGIApp, keys: Sequence[str] = (), names: Collection[str] = (), origins: Collection[str] = ()
    ) -> None:
        self.app, self.origins = app, origins
        self.keys = [key.encode() for key in keys]
        self.names = {name.lower() for name in names}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        self._check_site(headers.get(b"host", b"").decode("latin-1").lower(), headers.get(b"origin"))
        scope["state"]["owner"] = (scope["client"] or [""])[0]
        if self.keys and scope["path"] not in OPEN:
            scope["state"]["owner"] = self._key(headers.get(b"authorization", b""))
        await self.app(scope, receive, send)

    def _check_site(self, host: str, origin: bytes | None) -> None:
        # HTTP/1.0 needs no Host, and no browser speaks it.
        if host and not self._ours(name := _name(f"//{host}")):
            raise Refused(
                403, f"this server is not called {name or host[:60]!r}: use its address, or --allow-host", code="wrong_host"
            )
        if origin is None or "*" in self.origins or (site := origin.decode("latin-1").lower()) in self.origins:
            return
        if site.partition("://")[2] != host and _name(site) not in self.names:
            said = f"pages of {site[:60]!r} may not ask this server, only its own and those of --cors"
            raise Refused(403, said, code="wrong_origin")

    def _ours(self, name: str) -> bool:
        return name == "localhost" or name in self.names or _is_address(name)

    def _key(self, given: bytes) -> str:
        """The key in an Authorization header. Raises Refused: 401."""
        kind, _, key = given.partition(b" ")
        # Each is compared in the same time, however much of it is right.
        right = [known for known in self.keys if hmac.compare_digest(known, key.strip())]
        if kind.lower() != b"bearer" or not right:
            said = "Incorrect API key provided" if key else "You didn't provide an API key: send Authorization: Bearer KEY"
            raise Refused(401, said, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
        return right[0].decode()


def _name(url: str) -> str:
    try:
        return (urlsplit(url).hostname or "").rstrip(".")
    except ValueError:
        return ""


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True
