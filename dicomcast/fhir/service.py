"""Client of the FHIR service: what it can do, search by identifier, read, and writes that happen together.

Server behaviour that shows here: HAPI answers 409 where others answer 412, writes a bare version number into a
transaction's `etag`, lists no `batch` and no `updateCreate` though it has both, and reuses search results for a
minute unless told `no-cache`; Azure refuses strong ETags. References: Azure `microsoft/fhir-server`, HAPI 8.8.
"""

from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlencode, urlsplit, urlunsplit

import orjson

from dicomcast import decimals, errors, wire
from dicomcast.decimals import Json
from dicomcast.fhir import resources
from dicomcast.fhir.resources import Held, Write, Written

_JSON = "application/fhir+json"
_READ = {"Accept": _JSON, "Cache-Control": "no-cache"}
_WRITE = {"Accept": _JSON, "Content-Type": _JSON, "Prefer": "return=minimal"}
_PAGES = 50
"""Most pages of one search that are followed: no identifier has so many hits."""


@dataclass(frozen=True, slots=True)
class Capability:
    """What the service says of itself that changes what we do."""

    software: str
    transaction: bool
    batch: bool
    client_ids: bool


@dataclass(frozen=True, slots=True)
class Query:
    """A search of one type. `optional`: a service that can't answer it counts as having nothing."""

    type: str
    parameters: tuple[tuple[str, str], ...]
    optional: bool = False


def by_identifier(resource_type: str, system: str | None, value: str) -> Query:
    """All resources with this identifier."""
    return Query(resource_type, (("identifier", resources.token(system, value)),))


def by_identifiers(
    resource_type: str, identities: Iterable[tuple[str | None, str]], *, elements: str | None = None
) -> Query:
    """All resources with one of these identifiers, or no more than some `elements` of them.

    HAPI 8.8 gives whole resources all the same where such a search is part of a batch: it is always sent alone.
    """
    tokens = ",".join(resources.token(*identity) for identity in identities)
    only = (("_elements", elements),) if elements else ()
    return Query(resource_type, (("identifier", tokens), *only, ("_count", "100")))


class FhirService:
    """One FHIR R4 service. Every method may raise `Unavailable` and `Denied`."""

    def __init__(self, service: wire.Service, *, ids: Literal["auto", "client", "server"] = "auto"):
        self._service = service
        self._ids = ids
        self._can: Capability | None = None
        self.may_write: Callable[[], None] = lambda: None
        """Asked at the last moment before anything is written; raises where it may not."""
        self._batch_refused = False

    @property
    def requests(self) -> int:
        """HTTP requests sent so far."""
        return self._service.requests

    @property
    def parallel(self) -> int:
        """Requests that may be under way at once, at present."""
        return self._service.parallel

    async def close(self) -> None:
        """Drop all connections."""
        await self._service.close()

    async def capability(self) -> Capability:
        """Read `/metadata` once. Raises `Incompatible` for what is no FHIR R4 service."""
        if self._can is None:
            self._can = self._understood(await self._statement())
        return self._can

    async def answers(self) -> bool:
        """Probe: whether the service is well just now, or only one write is not."""
        try:
            await self._statement()
        except (errors.Unavailable, errors.Incompatible):
            return False
        return True

    async def search(self, queries: Sequence[Query]) -> list[list[Held]]:
        """Hits of each query: one batch where the service has it, else a request each."""
        can = await self.capability()
        together = [query for query in queries if "_elements" not in dict(query.parameters)]
        found: dict[Query, list[Held]] = {}
        if len(together) > 1 and can.batch and not self._batch_refused:
            try:
                found = dict(zip(together, await self._search_together(together), strict=True))
            except errors.Rejected:
                self._batch_refused = True
            except errors.Troubled:
                pass  # it may work one by one, and in a batch the next time
        return [found[query] if query in found else await self._search_alone(query) for query in queries]

    async def each(self, query: Query) -> AsyncGenerator[list[Held], None]:
        """Hits of a search however many they are, page by page. Raises `Conflict` where its pages expire meanwhile."""
        path = f"/{query.type}?{urlencode(query.parameters)}"
        response = await self._service.read("GET", path, headers=_READ)
        async for page in self._pages(query, _json(response.content)):
            yield page

    async def read(self, resource_type: str, resource_id: str) -> Held | None:
        """The present version; None where it never was (404) or is deleted (410)."""
        response = await self._service.read("GET", f"/{resource_type}/{resource_id}", headers=_READ, also={404, 410})
        if response.status_code in (404, 410):
            return None
        return resources.held(_json(response.content), etag=response.headers.get("etag"))

    async def restore(self, replaced: Written) -> None:
        """Put back what a create has overwritten, as far as the service keeps versions; nobody has to know why."""
        if replaced.version is None or not replaced.version.isdigit():
            return
        path = f"/{replaced.type}/{replaced.id}/_history/{int(replaced.version) - 1}"
        try:
            response = await self._service.read("GET", path, headers=_READ, also={404, 410})
            if response.status_code == 200:
                content = {**_json(response.content), "id": replaced.id}
                await self.write([Write(replaced.type, content, id=replaced.id, if_match=replaced.version)])
        except (errors.Rejected, errors.Conflict):
            pass

    async def write(self, writes: Sequence[Write]) -> list[Written | None]:
        """Do all of them or none: one plain interaction, else a transaction.

        A service without transactions gets them one by one, in order. A delete gives None. Raises `Conflict` (also
        where a create found somebody there), `Rejected` and `OutcomeUnknown`.
        """
        can = await self.capability()
        if len(writes) > 1 and can.transaction:
            return await self._transaction(writes)
        written: list[Written | None] = []
        addresses: dict[str, str] = {}
        for write in writes:
            try:
                done = await self._interaction(write, addresses)
            except errors.Error as failure:
                failure.partial = failure.partial or bool(written)
                raise
            if done is not None:
                addresses[write.full_url] = done.reference
            written.append(done)
        return written

    async def _write(self, method: str, path: str, **request: Any) -> wire.Response:
        return await self._service.write(method, path, ready=self.may_write, **request)

    async def _statement(self) -> Json:
        try:
            response = await self._service.read("GET", "/metadata", headers=_READ)
        except errors.Conflict as refused:
            raise errors.Unavailable("fhir", str(refused)) from None
        except errors.Rejected as refused:
            raise errors.Incompatible(
                f"{self._service.url}/metadata: {refused}; is fhir.url the base URL of a FHIR R4 service?"
            ) from None
        return _json(response.content)

    def _understood(self, statement: Json) -> Capability:
        version = str(statement.get("fhirVersion") or "")
        if statement.get("resourceType") != "CapabilityStatement" or not version.startswith(("4.0", "4.3")):
            raise errors.Incompatible(
                f"{self._service.url}/metadata: FHIR {version or 'of no version'}; dicomcast writes R4 (4.0.1)"
            )
        rest: Json = next((one for one in statement.get("rest") or () if one.get("mode") != "client"), {})
        system = {one.get("code") for one in rest.get("interaction") or ()}
        software = str((statement.get("software") or {}).get("name") or "")
        studies: Json = next((one for one in rest.get("resource") or () if one.get("type") == "ImagingStudy"), {})
        update_create = studies.get("updateCreate")
        said = bool(update_create) if update_create is not None else "hapi" in software.lower()
        return Capability(
            software=software,
            transaction="transaction" in system,
            batch=bool(system & {"batch", "transaction"}),
            client_ids={"auto": said, "client": True, "server": False}[self._ids],
        )

    async def _search_together(self, queries: Sequence[Query]) -> list[list[Held]]:
        entries = [
            {"request": {"method": "GET", "url": f"{query.type}?{urlencode(query.parameters)}"}} for query in queries
        ]
        content = decimals.dumps({"resourceType": "Bundle", "type": "batch", "entry": entries})
        response = await self._service.read("POST", "", headers={**_READ, "Content-Type": _JSON}, content=content)
        answers = _json(response.content).get("entry") or []
        try:
            statuses = [_status(answer) for _, answer in zip(queries, answers, strict=True)]
        except (ValueError, LookupError, TypeError):
            raise errors.Rejected(response.status_code) from None
        found = []
        for query, answer, status in zip(queries, answers, statuses, strict=True):
            if status < 300:
                found.append(await self._hits(query, answer.get("resource") or {}))
            elif query.optional:
                found.append([])
            else:
                raise wire.error_of("fhir", status, write=False)
        return found

    async def _search_alone(self, query: Query) -> list[Held]:
        content = urlencode(query.parameters).encode()
        headers = {**_READ, "Content-Type": "application/x-www-form-urlencoded"}
        try:
            response = await self._service.read("POST", f"/{query.type}/_search", headers=headers, content=content)
        except errors.Rejected:
            if query.optional:
                return []
            response = await self._service.read("GET", f"/{query.type}?{content.decode()}", headers=_READ)
        return await self._hits(query, _json(response.content))

    async def _hits(self, query: Query, bundle: Json) -> list[Held]:
        """All pages of a searchset, each resource once."""
        hits: dict[str, Held] = {}
        left = _PAGES
        async with aclosing(self._pages(query, bundle)) as pages:
            async for page in pages:
                hits |= {one.id: one for one in page}
                left -= 1
                if not left:
                    break
        return list(hits.values())

    async def _pages(self, query: Query, bundle: Json) -> AsyncGenerator[list[Held], None]:
        """What a searchset holds of the type that was asked for, page by page."""
        while True:
            found = (entry.get("resource") or {} for entry in bundle.get("entry") or ())
            yield [
                resources.held(one)
                for one in found
                if one.get("resourceType") == query.type and isinstance(one.get("id"), str)
            ]
            following = [link.get("url") for link in bundle.get("link") or () if link.get("relation") == "next"]
            if not following:
                return
            try:
                response = await self._service.read("GET", self._ours(following[0]), headers=_READ)
            except errors.Rejected:
                raise errors.Conflict("fhir: the pages of a search are gone") from None
            bundle = _json(response.content)

    def _ours(self, url: str) -> str:
        """A link of the service under the address that we use: behind a gateway it names itself otherwise."""
        there, here = urlsplit(url), urlsplit(self._service.url)
        return urlunsplit((here.scheme, here.netloc, there.path or here.path, there.query, ""))

    async def _transaction(self, writes: Sequence[Write]) -> list[Written | None]:
        bundle = {
            "resourceType": "Bundle",
            "type": "transaction",
            "entry": [_entry(self._service.url, one) for one in writes],
        }
        response = await self._write("POST", "", headers=_WRITE, content=decimals.dumps(bundle))
        written, conflicts = [], []
        try:
            for write, answer in zip(writes, _report(response.content)["entry"], strict=True):
                try:
                    written.append(_written(write, _status(answer), answer["response"], answer.get("resource")))
                except errors.Conflict as conflict:
                    conflicts.append(conflict)
        except (ValueError, LookupError, TypeError):
            raise errors.OutcomeUnknown("fhir: the transaction's answer can't be read") from None
        if conflicts:
            conflicts[0].replaced = [one for conflict in conflicts for one in conflict.replaced]
            raise conflicts[0]
        return written

    async def _interaction(self, write: Write, addresses: dict[str, str]) -> Written | None:
        headers = dict(_WRITE)
        if write.if_match:
            headers["If-Match"] = f'W/"{write.if_match}"'
        if write.resource is None:
            try:
                await self._write("DELETE", f"/{write.type}/{write.id}", headers=headers)
            except errors.Rejected as refused:
                if refused.status not in (404, 410):
                    raise
            return None
        content = decimals.dumps(resources.pointing(write.resource, addresses))
        if write.id is None:
            headers["If-None-Exist"] = write.if_none_exist or ""
            response = await self._write("POST", f"/{write.type}", headers=headers, content=content)
        else:
            response = await self._write("PUT", f"/{write.type}/{write.id}", headers=headers, content=content)
        return _written(write, response.status_code, response.headers, _report(response.content))


def _entry(base: str, write: Write) -> Json:
    """A transaction entry. Every write has a fullUrl: HAPI's validation asks for it."""
    if write.id is None:
        request = {"method": "POST", "url": write.type, "ifNoneExist": write.if_none_exist}
        return {"fullUrl": write.full_url, "resource": write.resource, "request": request}
    request = {"method": "PUT" if write.resource is not None else "DELETE", "url": f"{write.type}/{write.id}"}
    if write.if_match:
        request["ifMatch"] = f'W/"{write.if_match}"'
    if write.resource is None:
        return {"request": request}
    return {"fullUrl": f"{base}/{write.type}/{write.id}", "resource": write.resource, "request": request}


def _status(answer: Json) -> int:
    return int(str(answer["response"]["status"])[:3])


def _written(write: Write, status: int, headers: Mapping[str, str], body: Json) -> Written | None:
    """Check one answer, `headers` of a transaction's entry or of HTTP. 200 to a create: somebody was there first."""
    if status >= 300:
        raise wire.error_of("fhir", status, write=True)
    if write.resource is None:
        return None
    body = body or {}
    location = headers.get("location") or headers.get("content-location") or ""
    path = location.partition("?")[0].split("/")
    history = path.index("_history") if "_history" in path else len(path)
    written_id = write.id or (path[history - 1] if location else None) or body.get("id")
    if not written_id:
        raise errors.OutcomeUnknown("fhir: a create was answered without an id")
    version = resources.version_in(headers.get("etag")) or (body.get("meta") or {}).get("versionId")
    done = Written(write.type, written_id, version or (path[history + 1] if history + 1 < len(path) else None))
    if write.creates and status != 201:
        conflict = errors.Conflict("fhir: somebody created it first")
        conflict.partial, conflict.replaced = True, [done] if write.id else []
        raise conflict
    return done


def _json(content: bytes) -> Json:
    try:
        value = decimals.loads(content)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise errors.Unavailable("fhir", "an answer is not a FHIR resource")
    return value


def _report(content: bytes) -> Json:
    """What a write was answered with: nothing of it is ever written back."""
    try:
        value = orjson.loads(content)
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {}
