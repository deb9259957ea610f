"""What every HTTP client of the project keeps to: its addresses, its proxy, and that no answer is read as another's.

Reads the proxy variables of the environment (HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, NO_PROXY). Used by
``codes.common.llm`` and ``codes.evaluate.api``.
"""

from __future__ import annotations

import ipaddress
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any
from urllib.parse import SplitResult, urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp

from codes.common.errors import ContrastRMError

# Of the whole time-out, what the way to the server may take.
CONNECT_SECONDS = 30.0


def check_address(url: str, *, name: str, key: str) -> SplitResult:
    """The parts of a server's address, which results, reports and messages may show as it stands.

    Args:
        name: What the address is, for the message, with its flag: ``the API base URL (--api_base_url, OPENAI_BASE_URL)``.
        key: The environment variable for a secret.

    Raises:
        ContrastRMError: It is no address, or holds what may be a secret; the message repeats neither.
    """
    try:
        parts = urlsplit(url)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_address = False
    if not is_address:
        raise ContrastRMError(f"{name} must look like https://host or http://host:port, with the path of the service")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ContrastRMError(
            f"{name} must hold no user name, password or query (?…): it is written into results and messages. Give the key in "
            f"{key}"
        )
    return parts


def is_this_machine(host: str) -> bool:
    """Whether a host name or address is that of the machine itself."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def proxy_of(parts: SplitResult) -> str | None:
    """The proxy that the environment names for an address; a server on this machine is asked directly.

    Raises:
        ContrastRMError: It is one of a kind that is not spoken here.
    """
    host = parts.hostname or ""
    if is_this_machine(host) or proxy_bypass(host):
        return None
    proxies = getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if proxy and "://" not in proxy:
        proxy = f"http://{proxy}"
    if proxy and not proxy.lower().startswith(("http://", "https://")):
        raise ContrastRMError(
            f"the proxy for {host} is neither http nor https: set {parts.scheme.upper()}_PROXY to an HTTP proxy, or put the "
            "host into NO_PROXY"
        )
    return proxy or None


def origin_of(url: str) -> str:
    """Scheme, host and port, or the path of an address without them: what a message may say of a redirect's target."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "an address that is none"
    return (f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}" if parts.netloc else parts.path)[:200]


class _CleanConnector(aiohttp.TCPConnector):
    """Closes a waiting connection on which the server said something unasked: it would be read as the next answer."""

    async def _get(self, key: Any, traces: Any) -> Any:
        while (connection := await super()._get(key, traces)) is not None:
            if connection.protocol is not None and not connection.protocol.should_close:
                return connection
            connection.close()
        return None


class Connections:
    """Connections to one server, each for one request at a time, all with the same headers.

    After anything but an answer a connection is closed: what a server sends after an odd response, or after the caller has left,
    would be read as the answer to the next request.

    Args:
        headers: Sent with every request.
        timeout: Seconds of a whole request, however many bytes arrive meanwhile.
    """

    def __init__(self, headers: Mapping[str, str], timeout: float) -> None:
        self._headers = dict(headers)
        self._timeout = aiohttp.ClientTimeout(total=timeout, sock_connect=min(timeout, CONNECT_SECONDS))
        self._idle: list[aiohttp.ClientSession] = []

    async def __aenter__(self) -> Connections:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._idle:
            await self._idle.pop().close()

    @asynccontextmanager
    async def one(self) -> AsyncIterator[aiohttp.ClientSession]:
        """A session of one connection; the one used last is the next one."""
        # Connections belong to one event loop, so they are made where the loop runs, when they are needed.
        session = self._idle.pop() if self._idle else self._open()
        try:
            yield session
        except BaseException:
            await session.close()
            raise
        self._idle.append(session)

    def _open(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            connector=_CleanConnector(limit=1),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers=self._headers,
            timeout=self._timeout,
        )
