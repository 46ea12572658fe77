"""The DICOM service of the sandbox: DICOMweb, change feed and bulk update as the Azure service answers them.

STOW-RS, WADO-RS, QIDO-RS and DELETE under `/v1` and `/v2`, the change feed of both, operations, partitions. Follows the
behaviour of microsoft/dicom-server where its documentation says otherwise. For development and tests.
"""

import functools
import io
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import orjson
import pydicom
from pydicom import datadict
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from dicomcast.dicom import files
from dicomcast.sandbox import archive, multipart, qido, validation

Json = Any  # a JSON value

_DICOM_JSON = "application/dicom+json"
_VERSIONS = {"v1": 1, "v2": 2, "v1.0-prerelease": 1}
_PARTITION = "Microsoft.Default"
_EXPLICIT, _IMPLICIT = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2"
_UIDS = ("0020000D", "0020000E", "00080018")
_REQUIRED = (*_UIDS, "00080016", "00100020")
# What v1 refuses an instance for: the attributes that QIDO indexes.
_INDEXED = (*archive.STUDY_TAGS, *archive.SERIES_TAGS)
_FIRST_TICK, _LAST_TICK = archive.ticks_of("0001-01-01T00:00:00Z"), archive.ticks_of("9999-12-31T23:59:59.9999999Z")
_UPDATABLE = set(
    qido.tags(
        "00080050 00080090 00081030 00100010 00100020 00100021 00100022 00100030 00100032 00100040 00100200 "
        "00101000 00101001 00101005 00101010 00101020 00101030 00101040 00101060 00101080 00101081 00101090 "
        "00102150 00102152 00102154 00102160 00102180 001021F0 00102201 00102292 00102295 00102297 00102298 "
        "00102299 00104000 00403001"
    )
)
_VALIDATION_FAILED, _EXISTS, _PENDING = 43264, 45070, 45071
_WARNED, _OTHER_SOP_CLASS = 1, 45063


@dataclass(frozen=True, slots=True)
class Options:
    """How this service differs from the plain one."""

    partitions: bool = False
    documented_casing: bool = False  # the feed as Microsoft's pages print it: names in PascalCase, values in lower case
    operation_polls: int = 0  # how often an operation answers 202 before its work is done
    token: str | None = None  # the bearer token without which everything is 401
    now: Callable[[], datetime] | None = None  # the clock of the feed; None is the real one


class _Refused(Exception):
    """An answer other than success: plain text, or a DICOM JSON object."""

    def __init__(self, status: int, text: str = "", *, dataset: Json = None):
        super().__init__(text)
        self.status = status
        self.dataset = dataset


@dataclass(slots=True)
class _Operation:
    work: Callable[[], dict[str, Json]]
    polls: int
    created: int
    updated: int
    results: dict[str, Json] | None = None


@dataclass(frozen=True, slots=True)
class _Call:
    """A request with what its path says."""

    request: Request
    version: int
    prefix: str  # the service's own address down to the version and partition
    partition: str
    study: str | None
    series: str | None
    sop: str | None

    @property
    def scope(self) -> tuple[str, str, str | None, str | None]:
        """Partition and UIDs of a path that names at least a study."""
        assert self.study is not None
        return self.partition, self.study, self.series, self.sop


_Endpoint = Callable[["_Service", _Call], Awaitable[Response]]


def app(store: archive.Archive, options: Options | None = None) -> Starlette:
    """The ASGI app over a store."""
    service = _Service(store, options or Options())
    routes = [
        Route(prefix + path, service.endpoint(function), methods=[method])
        for path, method, function, under_partition in _ROUTES
        for prefix in (("/{version}", "/{version}/partitions/{partition}") if under_partition else ("/{version}",))
    ]
    control = [Route(f"/sandbox/{name}", service.control, methods=["POST"]) for name in _CONTROLS]
    return Starlette(routes=[Route("/health/check", _health), *control, *routes])


class _Service:
    """The endpoints, over one store."""

    def __init__(self, store: archive.Archive, options: Options):
        self.store = store
        self.options = options
        self.operations: dict[str, _Operation] = {}

    def endpoint(self, function: _Endpoint) -> Callable[[Request], Awaitable[Response]]:
        """An endpoint behind the checks that all share; errors become plain text, as in the service."""

        @functools.wraps(function)
        async def answer(request: Request) -> Response:
            try:
                return await function(self, self._call(request))
            except _Refused as refused:
                if refused.dataset is not None:
                    return _json(refused.dataset, refused.status, _DICOM_JSON)
                challenge = {"WWW-Authenticate": "Bearer"} if refused.status == 401 else None
                return PlainTextResponse(str(refused), refused.status, challenge)

        return answer

    def _call(self, request: Request) -> _Call:
        path = request.path_params
        if self.options.token and request.headers.get("authorization") != f"Bearer {self.options.token}":
            raise _Refused(401)
        if path["version"] not in _VERSIONS:
            raise _Refused(404)
        query = request.scope["query_string"].lower()
        if b"<" in query or b"%3c" in query:
            raise _Refused(400, "The query string holds a forbidden character.")
        for name in ("study", "series", "sop"):
            if name in path and not validation.identity(path[name]):
                raise _Refused(400, f"The UID of the {name} in the path is not valid.")
        prefix = f"{request.url.scheme}://{request.url.netloc}/{path['version']}"
        partition = path.get("partition")
        if partition is not None:
            prefix += f"/partitions/{partition}"
        return _Call(
            request=request,
            version=_VERSIONS[path["version"]],
            prefix=prefix,
            partition=self._partition(request, partition),
            study=path.get("study"),
            series=path.get("series"),
            sop=path.get("sop"),
        )

    def _partition(self, request: Request, name: str | None) -> str:
        """The partition of a request; 400 where partitions are off and it names one, or on and it does not."""
        data = any(f"/{word}" in request.url.path for word in ("studies", "series", "instances"))
        if name is None:
            if self.options.partitions and data:
                raise _Refused(400, "The partition name is missing in the route.")
            return _PARTITION
        if not self.options.partitions:
            raise _Refused(400, "Data partitions feature is disabled.")
        if not (0 < len(name) <= 64 and all(char.isascii() and (char.isalnum() or char in ".-_") for char in name)):
            raise _Refused(400, "The partition name is not valid.")
        if request.method != "POST" and name != _PARTITION and name not in self.store.partitions():
            raise _Refused(400, "The specified partition does not exist.")
        return name

    # STOW-RS

    async def stow(self, call: _Call) -> Response:
        """Store instances one after another in the order of the request."""
        _must_accept(call.request, _DICOM_JSON)
        stored: list[Json] = []
        failed: list[Json] = []
        notes: set[str] = set()
        count = 0
        for data in _uploads(call.request.headers.get("content-type", ""), await call.request.body()):
            count += 1
            item, warnings = self._store(call, data)
            (failed if "00081197" in item else stored).append(item)
            notes |= warnings
        if not count:
            return Response(status_code=204)
        answer: dict[str, Json] = {}
        if call.study and stored:
            answer["00081190"] = _element("UR", f"{call.prefix}/studies/{call.study}")
        if failed:
            answer["00081198"] = {"vr": "SQ", "Value": failed}
        if stored:
            answer["00081199"] = {"vr": "SQ", "Value": stored}
        doubtful = call.version == 2 and any("00081196" in item for item in stored)
        status = 409 if not stored else 202 if failed or doubtful else 200
        response = _json(answer, status, _DICOM_JSON)
        if notes:
            response.headers["Warning"] = f'299 {call.request.url.netloc}: "{" ".join(sorted(notes))}"'
        return response

    def _store(self, call: _Call, data: bytes) -> tuple[dict[str, Json], set[str]]:
        """The item of the answer for one file, and texts for the Warning header."""
        try:
            dataset = files.read(data)
        except ValueError:
            return {"00081197": _element("US", _VALIDATION_FAILED)}, set()
        metadata, comments, fatal = _validated(dataset, call.version)
        uids = [_first(metadata, tag) for tag in (*_UIDS, "00080016")]
        named = zip(("00081155", "00081150"), uids[2:], strict=True)
        item: dict[str, Json] = {tag: _element("UI", uid) for tag, uid in named if uid}
        attributes = {
            "vr": "SQ",
            **({"Value": [{"00000902": _element("LO", text)} for text in comments]} if comments else {}),
        }
        if fatal or (call.study and call.study != uids[0]):
            return {**item, "00081197": _element("US", _VALIDATION_FAILED), "00741048": attributes}, set()
        study, series, sop = (uid.rstrip(" ") for uid in uids[:3])
        syntax = str(getattr(dataset, "file_meta", {}).get("TransferSyntaxUID", "")) or _guessed_syntax(dataset)
        kept = bytes(128) + data[128:] if data[128:132] == b"DICM" else data
        try:
            self.store.store(call.partition, study, series, sop, syntax=syntax, metadata=metadata, data=kept)
        except archive.Exists as exists:
            return {**item, "00081197": _element("US", _PENDING if exists.pending else _EXISTS)}, set()
        item["00081190"] = _element("UR", f"{call.prefix}/studies/{study}/series/{series}/instances/{sop}")
        if comments and call.version == 2:
            item["00081196"] = _element("US", _WARNED)
        elif syntax == _IMPLICIT:
            item["00081196"] = _element("US", _OTHER_SOP_CLASS)
        if call.version == 2:
            item["00741048"] = attributes
        several = any(len(metadata.get(tag, {}).get("Value", ())) > 1 for tag in _INDEXED)
        return item, {"Only the first value of an indexed attribute is indexed."} if several else set()

    # WADO-RS

    async def retrieve(self, call: _Call) -> Response:
        """Files as they were stored; other transfer syntaxes are 406, since nothing is transcoded here."""
        single, syntax = _wanted(call.request, instance=call.sop is not None)
        rows = self._instances(call)
        if syntax != "*" and (len(rows) > 1 or rows[0].syntax != syntax):
            raise _Refused(406, "The requested transfer syntax is not available.")
        if single:
            content_type = f"application/dicom; transfer-syntax={rows[0].syntax}"
            return Response(self.store.file(rows[0].file), media_type=content_type)
        boundary = str(uuid.uuid4())

        async def body() -> AsyncIterator[bytes]:
            contents = ((f"application/dicom; transfer-syntax={row.syntax}", self.store.file(row.file)) for row in rows)
            for piece in multipart.encoded(contents, boundary):
                yield piece

        return StreamingResponse(body(), media_type=f"multipart/related; boundary={boundary}")

    def _instances(self, call: _Call) -> list[archive.Instance]:
        original = call.request.headers.get("msdicom-request-original", "").lower() == "true"
        rows = self.store.instances(*call.scope, original=original)
        if not rows:
            raise _Refused(404, "The specified resource was not found.")
        return rows

    async def metadata(self, call: _Call) -> Response:
        """DICOM JSON of the instances. The ETag is unquoted and compared as it stands, as the service does."""
        _must_accept(call.request, _DICOM_JSON)
        rows = self._instances(call)
        newest = max(row.watermark for row in rows)
        tag = str(newest) if call.sop else f"{newest}-{len(rows)}"
        if call.request.headers.get("if-none-match", "").lower() == tag:
            return Response(status_code=304)
        body = orjson.dumps([orjson.Fragment(row.metadata) for row in rows])
        return Response(body, media_type=_DICOM_JSON, headers={"ETag": tag})

    async def search(self, call: _Call, level: str) -> Response:
        """QIDO-RS; 204 where nothing matches."""
        _must_accept(call.request, _DICOM_JSON)
        pairs = call.request.query_params.multi_items()
        try:
            query = qido.parse(pairs, level, version=call.version, study=call.study, series=call.series)
        except ValueError as error:
            raise _Refused(400, str(error)) from error
        found = qido.run(self.store, query, call.partition)
        return _json(found, media=_DICOM_JSON) if found else Response(status_code=204)

    async def studies(self, call: _Call) -> Response:
        """Search studies."""
        return await self.search(call, "study")

    async def series(self, call: _Call) -> Response:
        """Search series, of all studies or one."""
        return await self.search(call, "series")

    async def instances(self, call: _Call) -> Response:
        """Search instances, of everything, a study or a series."""
        return await self.search(call, "instance")

    async def delete(self, call: _Call) -> Response:
        """Delete at once: 204, or 404 where nothing is."""
        if not self.store.delete(*call.scope):
            raise _Refused(404, "The specified resource was not found.")
        return Response(status_code=204)

    # The change feed

    async def changes(self, call: _Call) -> Response:
        """A page: a window of sequences in v1, a window of time paged by rows in v2."""
        query = {name.lower(): value for name, value in call.request.query_params.items()}
        most, usual = (100, 10) if call.version == 1 else (200, 100)
        offset = _number(query, "Offset", 0, 0, 2**63 - 1)
        limit = _number(query, "Limit", usual, 1, most)
        include = _flag(query, "IncludeMetadata")
        if call.version == 1:
            entries = self.store.by_sequence(min(offset, 2**62), limit)
        else:
            start, end = (_time(query, "StartTime", _FIRST_TICK), _time(query, "EndTime", _LAST_TICK + 1))
            if end <= start:
                raise _Refused(400, "The end time must be after the start time.")
            entries = self.store.by_time(start, end, offset, limit)
        return _json([self._entry(entry, include) for entry in entries])

    async def latest(self, call: _Call) -> Response:
        """The entry of the highest sequence (v1) or the newest time (v2); 204 for an empty feed."""
        include = _flag({name.lower(): value for name, value in call.request.query_params.items()}, "IncludeMetadata")
        entry = self.store.latest(by_time=call.version == 2)
        return _json(self._entry(entry, include)) if entry else Response(status_code=204)

    def _entry(self, entry: archive.Entry, include: bool) -> dict[str, Json]:
        values: dict[str, Json] = {
            "sequence": entry.sequence,
            "partitionName": entry.partition,
            "studyInstanceUid": entry.study,
            "seriesInstanceUid": entry.series,
            "sopInstanceUid": entry.sop,
            "action": entry.action,
            "timestamp": archive.instant(entry.ticks),
            "state": entry.state,
        }
        if include and entry.metadata is not None:
            values["metadata"] = orjson.Fragment(entry.metadata)
        if not self.options.documented_casing:
            return values
        values.update(action=entry.action.lower(), state=entry.state.lower())
        return {name[0].upper() + name[1:]: value for name, value in values.items()}

    # Bulk update and operations

    async def bulk_update(self, call: _Call) -> Response:
        """Start an update of all instances of up to 50 studies; v2 only."""
        if call.version == 1:
            raise _Refused(404)
        studies, change = _update_of(await call.request.body())
        if any(operation.results is None for operation in self.operations.values()):
            raise _Refused(409, "There is already an active update operation.")
        moment = self.store.ticks()
        work = functools.partial(self._update, call.partition, studies, change)
        operation = _Operation(work, self.options.operation_polls, moment, moment)
        name = uuid.uuid4().hex
        self.operations[name] = operation
        if not operation.polls:
            self._finish(operation)
        href = f"{call.request.url.scheme}://{call.request.url.netloc}/v2/operations/{name}"
        return _json({"id": name, "href": href}, 202)

    def _finish(self, operation: _Operation) -> None:
        operation.results = operation.work()
        operation.updated = self.store.ticks()

    def _update(self, partition: str, studies: Sequence[str], change: dict[str, Json]) -> dict[str, Json]:
        results: dict[str, Json] = {"studyProcessed": 0, "studyUpdated": 0, "studyFailed": 0, "instanceUpdated": 0}
        errors = []
        for study in studies:
            results["studyProcessed"] += 1
            try:
                updated = self.store.update(partition, study, change, functools.partial(_rewritten, change=change))
            except Exception as error:  # whatever pydicom can't write; the other studies go on, as in the service
                results["studyFailed"] += 1
                errors.append(f"Failed to update study {study}: {type(error).__name__}")
                continue
            results["studyUpdated"] += updated > 0
            results["instanceUpdated"] += updated
        return {**results, **({"errors": errors} if errors else {})}

    async def operation(self, call: _Call) -> Response:
        """202 while it runs, 200 when it is over in any way, 404 for an unknown one."""
        name = call.request.path_params["operation"]
        operation = self.operations.get(name)
        if operation is None:
            raise _Refused(404)
        if operation.results is None:
            if operation.polls > 0:
                operation.polls -= 1
            else:
                self._finish(operation)
        results = operation.results
        success = "succeeded" if call.version == 2 else "completed"
        value: dict[str, Json] = {
            "operationId": name,
            "type": "update",
            "createdTime": archive.instant(operation.created, "Z"),
            "lastUpdatedTime": archive.instant(operation.updated, "Z"),
            "status": "running" if results is None else "failed" if results["studyFailed"] else success,
            "percentComplete": 0 if results is None else 100,
        }
        if results is not None:
            return _json({**value, "results": results})
        response = _json(value, 202)
        response.headers["Location"] = str(call.request.url)
        return response

    async def partition_list(self, call: _Call) -> Response:
        """All partitions; the default one always exists."""
        if not self.options.partitions:
            raise _Refused(400, "Data partitions feature is disabled.")
        names = list(dict.fromkeys([_PARTITION, *self.store.partitions()]))
        return _json([{"partitionKey": at, "partitionName": name} for at, name in enumerate(names, 1)])

    # What no DICOM service has

    async def control(self, request: Request) -> Response:
        """`POST /sandbox/gaps|hold|release|reset|clock`: feeds that behave as databases under load or restore do."""
        name = request.url.path.rpartition("/")[2]
        try:
            body = orjson.loads(await request.body() or b"{}")
            if name == "gaps":
                return _json({"sequence": self.store.skip(int(body["skip"]))})
            if name == "hold":
                self.store.holding = int(body.get("entries", 1))
                return _json({"holding": self.store.holding})
            if name == "release":
                return _json({"released": self.store.release()})
            if name == "reset":
                self.store.reset(int(body.get("sequence", 0)))
                return _json({"sequence": int(body.get("sequence", 0))})
            self.store.frozen = None if body.get("now") is None else archive.ticks_of(body["now"])
            return _json({"now": archive.instant(self.store.ticks())})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return PlainTextResponse(f"{name}: {error}", 400)


_CONTROLS = ("gaps", "hold", "release", "reset", "clock")
_SERIES = "/studies/{study}/series/{series}"
_INSTANCE = _SERIES + "/instances/{sop}"
_ROUTES: tuple[tuple[str, str, _Endpoint, bool], ...] = (
    ("/changefeed", "GET", _Service.changes, False),
    ("/changefeed/latest", "GET", _Service.latest, False),
    ("/operations/{operation}", "GET", _Service.operation, False),
    ("/partitions", "GET", _Service.partition_list, False),
    ("/studies/$bulkUpdate", "POST", _Service.bulk_update, True),
    ("/studies", "POST", _Service.stow, True),
    ("/studies/{study}", "POST", _Service.stow, True),
    ("/studies", "GET", _Service.studies, True),
    ("/series", "GET", _Service.series, True),
    ("/instances", "GET", _Service.instances, True),
    ("/studies/{study}/series", "GET", _Service.series, True),
    ("/studies/{study}/instances", "GET", _Service.instances, True),
    (_SERIES + "/instances", "GET", _Service.instances, True),
    *((path, "GET", _Service.retrieve, True) for path in ("/studies/{study}", _SERIES, _INSTANCE)),
    *((path + "/metadata", "GET", _Service.metadata, True) for path in ("/studies/{study}", _SERIES, _INSTANCE)),
    *((path, "DELETE", _Service.delete, True) for path in ("/studies/{study}", _SERIES, _INSTANCE)),
)


async def _health(_request: Request) -> Response:
    details = [{"name": "sandbox", "status": "Healthy", "description": "in this process"}]
    return _json({"overallStatus": "Healthy", "details": details})


def _json(value: Json, status: int = 200, media: str = "application/json; charset=utf-8") -> Response:
    return Response(orjson.dumps(value), status, media_type=media)


def _element(vr: str, value: Json) -> dict[str, Json]:
    return {"vr": vr, "Value": [value]}


def _first(metadata: dict[str, Json], tag: str) -> str:
    values = metadata.get(tag, {}).get("Value") or [""]
    return str(values[0] or "")


def _must_accept(request: Request, wanted: str) -> None:
    names = {one.name for one in multipart.accepted(request.headers.get("accept", ""))}
    if not names & {wanted, wanted.partition("/")[0] + "/*", "*/*"}:
        raise _Refused(406)


def _wanted(request: Request, *, instance: bool) -> tuple[bool, str]:
    """Single part or multipart, and the transfer syntax, of the best range that this route can serve."""
    found: list[tuple[float, bool, bool, str]] = []
    for one in multipart.accepted(request.headers.get("accept", "")):
        syntax = one.parameters.get("transfer-syntax", "*" if one.name == "*/*" else _EXPLICIT)
        related = one.name == "multipart/related" and one.parameters.get("type") == "application/dicom"
        single = instance and one.name == "application/dicom"
        if related or single or one.name == "*/*":
            found.append((-one.quality, syntax != "*", single, syntax))
    if not found:
        raise _Refused(406, "The request contains an unsupported media type.")
    best = min(found, key=lambda one: one[:2])
    return best[2], best[3]


def _uploads(content_type: str, body: bytes) -> list[bytes]:
    """The files of a STOW request: one body, or the parts of multipart/related; 400 or 415 for the whole request."""
    if content_type.strip().lower() == "application/dicom":
        return [body] if body else []
    outer = multipart.media_type(content_type)
    boundary = outer.parameters.get("boundary")
    if outer.name != "multipart/related" or not boundary:
        raise _Refused(415, "The request content type is not supported.")
    if "start" in outer.parameters:
        raise _Refused(400, "The start parameter is not supported.")
    found: list[bytes] = []
    try:
        for headers, data in multipart.parts(body, boundary):
            inherited = outer.parameters.get("type", "") if not found else ""
            if multipart.media_type(headers.get("content-type", inherited)).name != "application/dicom":
                raise _Refused(415, "A part is not application/dicom.")
            found.append(data)
    except ValueError as error:
        raise _Refused(400, str(error)) from error
    return found


def _validated(dataset: pydicom.Dataset, version: int) -> tuple[dict[str, Json], list[str], bool]:
    """Metadata to keep, comments on what is invalid, and whether that refuses the instance.

    v1 refuses for any required or indexed attribute. v2 refuses for the required ones, and drops the others.
    """
    problems: dict[str, str] = {}

    def check(tag: str, vr: str, texts: Sequence[str] | None) -> bool:
        if tag in _REQUIRED and vr == "UI" and texts and validation.identity(texts[0]):
            return True
        problem = validation.problem(vr, texts)
        if problem:
            problems[tag] = f"DICOM100: ({tag[:4].lower()},{tag[4:].lower()}) - {problem}"
        return not problem or version == 1 or tag in _REQUIRED

    metadata = files.metadata(dataset, check=check)
    missing = [tag for tag in _REQUIRED if not _first(metadata, tag)]
    if version == 2 and missing == ["00100020"] and "00100020" in metadata:
        # Present and empty is a warning in v2, and the attribute is not kept.
        del metadata["00100020"]
        problems["00100020"] = "DICOM100: (0010,0020) - The required tag is empty."
        missing = []
    for tag in missing:
        problems[tag] = f"DICOM100: ({tag[:4].lower()},{tag[4:].lower()}) - The required tag is missing."
    grave = _REQUIRED if version == 2 else (*_REQUIRED, *_INDEXED)
    fatal = bool(missing) or any(tag in problems and tag in metadata for tag in grave)
    if version == 1:
        problems = {tag: text for tag, text in problems.items() if tag in grave}
    return metadata, [problems[tag] for tag in sorted(problems)], fatal


def _guessed_syntax(dataset: pydicom.Dataset) -> str:
    implicit, little = dataset.original_encoding
    return _IMPLICIT if implicit else _EXPLICIT if little else "1.2.840.10008.1.2.2"


def _number(query: dict[str, str], name: str, usual: int, least: int, most: int) -> int:
    text = query.get(name.lower())
    if text is None:
        return usual
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if not least <= number <= most:
        reason = f"The field {name} must be between {least} and {most}."
        raise _Refused(400, f"The query parameter '{name}' is invalid. {reason}")
    return number


def _flag(query: dict[str, str], name: str) -> bool:
    text = query.get(name.lower(), "true").lower()
    if text not in ("true", "false"):
        raise _Refused(400, f"The query parameter '{name}' is invalid. The value is not valid.")
    return text == "true"


def _time(query: dict[str, str], name: str, usual: int) -> int:
    text = query.get(name.lower())
    if text is None:
        return usual
    try:
        return archive.ticks_of(text)
    except ValueError as error:
        raise _Refused(400, f"The query parameter '{name}' is invalid. The time zone is missing.") from error


def _update_of(body: bytes) -> tuple[list[str], dict[str, Json]]:
    """Studies and elements of a bulk update; 400 for what it does not allow."""
    try:
        request = {name.lower(): value for name, value in orjson.loads(body).items()}
        studies, change = list(request["studyinstanceuids"]), dict(request["changedataset"])
    except (orjson.JSONDecodeError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise _Refused(400, "The request body is not valid.") from error
    if not 1 <= len(studies) <= 50 or not all(isinstance(uid, str) and validation.identity(uid) for uid in studies):
        raise _Refused(400, "Between 1 and 50 valid study instance UIDs are needed.")
    comments = [text for tag, element in change.items() if (text := _disallowed(tag, element))]
    if comments or not change:
        failed = [{"00000902": _element("LO", text)} for text in comments]
        raise _Refused(400, dataset={"00741048": {"vr": "SQ", "Value": failed}})
    if not orjson.dumps(change).isascii():
        change["00080005"] = _element("CS", "ISO_IR 192")
    return studies, change


def _disallowed(tag: str, element: Json) -> str | None:
    name = f"({tag[:4]},{tag[4:]})"
    if tag not in _UPDATABLE:
        return f"DICOM100: {name} - The attribute is not supported in a bulk update."
    vr = datadict.dictionary_VR(int(tag, 16))
    values = element.get("Value") if isinstance(element, dict) and element.get("vr") == vr else None
    if not isinstance(values, list) or not values:
        return f"DICOM100: {name} - The attribute needs VR {vr} and a value."
    texts = ["=".join(value.values()) if isinstance(value, dict) else str(value) for value in values]
    problem = validation.problem(vr, texts)
    return f"DICOM100: {name} - {problem}" if problem else None


def _rewritten(data: bytes, *, change: dict[str, Json]) -> bytes:
    """The file with other values in it, and the service's own implementation class UID."""
    dataset = files.read(data)
    with files.quiet():
        if "00080005" in change:
            dataset.decode()
        dataset.update(pydicom.Dataset.from_json(change))
        if "file_meta" in dataset.__dict__:
            dataset.file_meta.ImplementationClassUID = pydicom.uid.UID("1.3.6.1.4.1.311.129")
        buffer = io.BytesIO()
        dataset.save_as(buffer)
    return buffer.getvalue()
