"""A gateway in front of a FHIR service: what passes it is known, and can be held up or preceded by somebody else."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import httpx
from hospital import serving
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

_LONGEST = 60.0
_PASSED = ("etag", "location", "content-location", "content-type")

Meant = Callable[[str, str, bytes], bool]
"""Whether a request of this method, path and body is one."""


def writes(method: str, path: str, body: bytes) -> bool:
    """PUT, DELETE, a create, a transaction; searches by POST and batches are none."""
    return method in ("PUT", "DELETE") or (
        method == "POST" and not path.endswith("_search") and b'"type":"batch"' not in body
    )


@dataclass
class Held:
    """A request that is held up until `go`: before the service has seen it, or after (`answered`)."""

    meant: Meant
    answered: bool
    reached: threading.Event = field(default_factory=threading.Event)
    passed: threading.Event = field(default_factory=threading.Event)
    go: threading.Event = field(default_factory=threading.Event)


class Gateway:
    """`log`: `METHOD /path` of the writes that the service has seen; `first`: what somebody does before each."""

    def __init__(self, url: str, first: Callable[[], None]):
        self.url = ""
        self.log: list[str] = []
        self._origin = "{0.scheme}://{0.netloc}".format(urlsplit(url))
        self._first = first
        self._held: list[Held] = []
        self.answer: Callable[[str, str, bytes], Response | None] = lambda method, path, body: None
        """What the gateway says itself, instead of passing a request on."""

    def hold(self, meant: Meant = writes, *, answered: bool = False) -> Held:
        """Hold up the next request that is meant."""
        self._held.append(Held(meant, answered))
        return self._held[-1]

    def let_go(self) -> None:
        """All that is held."""
        for held in self._held:
            held.go.set()

    async def pass_on(self, request: Request) -> Response:
        method, path, body = request.method, request.url.path, await request.body()
        if (said := self.answer(method, path, body)) is not None:
            return said
        held = next((one for one in self._held if not one.reached.is_set() and one.meant(method, path, body)), None)
        if held is not None:
            held.reached.set()
            if not held.answered:
                await asyncio.to_thread(held.go.wait, _LONGEST)
        if writes(method, path, body):
            await asyncio.to_thread(self._first)
            self.log.append(f"{method} {path}")
        kept = {
            name: value
            for name, value in request.headers.items()
            if name not in ("host", "content-length", "accept-encoding")
        }
        async with httpx.AsyncClient(timeout=_LONGEST, verify=False) as client:
            answer = await client.request(
                method, self._origin + path, params=request.query_params, content=body, headers=kept
            )
        if held is not None:
            held.passed.set()
            if held.answered:
                await asyncio.to_thread(held.go.wait, _LONGEST)
        headers = {name: value for name, value in answer.headers.items() if name in _PASSED}
        return Response(answer.content, answer.status_code, headers)


@contextmanager
def before(url: str, first: Callable[[], None] = lambda: None) -> Iterator[Gateway]:
    """A gateway before the FHIR service at `url` while the block lasts; what it still holds is let go at the end."""
    gateway = Gateway(url, first)
    methods = ["GET", "POST", "PUT", "DELETE"]
    application = Starlette(routes=[Route("/{path:path}", gateway.pass_on, methods=methods)])
    with serving(application) as address:
        gateway.url = address + urlsplit(url).path
        try:
            yield gateway
        finally:
            gateway.let_go()
