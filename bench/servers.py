"""A DICOM service that has a feed file for an archive, and the sandbox's FHIR service, on loopback, in one process.

`python bench/servers.py FEED RELEASED` prints the addresses as a line of JSON, then figures for each line that it reads
(and with `forget` begins to count anew), and ends with its input. It stays on another core than what it serves.

The DICOM service has those parts that a reader of the change feed asks for: v1 of the feed, metadata of a study,
existence of a study. RELEASED is a file with the sequence up to which the feed shows anything yet: 8 bytes, big-endian.
"""

import argparse
import asyncio
import contextlib
import mmap
import socket
import sys
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import measure
import orjson
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dicomcast.sandbox import fhir

Json: TypeAlias = Any

_DICOM_JSON = "application/dicom+json"
_STATE = b',"state":"Current","metadata":'
_AT_ONCE = 100  # instances in a chunk of a study's metadata
_HELD = """
SELECT count(*), coalesce(sum(coalesce(
    json_extract(body, '$.numberOfInstances'),
    (SELECT sum(json_array_length(value, '$.instance')) FROM json_each(body, '$.series')))), 0)
FROM (SELECT CAST(body AS TEXT) AS body FROM resource WHERE type = 'ImagingStudy' AND NOT deleted)
"""  # studies and instances that FHIR shows


class Feed:
    """The entries of a feed file as they read now; `metadata` of an entry is always its instance's newest."""

    def __init__(self, path: Path, released: Path):
        self._released = released
        with path.open("rb") as file:
            self._text = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._entries: list[tuple[int, int, int, str]] = []  # where it begins, its state begins, it ends; its instance
        self._changes: dict[str, list[int]] = defaultdict(list)  # sequences by instance
        self._studies: dict[str, dict[str, int]] = defaultdict(dict)  # first sequences, by study and instance
        at = 0
        for sequence, line in enumerate(iter(self._text.readline, b""), start=1):
            state = line.index(_STATE)
            named = orjson.loads(line[:state] + b"}")
            uid = named["sopInstanceUid"]
            self._entries.append((at, at + state, at + len(line) - 2, uid))
            self._changes[uid].append(sequence)
            self._studies[named["studyInstanceUid"]].setdefault(uid, sequence)
            at += len(line)

    @property
    def latest(self) -> int:
        """The newest sequence."""
        return min(int.from_bytes(self._released.read_bytes()), len(self._entries))

    def entry(self, sequence: int, latest: int, *, metadata: bool) -> bytes:
        """One entry as JSON."""
        begins, state, _, uid = self._entries[sequence - 1]
        newest = self._newest(uid, latest)
        what = b"Current" if newest == sequence else b"Replaced"
        named = self._text[begins:state] + b',"state":"%b"' % what
        return named + (b',"metadata":%b}' % self._metadata(newest) if metadata else b"}")

    def study(self, study_uid: str) -> Iterator[bytes]:
        """The metadata of its instances; none for a study that is not there."""
        latest = self.latest
        for uid, first in self._studies.get(study_uid, {}).items():
            if first <= latest:
                yield self._metadata(self._newest(uid, latest))

    def _newest(self, uid: str, latest: int) -> int:
        return max(sequence for sequence in self._changes[uid] if sequence <= latest)

    def _metadata(self, sequence: int) -> bytes:
        _, state, ends, _ = self._entries[sequence - 1]
        return self._text[state + len(_STATE) : ends]


def dicom(feed: Feed) -> Starlette:
    """The DICOM service as an ASGI app."""

    async def latest(request: Request) -> Response:
        newest = feed.latest
        if not newest:
            return Response(status_code=204)
        return _json(feed.entry(newest, newest, metadata=_with_metadata(request)))

    async def changes(request: Request) -> Response:
        newest, offset = feed.latest, int(request.query_params.get("offset", 0))
        end = min(offset + int(request.query_params.get("limit", 10)), newest)
        metadata = _with_metadata(request)
        entries = [feed.entry(sequence, newest, metadata=metadata) for sequence in range(offset + 1, end + 1)]
        return _json(b"[%b]" % b",".join(entries))

    async def metadata(request: Request) -> Response:
        instances = feed.study(request.path_params["study"])
        first = next(instances, None)
        if first is None:
            return Response(status_code=404)

        async def chunks(first: bytes) -> AsyncIterator[bytes]:
            yield b"[" + first
            chunk: list[bytes] = []
            for instance in instances:
                chunk.append(b"," + instance)
                if len(chunk) == _AT_ONCE:
                    yield b"".join(chunk)
                    chunk.clear()
            yield b"".join(chunk) + b"]"

        return StreamingResponse(chunks(first), media_type=_DICOM_JSON)

    async def studies(request: Request) -> Response:
        uid = request.query_params.get("StudyInstanceUID", "")
        if next(feed.study(uid), None) is None:
            return Response(status_code=204)
        return Response(orjson.dumps([{"0020000D": {"vr": "UI", "Value": [uid]}}]), media_type=_DICOM_JSON)

    return Starlette(
        routes=[
            Route("/v1/changefeed", changes),
            Route("/v1/changefeed/latest", latest),
            Route("/v1/studies", studies),
            Route("/v1/studies/{study}/metadata", metadata),
        ]
    )


def _with_metadata(request: Request) -> bool:
    return request.query_params.get("includeMetadata", "true") == "true"


def _json(content: bytes) -> Response:
    return Response(content, media_type="application/json")


class Counted:
    """An ASGI app behind a slow line: `latency` in seconds before each request; requests by kind, bytes of bodies."""

    def __init__(self, app: ASGIApp, *, latency: float):
        self._app = app
        self._latency = latency
        self.requests: Counter[str] = Counter()
        self.received = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        began = False

        async def counted() -> Message:
            nonlocal began
            message = await receive()
            if message["type"] == "http.request" and not began:
                began = True
                self.requests[_kind(scope, message["body"])] += 1
            self.received += len(message.get("body", b""))
            return message

        await asyncio.sleep(self._latency)
        await self._app(scope, counted, send)
        if not began:
            self.requests[_kind(scope, b"")] += 1


def _kind(scope: Scope, body: bytes) -> str:
    """Method and what it is about, without ids: `GET changefeed`, `PUT ImagingStudy`, `POST transaction`."""
    parts = [part for part in scope["path"].split("/") if part not in ("", "v1", "fhir")]
    if not parts:
        parts = ["batch" if b'"type":"batch"' in body[:100] else "transaction"]
    return " ".join([scope["method"], *(part for part in parts if not {".", "-"} & set(part))])


class Hospital:
    """Both services and what is counted of them."""

    def __init__(self, feed: Feed, *, latency: float):
        self._records = fhir.database(None)
        self._dicom = Counted(dicom(feed), latency=latency)
        self._fhir = Counted(fhir.app(self._records, fhir.Options(validate=False)), latency=latency)
        self.forget()

    def forget(self) -> None:
        """Count from here on."""
        self._cpu = time.process_time()
        for service in (self._dicom, self._fhir):
            service.requests.clear()
            service.received = 0

    def figures(self) -> Json:
        """CPU seconds of the services, requests and bytes that came, and what FHIR holds."""
        studies, instances = self._records.execute(_HELD).fetchone()
        counted = {
            name: {"requests": service.requests.total(), "kinds": service.requests, "bytes": service.received}
            for name, service in (("dicom", self._dicom), ("fhir", self._fhir))
        }
        return {"cpu": time.process_time() - self._cpu, "studies": studies, "instances": instances, **counted}

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[Json]:
        """Serve on free ports of loopback; the base URLs."""
        sockets = [_listening() for _ in range(2)]
        servers = [uvicorn.Server(_config(app)) for app in (self._dicom, self._fhir)]
        tasks = [
            asyncio.create_task(server.serve(sockets=[listener]))
            for server, listener in zip(servers, sockets, strict=True)
        ]
        urls = ["http://{}:{}".format(*listener.getsockname()) for listener in sockets]
        yield {"dicom": urls[0], "fhir": f"{urls[1]}/fhir"}
        for server in servers:
            server.should_exit = server.force_exit = True
        await asyncio.gather(*tasks)


def _listening() -> socket.socket:
    # asyncio turns Nagle's algorithm off only where the protocol is named: 40 ms a request otherwise.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    listener.listen(512)
    return listener


def _config(app: ASGIApp) -> uvicorn.Config:
    return uvicorn.Config(
        app, http="h11", ws="none", lifespan="off", log_config=None, access_log=False, timeout_keep_alive=600
    )


async def _main(feed: Path, released: Path, latency: float) -> None:
    measure.one_core(first=True)
    hospital = Hospital(Feed(feed, released), latency=latency)
    orders = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin)
    async with hospital.serving() as urls:
        print(orjson.dumps(urls).decode(), flush=True)
        while order := await orders.readline():
            print(orjson.dumps(hospital.figures()).decode(), flush=True)
            if order.strip() == b"forget":
                hospital.forget()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("feed", type=Path)
    parser.add_argument("released", type=Path)
    parser.add_argument("--latency", type=float, default=0.0, help="milliseconds before each request")
    given = parser.parse_args()
    asyncio.run(_main(given.feed, given.released, given.latency / 1000))
