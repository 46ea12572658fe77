"""The FHIR R4 (4.0.1) service of the sandbox, under `/fhir`: instance and type interactions, search, bundles, history.

Bodies are kept as they came, decimals to the letter; only `id`, `meta.versionId` and `meta.lastUpdated` are ours.
`Options` holds in what respects real servers differ. For development and tests.
"""

import contextlib
import dataclasses
import re
import sqlite3
import urllib.parse
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import orjson
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from dicomcast.sandbox import resources

Json = Any  # a JSON value
Pairs = Sequence[tuple[str, str]]

_ID = re.compile(r"[A-Za-z0-9\-.]{1,64}", re.ASCII)
_TYPE = re.compile(r"[A-Z][A-Za-z]+", re.ASCII)
_WEAK = re.compile(r'W/"([^"]*)"')
_MEDIA = {"application/fhir+json", "application/json"}
_CONTROLS = {"_count", "_total", "_summary", "_sort", "_elements", "_format", "_pretty"}
_SORTS = {"_id": "id", "-_id": "id DESC", "_lastUpdated": "updated", "-_lastUpdated": "updated DESC"}
_SEARCHES_KEPT = 200

_SCHEMA = """
CREATE TABLE IF NOT EXISTS resource (
    key INTEGER PRIMARY KEY, type TEXT, id TEXT, version INTEGER, updated TEXT, deleted INTEGER NOT NULL, digest TEXT,
    body BLOB, UNIQUE (type, id));
CREATE TABLE IF NOT EXISTS history (
    type TEXT, id TEXT, version INTEGER, updated TEXT, method TEXT, body BLOB, PRIMARY KEY (type, id, version));
CREATE TABLE IF NOT EXISTS token (type TEXT, id TEXT, parameter TEXT, system TEXT, value TEXT);
CREATE INDEX IF NOT EXISTS token_value ON token (type, parameter, value);
CREATE INDEX IF NOT EXISTS token_owner ON token (type, id);
"""


@dataclass(frozen=True, slots=True)
class Options:
    """How this server differs from the plain one; the defaults are near the Azure service's."""

    stale_status: int = 412  # HAPI answers a stale version with 409
    invalid_status: int = 422  # Azure answers invalid content with 400
    delete_checks_version: bool = True  # Azure and HAPI ignore If-Match on DELETE
    client_ids: bool = True  # False refuses a PUT to a new id with 405
    update_create: bool = True  # what the capability statement says about it; HAPI says nothing
    batch: bool = True
    transaction: bool = True
    entry_limit: int = 500  # entries of a bundle, as on Azure
    references: bool = False  # True refuses references to what is not there, and deletes of what is referred to
    unknown: tuple[str, ...] = ()  # search parameters that are silently ignored, as lenient servers do
    page_size: int = 20
    page_most: int = 1000
    total: bool = True  # False leaves Bundle.total out
    url_bytes: int | None = None  # longer request targets are 414 with an HTML body, as from Tomcat or Jetty (8192)
    bare_etags: bool = False  # response.etag of a bundle entry as `3` instead of `W/"3"`, as HAPI
    keep_tags: bool = False  # HAPI only ever adds tags: what an update leaves out stays
    reuse: float = 0.0  # seconds that an equal search gets its old result unless it says no-cache, as HAPI (60)
    lag: float = 0.0  # seconds until search finds what was written, whatever it says, as Google and HealthLake
    validate: bool = True
    token: str | None = None  # the bearer token without which everything is 401
    software: str = "dicomcast sandbox"
    now: Callable[[], datetime] | None = None


HAPI = Options(
    stale_status=409,
    delete_checks_version=False,
    update_create=False,
    references=True,
    total=False,
    bare_etags=True,
    keep_tags=True,
    reuse=60.0,
    url_bytes=8192,
    software="HAPI FHIR Server",
)
"""Near HAPI 8.8 as it comes."""


@dataclass(frozen=True, slots=True)
class _Interaction:
    """One interaction, from an HTTP request or a bundle entry; the path is relative to the base."""

    method: str
    path: str
    query: Pairs
    resource: Json = None
    if_match: str | None = None
    if_none_exist: str | None = None
    if_none_match: str | None = None
    new_id: str | None = None  # for a create whose id a transaction has promised already
    fresh: bool = True  # False where the answer to an equal search may be given again


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What an interaction led to; `key` and `version` where one resource is concerned."""

    status: int
    body: bytes | None = None
    key: tuple[str, str] | None = None
    version: int | None = None
    updated: str | None = None


def database(folder: Path | None) -> sqlite3.Connection:
    """The service's database in a folder; None keeps all in memory."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    place = ":memory:" if folder is None else folder / "fhir.sqlite"
    connection = sqlite3.connect(place, check_same_thread=False, isolation_level=None)
    connection.row_factory = sqlite3.Row
    connection.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=OFF;" + _SCHEMA)
    return connection


def app(connection: sqlite3.Connection, options: Options | None = None) -> Starlette:
    """The ASGI app over a database."""
    service = _Service(connection, options or Options())
    methods = ["GET", "POST", "PUT", "DELETE", "PATCH"]
    paths = ("/fhir", "/fhir/{path:path}")
    return Starlette(routes=[Route(path, service.answer, methods=methods) for path in paths])


class _Service:
    """The interactions, over one database."""

    def __init__(self, connection: sqlite3.Connection, options: Options):
        self.options = options
        self._db = connection
        self._searches: OrderedDict[str, tuple[str, list[str], int, str | None]] = OrderedDict()
        self._results: OrderedDict[tuple[str, tuple[tuple[str, str], ...]], tuple[datetime, list[str]]] = OrderedDict()
        self._touched: list[tuple[str, str]] | None = None
        self._base = ""

    # HTTP

    async def answer(self, request: Request) -> Response:
        """One HTTP request; every refusal is an OperationOutcome."""
        self._base = f"{request.url.scheme}://{request.url.netloc}/fhir"
        try:
            outcome = self._interact(await self._read(request))
        except resources.Invalid as invalid:
            return self._respond(_Outcome(invalid.status or self.options.invalid_status, invalid.body()))
        if "return=minimal" in request.headers.get("prefer", "") and request.method in ("POST", "PUT") and outcome.key:
            outcome = _Outcome(outcome.status, None, outcome.key, outcome.version, outcome.updated)
        return self._respond(outcome, created=request.method == "POST")

    async def _read(self, request: Request) -> _Interaction:
        """The request as an interaction; raises what HTTP itself refuses."""
        target = request.scope["raw_path"] + b"?" + request.scope["query_string"]
        if self.options.url_bytes is not None and len(target) > self.options.url_bytes:
            raise resources.Invalid("too-long", "URI too long", status=414)
        if self.options.token and request.headers.get("authorization") != f"Bearer {self.options.token}":
            raise resources.Invalid("login", "a bearer token is needed", status=401)
        path = request.path_params.get("path", "").strip("/")
        query = request.query_params.multi_items()
        media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        body = await request.body()
        resource = None
        if path.endswith("_search") and request.method == "POST":
            if media != "application/x-www-form-urlencoded":
                raise resources.Invalid("not-supported", "_search takes a form", status=415)
            query = [*query, *urllib.parse.parse_qsl(body.decode(errors="replace"), keep_blank_values=True)]
        elif request.method in ("POST", "PUT"):
            if media not in _MEDIA:
                raise resources.Invalid("not-supported", "the body must be application/fhir+json", status=415)
            resource = resources.parse(body)
        headers = request.headers
        return _Interaction(
            request.method,
            path,
            query,
            resource,
            headers.get("if-match"),
            headers.get("if-none-exist"),
            headers.get("if-none-match"),
            fresh="no-cache" in headers.get("cache-control", ""),
        )

    def _respond(self, outcome: _Outcome, *, created: bool = False) -> Response:
        headers = {}
        if outcome.version is not None and outcome.updated is not None:
            headers["ETag"] = f'W/"{outcome.version}"'
            headers["Last-Modified"] = format_datetime(datetime.fromisoformat(outcome.updated), usegmt=True)
        if outcome.key and (created or outcome.status == 201):
            headers["Location"] = f"{self._base}/{'/'.join(outcome.key)}/_history/{outcome.version}"
        if outcome.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if outcome.status == 414:
            return Response("<html><body><h1>414 URI Too Long</h1></body></html>", 414, media_type="text/html")
        return Response(outcome.body or b"", outcome.status, headers, media_type="application/fhir+json; charset=utf-8")

    # Interactions

    def _interact(self, what: _Interaction) -> _Outcome:  # noqa: PLR0911 - a table of the interactions
        """Perform an interaction; resources.Invalid for every refusal."""
        segments = [urllib.parse.unquote(part) for part in what.path.split("/") if part]
        if not segments:
            return self._system(what)
        if segments == ["metadata"]:
            return _Outcome(200, orjson.dumps(self._capabilities()))
        kind = segments[0]
        if not _TYPE.fullmatch(kind) or not resources.known(kind):
            raise resources.Invalid("not-supported", f"no resource type {kind[:64]}", status=404)
        match what.method, segments[1:]:
            case ("GET", []) | ("POST", ["_search"]):
                return _Outcome(200, orjson.dumps(self._search(kind, what.query, fresh=what.fresh)))
            case ("POST", []):
                return self._create(kind, what)
            case ("PUT", []):
                return self._conditional_update(kind, what)
            case ("DELETE", []):
                return self._conditional_delete(kind, what)
            case ("GET", [name]):
                return self._get(kind, name, what)
            case ("PUT", [name]):
                return self._update(kind, name, what)
            case ("DELETE", [name]):
                return self._delete(kind, name, what)
            case ("GET", [name, "_history"]):
                return self._history(kind, name)
            case ("GET", [name, "_history", version]):
                return self._version(kind, name, version)
        raise resources.Invalid("not-supported", f"{what.method} is not supported here", status=405)

    def _system(self, what: _Interaction) -> _Outcome:
        query = dict(what.query)
        if what.method == "GET" and "_getpages" in query:
            offset = query.get("_offset", "0")
            return _Outcome(200, orjson.dumps(self._page(query["_getpages"], int(offset) if offset.isdecimal() else 0)))
        if what.method == "POST":
            return _Outcome(200, orjson.dumps(self._bundle(what.resource, fresh=what.fresh)))
        raise resources.Invalid("not-supported", "nothing is supported here but bundles", status=405)

    def _row(self, kind: str, name: str) -> sqlite3.Row | None:
        found = self._db.execute("SELECT * FROM resource WHERE type = ? AND id = ?", (kind, name)).fetchone()
        return found if isinstance(found, sqlite3.Row) else None

    def _get(self, kind: str, name: str, what: _Interaction) -> _Outcome:
        row = self._row(kind, name)
        if row is None:
            raise resources.Invalid("not-found", f"{kind}/{name} is not known", status=404)
        if row["deleted"]:
            raise resources.Invalid("deleted", f"{kind}/{name} was deleted", status=410)
        if what.if_none_match and what.if_none_match == f'W/"{row["version"]}"':
            return _outcome(304, row, body=False)
        return _outcome(200, row)

    def _create(self, kind: str, what: _Interaction) -> _Outcome:
        if what.if_none_exist is not None:
            row = self._only(kind, urllib.parse.parse_qsl(what.if_none_exist, keep_blank_values=True))
            if row is not None:
                return _outcome(200, row)
        return self._write(kind, what.new_id or str(uuid.uuid4()), what.resource, None, method="POST")

    def _only(self, kind: str, query: Pairs) -> sqlite3.Row | None:
        """The one match of a conditional interaction; 412 for several."""
        names = self._matches(kind, [pair for pair in query if pair[0] not in _CONTROLS], conditional=True)
        if len(names) > 1:
            raise resources.Invalid("multiple-matches", f"{len(names)} resources match", status=412)
        return self._row(kind, names[0]) if names else None

    def _update(self, kind: str, name: str, what: _Interaction) -> _Outcome:
        if not _ID.fullmatch(name):
            raise resources.Invalid("value", "an id has 1 to 64 of A-Z a-z 0-9 - .", status=400)
        if not isinstance(what.resource, dict) or what.resource.get("id") != name:
            raise resources.Invalid("invalid", "the id of the body is not that of the URL", status=400)
        row = self._row(kind, name)
        if what.if_match is not None:
            if row is None:
                raise resources.Invalid("not-found", f"{kind}/{name} is not known", status=404)
            self._check_version(row, what.if_match)
        if row is None and not self.options.client_ids:
            raise resources.Invalid("not-supported", "ids are given by the server", status=405)
        return self._write(kind, name, what.resource, row, method="PUT")

    def _check_version(self, row: sqlite3.Row, if_match: str) -> None:
        weak = _WEAK.fullmatch(if_match.strip())
        if not weak:  # Azure wants weak ETags; a strong one is 400 there, too
            raise resources.Invalid("invalid", 'If-Match must be a weak ETag: W/"1"', status=400)
        if weak[1] != str(row["version"]):
            raise resources.Invalid("conflict", "this is not the current version", status=self.options.stale_status)

    def _conditional_update(self, kind: str, what: _Interaction) -> _Outcome:
        if not what.query:
            raise resources.Invalid("invalid", "PUT needs an id or a condition", status=400)
        row = self._only(kind, what.query)
        resource = what.resource if isinstance(what.resource, dict) else {}
        given = resource.get("id")
        if row is not None and given not in (None, row["id"]):
            raise resources.Invalid("invalid", "the id of the body is not that of the match", status=400)
        if row is None and given is not None:
            return self._update(kind, str(given), what)
        name = row["id"] if row is not None else what.new_id or str(uuid.uuid4())
        return self._write(kind, name, what.resource, row, method="PUT")

    def _conditional_delete(self, kind: str, what: _Interaction) -> _Outcome:
        if not what.query:
            raise resources.Invalid("invalid", "DELETE needs an id or a condition", status=400)
        row = self._only(kind, what.query)
        return _Outcome(204) if row is None else self._delete(kind, row["id"], what)

    def _delete(self, kind: str, name: str, what: _Interaction) -> _Outcome:
        row = self._row(kind, name)
        if row is None or row["deleted"]:
            return _Outcome(204)
        if what.if_match is not None and self.options.delete_checks_version:
            self._check_version(row, what.if_match)
        with self._atomic():
            version, updated = row["version"] + 1, self._now()
            self._db.execute(
                "UPDATE resource SET version = ?, updated = ?, deleted = 1, digest = NULL, body = NULL WHERE key = ?",
                (version, updated, row["key"]),
            )
            self._record(kind, name, version, updated, method="DELETE", body=None)
            self._index(kind, name, {})
        return _Outcome(204, None, (kind, name), version, updated)

    def _write(self, kind: str, name: str, resource: Json, row: sqlite3.Row | None, *, method: str) -> _Outcome:
        """Store a new version; the same content again makes none."""
        if self.options.validate:
            resources.check(kind, resource)
        if self.options.keep_tags and row is not None and row["body"]:
            resource = resources.with_tags_of(resource, resources.parse(row["body"]))
        digest = resources.digest(resource)
        if row is not None and row["digest"] == digest:
            return _outcome(200, row)
        version = 1 if row is None else row["version"] + 1
        updated = self._now()
        meta = {**(resource.get("meta") or {}), "versionId": str(version), "lastUpdated": updated}
        body = orjson.dumps({"resourceType": kind, "id": name, "meta": meta} | resource | {"id": name, "meta": meta})
        with self._atomic():
            self._db.execute(
                "INSERT INTO resource (type, id, version, updated, deleted, digest, body) VALUES (?, ?, ?, ?, 0, ?, ?) "
                "ON CONFLICT (type, id) DO UPDATE SET version = excluded.version, updated = excluded.updated, "
                "deleted = 0, digest = excluded.digest, body = excluded.body",
                (kind, name, version, updated, digest, body),
            )
            self._record(kind, name, version, updated, method=method, body=body)
            self._index(kind, name, resource)
        status = 201 if row is None or row["deleted"] else 200
        return _Outcome(status, body, (kind, name), version, updated)

    def _record(self, kind: str, name: str, version: int, updated: str, *, method: str, body: bytes | None) -> None:
        self._db.execute("INSERT INTO history VALUES (?, ?, ?, ?, ?, ?)", (kind, name, version, updated, method, body))
        if self._touched is not None:
            self._touched.append((kind, name))

    def _index(self, kind: str, name: str, resource: Json) -> None:
        self._db.execute("DELETE FROM token WHERE type = ? AND id = ?", (kind, name))
        rows = {(kind, name, *entry) for entry in resources.index(kind, resource, self._base)} if resource else set()
        self._db.executemany("INSERT INTO token VALUES (?, ?, ?, ?, ?)", rows)

    def _now(self, ago: float = 0.0) -> str:
        return (self._moment() - timedelta(seconds=ago)).isoformat(timespec="milliseconds")

    def _moment(self) -> datetime:
        return self.options.now() if self.options.now else datetime.now(UTC)

    @contextlib.contextmanager
    def _atomic(self) -> Iterator[None]:
        """All or nothing, references included; inside another one it is part of that."""
        if self._touched is not None:
            yield
            return
        self._touched = []
        self._db.execute("BEGIN")
        try:
            yield
            if self.options.references:
                for kind, name in self._touched:
                    self._check_references(kind, name)
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        else:
            self._db.execute("COMMIT")
        finally:
            self._touched = None

    def _check_references(self, kind: str, name: str) -> None:
        """What was written refers only to what is there; what was deleted is not referred to."""
        row = self._row(kind, name)
        sql = "SELECT type, id, value FROM token WHERE parameter = ' reference' AND "
        if row is None or row["deleted"]:
            if self._db.execute(sql + "value = ?", (f"{kind}/{name}",)).fetchone():
                raise resources.Invalid("conflict", f"{kind}/{name} is referred to", status=409)
            return
        for entry in self._db.execute(sql + "type = ? AND id = ?", (kind, name)).fetchall():
            target = self._row(*entry["value"].split("/", 1))
            if target is None or target["deleted"]:
                raise resources.Invalid("not-found", f"{entry['value']} is not there", status=400)

    # History and search

    def _history(self, kind: str, name: str) -> _Outcome:
        sql = "SELECT * FROM history WHERE type = ? AND id = ? ORDER BY version DESC"
        rows = self._db.execute(sql, (kind, name)).fetchall()
        if not rows:
            raise resources.Invalid("not-found", f"{kind}/{name} is not known", status=404)
        entries = [
            {
                "fullUrl": f"{self._base}/{kind}/{name}",
                **({"resource": orjson.Fragment(row["body"])} if row["body"] else {}),
                "request": {"method": row["method"], "url": f"{kind}/{name}" if row["method"] != "POST" else kind},
                "response": {
                    "status": {"DELETE": "204", "PUT": "200" if row["version"] > 1 else "201"}.get(
                        row["method"], "201"
                    ),
                    "etag": f'W/"{row["version"]}"',
                    "lastModified": row["updated"],
                },
            }
            for row in rows
        ]
        bundle = {"resourceType": "Bundle", "type": "history", "total": len(entries), "entry": entries}
        return _Outcome(200, orjson.dumps(bundle))

    def _version(self, kind: str, name: str, version: str) -> _Outcome:
        sql = "SELECT * FROM history WHERE type = ? AND id = ? AND CAST(version AS TEXT) = ?"
        row = self._db.execute(sql, (kind, name, version)).fetchone()
        if row is None:
            raise resources.Invalid("not-found", f"{kind}/{name} has no such version", status=404)
        if row["body"] is None:
            raise resources.Invalid("deleted", f"{kind}/{name} was deleted in this version", status=410)
        return _outcome(200, row)

    def _matches(self, kind: str, query: Pairs, *, conditional: bool = False, order: str = "key") -> list[str]:
        """The ids that a query matches; a condition is never behind."""
        if conditional and not query:
            raise resources.Invalid("invalid", "a condition needs a search parameter", status=412)
        conditions, values = ["type = ?", "deleted = 0"], [kind]
        if self.options.lag and not conditional:
            conditions.append("updated <= ?")
            values.append(self._now(ago=self.options.lag))
        for name, text in query:
            condition, wanted = resources.condition(kind, name, text, self._base)
            conditions.append(condition)
            values += wanted
        sql = f"SELECT id FROM resource WHERE {' AND '.join(conditions)} ORDER BY {order}"  # noqa: S608
        return [row[0] for row in self._db.execute(sql, values)]

    def _found(self, kind: str, query: Pairs, *, order: str, fresh: bool) -> list[str]:
        """What a search finds, or has found `reuse` seconds ago or less."""
        key, now = (kind, tuple(query)), self._moment()
        if not fresh and self.options.reuse and key in self._results:
            since, names = self._results[key]
            if (now - since).total_seconds() <= self.options.reuse:
                return names
        names = self._matches(kind, query, order=order)
        if not fresh and self.options.reuse:
            self._results[key] = (now, names)
            if len(self._results) > _SEARCHES_KEPT:
                self._results.popitem(last=False)
        return names

    def _search(self, kind: str, query: Pairs, *, fresh: bool) -> dict[str, Json]:
        """The first page of a search; the others are kept under a name, as HAPI does."""
        controls = dict(pair for pair in query if pair[0] in _CONTROLS)
        sort = controls.get("_sort")
        if sort is not None and sort not in _SORTS:
            raise resources.Invalid("not-supported", "_sort by _id or _lastUpdated only", status=400)
        count = controls.get("_count", str(self.options.page_size))
        if not re.fullmatch(r"\d{1,6}", count, re.ASCII):
            raise resources.Invalid("invalid", "_count must be a number", status=400)
        wanted = [pair for pair in query if pair[0] not in _CONTROLS and pair[0] not in self.options.unknown]
        names = self._found(kind, wanted, order=_SORTS[sort] if sort else "key", fresh=fresh)
        size = min(int(count), self.options.page_most)
        if size == 0 or controls.get("_summary") == "count":
            return {"resourceType": "Bundle", "type": "searchset", "total": len(names)}
        search = uuid.uuid4().hex
        self._searches[search] = (kind, names, size, controls.get("_elements"))
        if len(self._searches) > _SEARCHES_KEPT:
            self._searches.popitem(last=False)
        bundle = self._page(search, 0)
        address = f"{self._base}/{kind}?{urllib.parse.urlencode(query)}" if query else f"{self._base}/{kind}"
        bundle["link"] = [{"relation": "self", "url": address}, *bundle["link"][1:]]
        if len(bundle["link"]) == 1:
            del self._searches[search]
        return bundle

    def _page(self, search: str, offset: int) -> dict[str, Json]:
        if search not in self._searches:
            raise resources.Invalid("deleted", "this search is gone", status=410)
        kind, names, size, elements = self._searches[search]
        rows = [self._row(kind, name) for name in names[offset : offset + size]]
        entries = [
            {
                "fullUrl": f"{self._base}/{kind}/{row['id']}",
                "resource": orjson.Fragment(resources.subset(row["body"], elements)),
                "search": {"mode": "match"},
            }
            for row in rows
            if row is not None and not row["deleted"]
        ]
        link = f"{self._base}?_getpages={search}&_offset="
        links = [{"relation": "self", "url": f"{link}{offset}"}]
        if offset + size < len(names):
            links.append({"relation": "next", "url": f"{link}{offset + size}"})
        total = {"total": len(names)} if self.options.total else {}
        entry = {"entry": entries} if entries else {}
        return {"resourceType": "Bundle", "id": search, "type": "searchset", **total, "link": links, **entry}

    # Bundles

    def _bundle(self, bundle: Json, *, fresh: bool) -> dict[str, Json]:
        """A batch, each entry on its own, or a transaction, all or nothing."""
        kind = bundle.get("type") if isinstance(bundle, dict) and bundle.get("resourceType") == "Bundle" else None
        if kind not in ("batch", "transaction") or not getattr(self.options, kind):
            raise resources.Invalid("not-supported", "no bundle of a supported type", status=400)
        entries = bundle.get("entry") or []
        if not isinstance(entries, list):
            raise resources.Invalid("structure", "Bundle.entry is an array", status=400)
        if len(entries) > self.options.entry_limit:
            raise resources.Invalid("too-costly", f"more than {self.options.entry_limit} entries", status=400)
        if kind == "transaction":
            with self._atomic():
                answers = self._transaction(entries)
        else:
            answers = [self._one(entry, fresh=fresh) for entry in entries]
        return {"resourceType": "Bundle", "type": f"{kind}-response", "entry": answers}

    def _one(self, entry: Json, *, fresh: bool) -> dict[str, Json]:
        """One entry of a batch; its refusal is its own."""
        try:
            return self._entry(self._interact(dataclasses.replace(_interaction(entry), fresh=fresh)))
        except resources.Invalid as invalid:
            outcome = orjson.Fragment(invalid.body())
            return {"response": {"status": _line(invalid.status or self.options.invalid_status), "outcome": outcome}}

    def _transaction(self, entries: Sequence[Json]) -> list[dict[str, Json]]:
        """DELETE, POST, PUT, GET in this order; references to full URLs of entries become those of the resources."""
        plans = [(what, *self._identity(what)) for what in map(_interaction, entries)]
        writes = [key for what, key, _ in plans if what.method in ("PUT", "DELETE") and key is not None]
        if len(set(writes)) < len(writes):
            raise resources.Invalid("invalid", "a resource occurs twice in the transaction", status=400)
        pairs = zip(entries, plans, strict=True)
        places = {entry["fullUrl"]: key for entry, (_, key, _) in pairs if key and _named(entry)}
        answers: dict[int, dict[str, Json]] = {}
        for at in sorted(range(len(plans)), key=lambda at: "DELETE POST PUT GET".find(plans[at][0].method)):
            what, key, new = plans[at]
            resource = resources.linked(what.resource, places, self._resolve)
            outcome = self._interact(dataclasses.replace(what, resource=resource, new_id=new))
            if what.method in ("POST", "PUT") and outcome.key and "/".join(outcome.key) != key:
                raise resources.Invalid("invalid", "two entries of the transaction are one resource", status=400)
            answers[at] = self._entry(outcome)
        return [answers[at] for at in range(len(plans))]

    def _identity(self, what: _Interaction) -> tuple[str | None, str | None]:
        """`Type/id` of what an entry will write, and the new id that was chosen for it."""
        kind, _, name = what.path.partition("/")
        if name:
            return what.path, None
        condition = None
        if what.method == "POST" and what.if_none_exist is not None:
            condition = urllib.parse.parse_qsl(what.if_none_exist, keep_blank_values=True)
        elif what.method in ("PUT", "DELETE"):
            condition = list(what.query)
        row = self._only(kind, condition) if condition else None
        if row is not None:
            return f"{kind}/{row['id']}", None
        if what.method == "DELETE":
            return None, None
        given = what.resource.get("id") if what.method == "PUT" and isinstance(what.resource, dict) else None
        new = str(given or uuid.uuid4())
        return f"{kind}/{new}", new

    def _resolve(self, reference: str) -> str:
        """A conditional reference, `Patient?identifier=...`: exactly one must match in the store."""
        kind, _, query = reference.partition("?")
        names = self._matches(kind, urllib.parse.parse_qsl(query), conditional=True)
        if len(names) != 1:
            raise resources.Invalid("invalid", f"{len(names)} resources match a conditional reference", status=400)
        return f"{kind}/{names[0]}"

    def _entry(self, outcome: _Outcome) -> dict[str, Json]:
        response: dict[str, Json] = {"status": _line(outcome.status)}
        if outcome.key and outcome.version is not None:
            response["etag"] = str(outcome.version) if self.options.bare_etags else f'W/"{outcome.version}"'
            response["lastModified"] = outcome.updated
            response["location"] = f"{'/'.join(outcome.key)}/_history/{outcome.version}"
        return {**({"resource": orjson.Fragment(outcome.body)} if outcome.body else {}), "response": response}

    def _capabilities(self) -> dict[str, Json]:
        system = [name for name in ("transaction", "batch") if getattr(self.options, name)]
        update_create = {"updateCreate": self.options.client_ids} if self.options.update_create else {}
        listed = [
            {
                "type": kind,
                "interaction": [{"code": code} for code in _INTERACTIONS],
                "versioning": "versioned",
                "readHistory": True,
                **update_create,
                "conditionalCreate": True,
                "conditionalUpdate": True,
                "conditionalDelete": "single",
                "searchParam": [{"name": name, "type": form} for name, (form, _) in parameters.items()],
            }
            for kind, parameters in resources.PARAMETERS.items()
        ]
        rest = {"mode": "server", "resource": listed, "interaction": [{"code": code} for code in system]}
        return {
            "resourceType": "CapabilityStatement",
            "status": "active",
            "date": "2024-01-01",
            "kind": "instance",
            "software": {"name": self.options.software},
            "fhirVersion": "4.0.1",
            "format": ["application/fhir+json", "json"],
            "rest": [rest],
        }


_INTERACTIONS = ("read", "vread", "update", "delete", "history-instance", "create", "search-type")


def _outcome(status: int, row: sqlite3.Row, *, body: bool = True) -> _Outcome:
    return _Outcome(status, row["body"] if body else None, (row["type"], row["id"]), row["version"], row["updated"])


def _line(status: int) -> str:
    words = {200: "OK", 201: "Created", 204: "No Content", 304: "Not Modified", 404: "Not Found", 409: "Conflict"}
    return f"{status} {words.get(status, '')}".strip()


def _named(entry: Json) -> bool:
    return isinstance(entry.get("fullUrl"), str) and entry["request"]["method"] in ("POST", "PUT")


def _interaction(entry: Json) -> _Interaction:
    """The interaction that a bundle entry asks for."""
    request = entry.get("request") if isinstance(entry, dict) else None
    if not isinstance(request, dict) or not isinstance(request.get("url"), str):
        raise resources.Invalid("required", "an entry needs a request", status=400)
    method = request.get("method")
    if method not in ("DELETE", "POST", "PUT", "GET"):
        raise resources.Invalid("not-supported", "method DELETE, POST, PUT or GET", status=400)
    if method in ("POST", "PUT") and not isinstance(entry.get("resource"), dict):
        raise resources.Invalid("required", f"{method} needs a resource", status=400)
    path, _, query = request["url"].partition("?")
    return _Interaction(
        method,
        path.strip("/"),
        urllib.parse.parse_qsl(query, keep_blank_values=True),
        entry.get("resource"),
        request.get("ifMatch"),
        request.get("ifNoneExist"),
        request.get("ifNoneMatch"),
    )
