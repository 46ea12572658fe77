"""HTTP to the two services: credentials, timeouts, retry of reads, how much at once, and status → error in one place.

| answer | a read | a write |
|---|---|---|
| connection refused, unknown host, no free connection | `Unavailable` | `Unavailable`: it was never sent |
| timeout, reset, cut body, 408, 500, 502, 504 | `Troubled`, a kind of `Unavailable` | `OutcomeUnknown` |
| 429, 503 (with `Retry-After`) | `Unavailable` | `Unavailable` |
| 401 | `Denied` | `Denied` |
| 403 | `Forbidden`, a kind of `Denied` | `Forbidden` |
| 409, 412 | `Conflict` | `Conflict` |
| 400, 404, 405, 406, 410, 413, 414, 415, 422, 501 | `Rejected` | `Rejected` |
| anything else (a login page's 302, 424, 431, 507 ...) | `Unavailable` | `Unavailable` |

Reads are tried three times before `Unavailable` is raised; a write is never resent here: what to do about it is
for those to decide who can look at both services again. httpx logs URLs, and URLs hold PatientIDs: its logger is off.
"""

import asyncio
import email.utils
import functools
import logging
import re
import ssl
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any, NamedTuple

import httpx
import orjson
import tenacity

from dicomcast import errors
from dicomcast.clock import Clock

logging.getLogger("httpx").setLevel(logging.CRITICAL)
logging.getLogger("httpcore").setLevel(logging.CRITICAL)

_NEVER_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.UnsupportedProtocol)
_REFUSALS = frozenset({400, 404, 405, 406, 410, 413, 414, 415, 422, 501})
_CONNECT = 10.0
"""Seconds until a connection must stand."""
_FIRST_AT_ONCE = 4.0
"""Requests to a service before it has shown what it bears."""
_LONGEST_WAIT_HERE = 5.0
"""Seconds: a service that asks for more than this is a matter for the pipeline's pause."""


def credentials(
    *, username: str | None = None, password: str | None = None, token: str | None = None
) -> httpx.Auth | None:
    """Basic, bearer or no authentication."""
    if token is not None:
        return _Bearer(token)
    return httpx.BasicAuth(username, password or "") if username is not None else None


@functools.cache
def _trusted() -> ssl.SSLContext:
    """The authorities that vouch for servers, read once: that takes longer than a sync with nothing to do."""
    return httpx.create_ssl_context()


class _Bearer(httpx.Auth):
    def __init__(self, token: str):
        self._token = token

    def auth_flow(self, request: httpx.Request) -> Any:
        request.headers["Authorization"] = f"Bearer {self._token}"
        yield request


class Response(NamedTuple):
    """An answer with its whole body. httpx's own is part of a circle of references, and would keep the body alive."""

    status_code: int
    headers: httpx.Headers
    content: bytes


class _Room:
    """How many requests may be under way: one more a round while that is used, half where the service is overloaded."""

    def __init__(self, most: int):
        self._most = most
        self._size = min(_FIRST_AT_ONCE, most)
        self._taken = 0
        self._cuts = 0
        self._freed = asyncio.Event()

    @property
    def size(self) -> int:
        """Requests at once, at present."""
        return int(self._size)

    @asynccontextmanager
    async def place(self) -> AsyncIterator[Callable[[int], None]]:
        """Wait for a place; what is given wants to be told the answer's status."""
        while self._taken >= self.size:
            self._freed.clear()
            await self._freed.wait()
        self._taken += 1
        cuts = self._cuts
        try:
            yield lambda status: self._learn(status, cuts)
        finally:
            self._taken -= 1
            self._freed.set()

    def _learn(self, status: int, cuts: int) -> None:
        if status in (429, 503):
            if cuts == self._cuts:  # what was sent before the last cut says nothing new
                self._cuts += 1
                self._size = max(1.0, self._size / 2)
        elif self._taken * 2 > self._size:
            self._size = min(self._most, self._size + 1 / self._size)


class Service:
    """One remote service. `requests` counts every HTTP request sent, successful or not.

    `parallel`: the most requests at once; how many it is at present follows what the service bears.
    """

    def __init__(
        self, *, name: str, url: str, auth: httpx.Auth | None, timeout: float, clock: Clock, parallel: int = 100
    ):
        self.name = name
        self.url = url.rstrip("/")
        self.requests = 0
        self._room = _Room(parallel)
        self._clock = clock
        self._timeout = timeout
        self._client = httpx.AsyncClient(
            auth=auth,
            verify=_trusted(),
            timeout=httpx.Timeout(timeout, connect=min(timeout, _CONNECT)),
            limits=httpx.Limits(max_connections=128, max_keepalive_connections=parallel),
        )

    @property
    def parallel(self) -> int:
        """Requests that may be under way at once, at present."""
        return self._room.size

    async def close(self) -> None:
        """Drop all connections."""
        await self._client.aclose()

    async def read(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, str | int] | None = None,
        headers: Mapping[str, str] | None = None,
        content: bytes | None = None,
        also: Collection[int] = (),
    ) -> Response:
        """Send what may be repeated. Statuses below 300 and those in `also` are returned, others raised.

        Raises `Unavailable`, `Denied`, `Conflict` or `Rejected`.
        """

        async for attempt in self._retrying():
            with attempt:
                async with self._failures(write=False):
                    response = await self._send(method, path, params=params, headers=headers, content=content)
                self._check(response, also=also, write=False)
                return response
        raise AssertionError("the last attempt raises")

    async def write(
        self,
        method: str,
        path: str,
        *,
        headers: Mapping[str, str] | None = None,
        content: bytes | None = None,
        ready: Callable[[], None] = lambda: None,
    ) -> Response:
        """Send once, after `ready`. Raises what that and `read` raise, and `OutcomeUnknown`.

        The timeout grows with the body: 60 s per MB beside the service's own.
        """
        seconds = self._timeout + 60.0 * len(content or b"") / 1e6
        timeout = httpx.Timeout(seconds, connect=min(seconds, _CONNECT))
        async with self._failures(write=True):
            response = await self._send(method, path, ready, headers=headers, content=content, timeout=timeout)
        self._check(response, also=(), write=True)
        return response

    @asynccontextmanager
    async def stream(
        self, path: str, *, headers: Mapping[str, str] | None = None, also: Collection[int] = ()
    ) -> AsyncIterator[tuple[int, AsyncIterator[bytes]]]:
        """GET whose body is read as it arrives: status and chunks. Raises as `read` does, also in mid-body."""

        async def opened() -> httpx.Response:
            request = self._client.build_request("GET", self._address(path), headers=headers)
            self.requests += 1
            async with self._room.place() as learn, self._failures(write=False):
                response = await self._client.send(request, stream=True)
                learn(response.status_code)
            if response.status_code >= 300 and response.status_code not in also:
                await response.aclose()
                self._check(Response(response.status_code, response.headers, b""), also=also, write=False)
            return response

        response: httpx.Response = await self._retrying()(opened)
        try:
            async with self._failures(write=False):
                yield response.status_code, response.aiter_bytes(65536)
        finally:
            await response.aclose()

    def _address(self, path: str) -> str:
        return path if path.startswith(("http://", "https://")) else f"{self.url}{path}"

    async def _send(self, method: str, path: str, ready: Callable[[], None] = lambda: None, **request: Any) -> Response:
        async with self._room.place() as learn:
            ready()
            self.requests += 1
            async with self._client.stream(method, self._address(path), **request) as answer:
                learn(answer.status_code)
                content = b"".join([chunk async for chunk in answer.aiter_bytes()])
            return Response(answer.status_code, answer.headers, content)

    @asynccontextmanager
    async def _failures(self, *, write: bool) -> AsyncIterator[None]:
        """Name a failed exchange without its URL: it may hold a PatientID."""
        try:
            yield
        except _NEVER_SENT as failure:
            raise errors.Unavailable(self.name, f"no connection to {self.url} ({type(failure).__name__})") from failure
        except (httpx.TransportError, httpx.DecodingError, httpx.StreamError) as failure:
            reason = f"no usable answer ({type(failure).__name__})"
            if write:
                raise errors.OutcomeUnknown(f"{self.name}: {reason}") from None
            raise errors.Troubled(self.name, reason) from failure
        except httpx.InvalidURL:
            raise errors.Unavailable(self.name, "an unusable address") from None

    def _check(self, response: Response, *, also: Collection[int], write: bool) -> None:
        if response.status_code >= 300 and response.status_code not in also:
            raise error_of(
                self.name,
                response.status_code,
                write=write,
                retry_after=_retry_after(response, now=self._clock.now()),
                code=_issue_code(response),
            )

    def _retrying(self) -> tenacity.AsyncRetrying:
        return tenacity.AsyncRetrying(
            sleep=self._clock.sleep,
            stop=tenacity.stop_after_attempt(3),
            wait=_pause,
            retry=tenacity.retry_if_exception(_worth_another_try),
            reraise=True,
        )


def error_of(
    service: str, status: int, *, write: bool, retry_after: float | None = None, code: str | None = None
) -> errors.Error:
    """What an HTTP status means, by the table above; also for the entries of a batch or transaction."""
    reason = f"HTTP {status}"
    if status in (401, 403):
        kind = errors.Denied if status == 401 else errors.Forbidden
        return kind(service, f"{reason}: see {service}.token, or {service}.username and password")
    if status in (429, 503):
        return errors.Unavailable(service, reason, retry_after=retry_after)
    if status in (408, 500, 502, 504):
        return errors.OutcomeUnknown(f"{service}: {reason}") if write else errors.Troubled(service, reason)
    if status in (409, 412):
        conflict = errors.Conflict(f"{service}: {reason}")
        conflict.referred = status == 409
        return conflict
    if status in _REFUSALS:
        return errors.Rejected(status, code=code)
    return errors.Unavailable(service, reason)


def _worth_another_try(failure: BaseException) -> bool:
    return (
        isinstance(failure, errors.Unavailable)
        and not isinstance(failure, errors.Denied)
        and not isinstance(failure.__cause__, httpx.TimeoutException)  # it has had its time
        and (failure.retry_after is None or failure.retry_after <= _LONGEST_WAIT_HERE)
    )


_BACKOFF = tenacity.wait_exponential(multiplier=0.2, max=2.0) + tenacity.wait_random(0.0, 1.0)


def _pause(state: tenacity.RetryCallState) -> float:
    """Seconds before the next try: ours, or what the service asks for if that is longer."""
    failure = state.outcome.exception() if state.outcome else None
    asked = failure.retry_after if isinstance(failure, errors.Unavailable) else None
    return max(_BACKOFF(state), asked or 0.0)


def _retry_after(response: Response, *, now: datetime) -> float | None:
    """Seconds, from Azure's `x-ms-retry-after-ms` or RFC 9110 10.2.3 (seconds or a date)."""
    milliseconds = response.headers.get("x-ms-retry-after-ms", "")
    if re.fullmatch(r"[0-9]{1,9}", milliseconds):
        return int(milliseconds) / 1000
    value = response.headers.get("retry-after", "").strip()
    if re.fullmatch(r"[0-9]{1,9}", value):
        return float(value)
    try:
        return max(0.0, (email.utils.parsedate_to_datetime(value) - now).total_seconds())
    except (TypeError, ValueError):
        return None


_ISSUE_TYPES = re.compile(
    r"invalid|structure|required|value|invariant|security|login|unknown|expired|forbidden|suppressed"
    r"|processing|not-supported|duplicate|multiple-matches|not-found|deleted|too-long|code-invalid"
    r"|extension|too-costly|business-rule|conflict|transient|lock-error|no-store|exception|timeout"
    r"|incomplete|throttled|informational"
)
"""FHIR R4 value set issue-type. Whatever else stands there may be anything."""


def _issue_code(response: Response) -> str | None:
    """`OperationOutcome.issue[0].code`; never its text, which may quote values."""
    try:
        code = orjson.loads(response.content)["issue"][0]["code"]
    except (orjson.JSONDecodeError, LookupError, TypeError):
        return None
    return code if isinstance(code, str) and _ISSUE_TYPES.fullmatch(code) else None
