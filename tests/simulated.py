"""A hospital in simulated time: services, worker and clock in one thread, and a fault at any request or transaction.

HTTP and SQLite are real. Time passes only when nobody has anything left to do, so a timeout of a minute or a retry in
an hour costs nothing; whatever depends on chance or order follows from one seed, so a run can be had again.
"""

import asyncio
import random
import re
import selectors
import socket
import sqlite3
from collections.abc import Callable, Coroutine
from contextlib import closing
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import sqlalchemy as sa
import uvicorn
from hospital import Hospital, Json
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dicomcast import app, clock, errors, mapping
from dicomcast.sandbox import archive, dicom, faults, fhir, modality
from dicomcast.state import store
from dicomcast.sync.worker import Worker

_ANSWERS: dict[str, dict[str, Json]] = {
    "reset before": {"drop": True},
    "reset after": {"drop": True, "when": "after"},
    "truncated": {"truncate": True},
    "429": {"status": 429, "retry_after": "2"},
    "503": {"status": 503},
    "500": {"status": 500},
    "500 after": {"status": 500, "when": "after"},
    "409": {"status": 409},
    "412": {"status": 412},
}
REQUEST_FAULTS = ("crash before", "crash after", "cancel", "timeout before", "timeout after", *_ANSWERS)
"""What can happen to an HTTP request; `after`: it has taken effect, and nobody hears of it."""
LATE = "timeout late"
"""A request that takes effect when it was given up 50 seconds ago: only a worker that goes on can make that good."""
WRITE_FAULTS = ("crash before", "crash after", "cancel", "fail before", "fail after")
"""What can happen to a transaction of the state database that writes."""
READ_FAULTS = ("fail before",)
"""What can happen to one that only reads; a crash there is one after what came before."""
_LONGEST = 30 * 86_400.0
"""Seconds of simulated time after which a sync has gone astray."""


def faults_of(place: str) -> tuple[str, ...]:
    """What can go wrong at a place."""
    return {"state write": WRITE_FAULTS, "state read": READ_FAULTS}.get(place, REQUEST_FAULTS)


# Time -----------------------------------------------------------------------------------------------------------------


class _Passing(selectors.DefaultSelector):
    """Waits for nothing: where no socket is ready, the time of the next timer has come."""

    def __init__(self) -> None:
        super().__init__()
        self.time = 1000.0
        self.end = float("inf")

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if ready or (timeout is not None and timeout <= 0):
            return ready
        if timeout is None:
            ready = super().select(10)
            assert ready, "everybody waits for somebody else"
            return ready
        self.time += timeout
        assert self.time < self.end, "no end of it for days"
        return []


class Loop(asyncio.SelectorEventLoop):
    """Real sockets, simulated time, no threads: what is meant for one runs here, when it is its turn."""

    def __init__(self) -> None:
        self.passing = _Passing()
        self.in_thread = False
        """Whether what runs now would run in a thread: all that a worker does with its database does."""
        super().__init__(self.passing)

    def time(self) -> float:
        return self.passing.time

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> "asyncio.Future[Any]":
        future = self.create_future()

        def run() -> None:
            self.in_thread = True
            try:
                result = func(*args)
            except Exception as error:
                if not future.done():
                    future.set_exception(error)
            else:
                if not future.done():
                    future.set_result(result)
            finally:
                self.in_thread = False

        self.call_later(random.uniform(0, 0.02), run)
        return future


class LoopClock(clock.Clock):
    """The time of the loop; `skip` jumps ahead."""

    def __init__(self, loop: Loop):
        self._loop = loop

    def skip(self, seconds: float) -> None:
        self._loop.passing.time += seconds

    def monotonic(self) -> float:
        return self._loop.time()

    def now(self) -> datetime:
        return datetime(2030, 1, 1, tzinfo=UTC) + timedelta(seconds=self._loop.time())


# Faults ---------------------------------------------------------------------------------------------------------------

Plan = Callable[[int, str], str | None]
"""From the number of a place, and its name, to the fault that happens there."""


def nothing(number: int, place: str) -> None:
    """The plan of a day without faults."""


def only(at: int, fault: str) -> Plan:
    """One fault at one place."""
    return lambda number, place: fault if number == at else None


@dataclass
class Mishaps:
    """What goes wrong, by a plan, and what did. Requests and transactions of a worker are numbered as they come."""

    plan: Plan = nothing
    meanwhile: Callable[[int], None] = lambda number: None
    """Called before each of them."""
    places: list[str] = field(default_factory=list)
    happened: list[tuple[int, str, str]] = field(default_factory=list)
    """Number, place and fault."""
    work: "asyncio.Task[None] | None" = None
    crashed: bool = False
    ended: bool = False
    """Whether a fault has ended the worker that was last at work."""
    world: int = 0
    """How often all was put back to what it was: nothing arrives from one world in another."""

    def at(self, place: str) -> str | None:
        number = len(self.places)
        self.places.append(place)
        self.meanwhile(number)
        fault = self.plan(number, place)
        if fault is not None:
            self.happened.append((number, place, fault))
        return fault

    def cancel(self) -> None:
        """Ask the worker to end; it may still give back what it has."""
        assert self.work is not None
        self.ended = True
        self.work.cancel()

    def crash(self) -> None:
        """From here on nothing of what the worker does reaches anybody: it is dead, whatever it does."""
        self.crashed = True
        self.cancel()


class Line:
    """What lies between the worker and one service."""

    def __init__(self, name: str, mishaps: Mishaps):
        self._name = name
        self._mishaps = mishaps
        self.app: ASGIApp = _nobody

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        mishaps, work, world = self._mishaps, self._mishaps.work, self._mishaps.world
        fault = None if mishaps.crashed else mishaps.at(f"{self._name} {scope['method']} {_path(scope)}")
        request = _Request(receive)
        await request.read()
        if fault == "crash before":
            mishaps.crash()
        if fault == LATE:
            await _silence(receive)
            await asyncio.sleep(50)
        await asyncio.sleep(random.uniform(0, 0.2))
        if fault == "cancel":
            mishaps.cancel()
        unheard = mishaps.crashed or work is not mishaps.work or fault in ("crash after", "timeout after", LATE)
        if fault in ("crash before", "timeout before") or world != mishaps.world:
            pass
        elif unheard:
            # What was under way when a worker died may arrive all the same.
            if fault or random.random() < 0.5:
                await self.app(scope, request.receive, _nowhere)
            if fault == "crash after":
                mishaps.crash()
        else:
            rules = [faults.Rule(**_ANSWERS[fault])] if fault in _ANSWERS else []
            await faults.Faults(self.app, rules)(scope, request.receive, send)
            return
        await _silence(receive)


class _Request:
    """A request that has come in as a whole: it can be answered when the client is gone."""

    def __init__(self, receive: Receive):
        self._receive = receive
        self._content: bytes | None = b""
        self.transport = receive.__self__.transport  # uvicorn's; where the sandbox looks for it to hang up

    async def read(self) -> None:
        more = True
        while more:
            message = await self._receive()
            more = message.get("more_body", False)
            self._content += message.get("body", b"")

    async def receive(self) -> Message:
        content, self._content = self._content, None
        return await self._receive() if content is None else {"type": "http.request", "body": content}


def _path(scope: Scope) -> str:
    """The path without UIDs and ids."""
    path: str = scope["path"]
    return re.sub(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|2\.25\.\d+", "*", path)


async def _nobody(scope: Scope, receive: Receive, send: Send) -> None:
    raise AssertionError("nobody serves here")


async def _nowhere(message: Message) -> None:
    pass


async def _silence(receive: Receive) -> None:
    """No answer, until the client has given up."""
    while (await receive())["type"] != "http.disconnect":
        pass


class _Connection(sqlite3.Connection):
    """A connection to the state database: breaks before a commit, or after it, when nobody knows what became of it."""

    loop: Loop
    mishaps: Mishaps
    _before = 0

    def cursor(self, *args: Any, **options: Any) -> sqlite3.Cursor:
        if self.loop.in_thread and self.mishaps.crashed:
            raise sqlite3.OperationalError("the process is gone")
        return super().cursor(*args, **options)

    def commit(self) -> None:
        changes, self._before = self.total_changes - self._before, self.total_changes
        if not (self.loop.in_thread and self.in_transaction):
            super().commit()
            return
        self.loop.in_thread = False  # who looks at the database meanwhile is no worker
        fault = self.mishaps.at("state write" if changes else "state read")
        self.loop.in_thread = True
        if fault == "crash before":
            self.mishaps.crash()
        if fault in ("crash before", "fail before"):
            raise sqlite3.OperationalError("disk I/O error")
        if fault == "cancel":
            self.mishaps.cancel()
        super().commit()
        if fault == "crash after":
            self.mishaps.crash()
        if fault in ("crash after", "fail after"):
            raise sqlite3.OperationalError("disk I/O error")


# The hospital ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Snapshot:
    """All that services and state database hold at some time."""

    time: float
    databases: tuple[bytes, bytes, bytes]


class Simulated(Hospital):
    """Sends and looks past the lines, where nothing goes wrong and no time passes."""

    def __init__(self, folder: Path):
        self.loop = Loop()
        self.clock = LoopClock(self.loop)
        self.mishaps = Mishaps()
        self._archive = archive.Archive(None, now=self.clock.now)
        self._resources = fhir.database(None)
        self._lines = {name: Line(name, self.mishaps) for name in ("dicom", "fhir")}
        self._lines["dicom"].app = faults.Faults(dicom.app(self._archive, dicom.Options(now=self.clock.now)))
        self.behave()
        self._servers = [self.loop.run_until_complete(_serving(line)) for line in self._lines.values()]
        dicom_url, fhir_url = (_url(server) for server in self._servers)
        self._folder = folder
        self._stores: dict[str, store.Store] = {}
        self._rules: dict[str, mapping.Mapping] = {}
        sa.event.listen(sa.Engine, "do_connect", self._connect)
        super().__init__(dicom_url, f"{fhir_url}/fhir", f"sqlite:///{folder}/state.db", 100_000, self.clock)
        self.http.close()
        self.http = httpx.Client(transport=_Inside({dicom_url: self._lines["dicom"], fhir_url: self._lines["fhir"]}))
        self.modality = modality.Modality(dicom_url, client=self.http)
        self.flags["sync"] = {"lease": 6}
        self.store.open()
        self.empty = self.snapshot()

    def behave(self, options: fhir.Options | None = None) -> None:
        """Let the FHIR service differ from the plain one."""
        options = replace(options or fhir.Options(), now=self.clock.now)
        self._lines["fhir"].app = faults.Faults(fhir.app(self._resources, options))

    def close(self) -> None:
        super().close()
        sa.event.remove(sa.Engine, "do_connect", self._connect)
        for opened in self._stores.values():
            opened.close()
        for server in self._servers:
            for listener in server.servers:
                listener.close()
            for connection in list(server.server_state.connections):
                connection.transport.abort()
        self.loop.run_until_complete(asyncio.sleep(1))
        self.loop.close()
        self._archive.close()
        self._resources.close()

    def _connect(self, dialect: Any, record: Any, args: Any, params: dict[str, Any]) -> Any:
        """A connection to a database of this hospital, by SQLAlchemy's event."""
        if dialect.name != "sqlite" or Path(args[0]).parent != self._folder:
            return None
        connection = dialect.connect(*args, **{**params, "factory": _Connection})
        connection.loop, connection.mishaps = self.loop, self.mishaps
        return connection

    # Syncing

    def synced(self, **sections: dict[str, Json]) -> app.Synced:
        return self._play(app.sync(self.options(**sections), clock=self.clock))

    def work(self) -> bool:
        """What `sync` does, with rules and store that are kept; False where a fault has ended it."""
        try:
            self._play(self._work(once=True, stop=asyncio.Event()))
        except (asyncio.CancelledError, errors.Error):
            if not self.mishaps.ended:
                raise
        return not self.mishaps.ended

    def live(self, day: Coroutine[Any, Any, None]) -> int:
        """What `run` does while a day goes by, started again whenever a fault ends it; how often it was started."""
        return self.loop.run_until_complete(self._live(day))

    def _play(self, work: Coroutine[Any, Any, Any]) -> Any:
        self._limit()
        try:
            return self.loop.run_until_complete(self._begun(work))
        finally:
            self.mishaps.work, self.mishaps.crashed = None, False

    def _begun(self, work: Coroutine[Any, Any, Any]) -> "asyncio.Task[Any]":
        """A worker of which the faults know."""
        self.mishaps.work = self.loop.create_task(work)
        self.mishaps.crashed = self.mishaps.ended = False
        return self.mishaps.work

    def _limit(self) -> None:
        self.loop.passing.end = self.loop.time() + _LONGEST

    async def _live(self, day: Coroutine[Any, Any, None]) -> int:
        self._limit()
        passing, started = self.loop.create_task(day), 0
        try:
            while not passing.done():
                started += 1
                stop = asyncio.Event()
                work = self._begun(self._work(once=False, stop=stop))
                await asyncio.wait([work, passing], return_when=asyncio.FIRST_COMPLETED)
                if not work.done():
                    stop.set()
                    await asyncio.wait([work])
                if not work.cancelled() and not isinstance(work.exception(), errors.Error | None):
                    work.result()
        finally:
            self.mishaps.work, self.mishaps.crashed = None, False
        passing.result()
        return started

    async def _work(self, *, once: bool, stop: asyncio.Event) -> None:
        options = self.options()
        app.configure_logging(options.log)
        async with app.services(options, clock=self.clock) as (dicom_service, fhir_service):
            worker = Worker(
                options,
                dicom=dicom_service,
                fhir=fhir_service,
                rules=self.rules,
                state=self.store,
                clock=self.clock,
                owner=f"worker {len(self.mishaps.places)}",
                once=once,
                stop=stop,
            )
            await worker.work()

    @property
    def rules(self) -> mapping.Mapping:
        """The mapping, compiled once for each set of modules."""
        modules = str(self.flags.get("mapping"))
        if modules not in self._rules:
            self._rules[modules] = app.rules(self.options())
        return self._rules[modules]

    @property
    def store(self) -> store.Store:
        """The state database, opened once."""
        if self.database not in self._stores:
            self._stores[self.database] = store.Store(self.database, clock=self.clock)
        return self._stores[self.database]

    def watermark(self) -> int | None:
        feed = self.store.feed(self.dicom_url)
        return feed["watermark"] if feed else None

    def failures(self, status: str | None = None) -> list[dict[str, Json]]:
        feed = self.store.feed(self.dicom_url)
        statuses = (status,) if status else store.ATTENTION
        return self.store.failures(feed["id"], statuses=statuses) if feed else []

    def latest(self) -> int:
        answer = self.http.get(f"{self.dicom_url}/v1/changefeed/latest")
        return int(answer.json()["sequence"]) if answer.status_code == 200 else 0

    # Going back in time

    def snapshot(self) -> Snapshot:
        with closing(sqlite3.connect(self._state)) as state:
            return Snapshot(self.loop.time(), (_image(self._archive._db), _image(self._resources), _image(state)))

    def restore(self, snapshot: Snapshot, *, seed: int = 0) -> None:
        """All as it was; chance begins anew with `seed`."""
        self.loop.passing.time = snapshot.time
        archived, resources, state = snapshot.databases
        _put(archived, self._archive._db)
        self._archive.holding = 0
        _put(resources, self._resources)
        self._restore_state(state)
        self.mishaps.world += 1
        self.mishaps.plan, self.mishaps.meanwhile = nothing, lambda number: None
        self.mishaps.places.clear()
        self.mishaps.happened.clear()
        random.seed(seed)

    def lose_state(self) -> None:
        """An empty database in the place of the one that was."""
        self._restore_state(self.empty.databases[2])

    def _restore_state(self, state: bytes) -> None:
        with closing(sqlite3.connect(self._state)) as connection:
            _put(state, connection)

    @property
    def _state(self) -> str:
        return self.database.removeprefix("sqlite:///")


def _image(connection: sqlite3.Connection) -> bytes:
    """A database as the bytes of a file, of the kind that memory can have too (no write-ahead log)."""
    if connection.execute("PRAGMA page_count").fetchone() == (0,):
        return b""
    content = connection.serialize()
    return content[:18] + b"\1\1" + content[20:]


def _put(content: bytes, connection: sqlite3.Connection) -> None:
    """Make a database what another one was."""
    with closing(sqlite3.connect(":memory:")) as image:
        if content:
            image.deserialize(content)
        image.backup(connection)


async def _serving(line: Line) -> uvicorn.Server:
    """A server on a free port, in this loop."""
    config = uvicorn.Config(
        line,
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="critical",
        access_log=False,
        proxy_headers=False,
        timeout_keep_alive=10**9,
    )
    server = uvicorn.Server(config)
    config.load()
    server.lifespan = config.lifespan_class(config)
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    await server.startup(sockets=[listener])
    return server


def _url(server: uvicorn.Server) -> str:
    return f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"


class _Inside(httpx.BaseTransport):
    """Asks the services themselves, at once: none of them ever waits."""

    def __init__(self, lines: dict[str, Line]):
        self._lines = lines

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        start: Message = {}
        parts: list[bytes] = []
        content = request.read()

        async def receive() -> Message:
            return {"type": "http.request", "body": content}

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                start.update(message)
            else:
                parts.append(message["body"])

        url = request.url
        scope = {
            "type": "http",
            "http_version": "1.1",
            "method": request.method,
            "scheme": url.scheme,
            "server": (url.host, url.port),
            "root_path": "",
            "path": url.path,
            "raw_path": url.raw_path.partition(b"?")[0],
            "query_string": url.query,
            "headers": [(name.lower(), value) for name, value in request.headers.raw],
        }
        service = self._lines[f"{url.scheme}://{url.netloc.decode()}"].app
        answer = service(scope, receive, send)
        try:
            answer.send(None)
        except StopIteration:
            return httpx.Response(start["status"], headers=start["headers"], content=b"".join(parts))
        raise AssertionError("a service waits")
