"""Faults on demand, and a log of requests, around a sandbox service.

`GET|POST|DELETE /sandbox/faults` shows, adds and clears rules; `GET|DELETE /sandbox/requests` shows and clears the log.
What is asked under `/sandbox/` is never counted and never faulted.
"""

import asyncio
import dataclasses
import re
from collections.abc import Iterable
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

Json = Any  # a JSON value

_CONTROL = re.compile(r"(?:/fhir)?/sandbox/(\w+)")
_KINDS = ("broken", "unknown-action", "garbage")


@dataclasses.dataclass(frozen=True, slots=True)
class Rule:
    """Which requests a fault meets, and what it does to them; a rule without an effect is refused with ValueError.

    The first rule that is due takes effect; the others count the request all the same.
    """

    method: str | None = None  # None is any
    path: str = ""  # a regular expression, searched for in path and query
    skip: int = 0  # the first so many matching requests pass
    every: int = 1  # of those that follow the first, then each n-th
    times: int | None = None  # how often it takes effect; None is for ever
    latency: float = 0.0  # seconds before anything else happens
    status: int | None = None  # answer with this status, and `body` as text
    retry_after: str | None = None  # the header, seconds or an HTTP date
    body: str = "fault"
    drop: bool = False  # close the connection without an answer
    when: str = "before"  # status and drop: `before` the service sees the request, or `after` it took effect
    truncate: bool = False  # cut the body in half and close the connection
    entry: str | None = (
        None  # change feed: make an entry `broken`, of an `unknown-action`, or `garbage` that is no JSON
    )
    sequence: int | None = None  # which entry; None is the first of the page

    def __post_init__(self) -> None:
        re.compile(self.path)
        for name in ("skip", "every", "times", "latency", "status", "sequence"):
            if not isinstance(getattr(self, name), int | float | None):
                raise ValueError(f"{name} must be a number")  # noqa: TRY004 - rules come in as JSON
        if self.when not in ("before", "after"):
            raise ValueError("when: before or after")
        if self.entry not in (None, *_KINDS):
            raise ValueError(f"entry: one of {', '.join(_KINDS)}")
        if self.every < 1 or self.skip < 0 or self.latency < 0:
            raise ValueError("every is at least 1, skip and latency at least 0")
        if not (self.latency or self.status or self.drop or self.truncate or self.entry):
            raise ValueError("a rule needs an effect: latency, status, drop, truncate or entry")


def parse(value: Json) -> Rule:
    """A rule from its JSON object; ValueError names what is wrong with it."""
    if not isinstance(value, dict):
        raise ValueError("a rule is a JSON object")  # noqa: TRY004
    try:
        retry_after = value.get("retry_after")
        rule = Rule(**{**value, "retry_after": None if retry_after is None else str(retry_after)})
    except (TypeError, re.error) as error:
        raise ValueError(str(error)) from error
    return rule


@dataclasses.dataclass(slots=True)
class _Count:
    rule: Rule
    seen: int = 0
    fired: int = 0

    def due(self, method: str, target: str) -> bool:
        """Whether the rule wants this request; counts it if it matches."""
        rule = self.rule
        if rule.method not in (None, method) or not re.search(rule.path, target):
            return False
        self.seen += 1
        place = self.seen - rule.skip - 1
        return place >= 0 and place % rule.every == 0 and (rule.times is None or self.fired < rule.times)


class Faults:
    """An ASGI app around another: applies the rules and keeps the log."""

    def __init__(self, app: ASGIApp, rules: Iterable[Rule] = ()):
        self._app = app
        self._counts = [_Count(rule) for rule in rules]
        self._log: list[dict[str, Json]] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        control = _CONTROL.fullmatch(scope["path"])
        if control:
            await self._control(control[1], scope, receive, send)
            return
        query = scope["query_string"].decode("latin-1")
        entry: dict[str, Json] = {"method": scope["method"], "path": scope["path"], "query": query, "status": None}
        self._log.append(entry)

        async def logged(message: Message) -> None:
            if message["type"] == "http.response.start":
                entry["status"] = message["status"]
            await send(message)

        rule = self._due(scope["method"], scope["path"] + ("?" + query if query else ""))
        if rule:
            await self._fault(rule, scope, receive, logged)
        else:
            await self._app(scope, receive, logged)

    def _due(self, method: str, target: str) -> Rule | None:
        due = [count for count in self._counts if count.due(method, target)]
        if not due:
            return None
        due[0].fired += 1
        return due[0].rule

    async def _control(self, name: str, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        if name == "faults":
            response = await self._rules(request)
        elif name == "requests":
            if request.method == "DELETE":
                self._log.clear()
            response = _json(self._log)
        else:
            await self._app(scope, receive, send)
            return
        await response(scope, receive, send)

    async def _rules(self, request: Request) -> Response:
        if request.method == "DELETE":
            self._counts.clear()
        elif request.method == "POST":
            try:
                value = orjson.loads(await request.body())
                added = [parse(one) for one in (value if isinstance(value, list) else [value])]
            except ValueError as error:
                return PlainTextResponse(str(error), 400)
            self._counts += [_Count(rule) for rule in added]
        shown = [{**dataclasses.asdict(count.rule), "seen": count.seen, "fired": count.fired} for count in self._counts]
        return _json(shown, 201 if request.method == "POST" else 200)

    async def _fault(self, rule: Rule, scope: Scope, receive: Receive, send: Send) -> None:
        if rule.latency:
            await asyncio.sleep(rule.latency)
        ends = rule.drop or rule.status is not None
        if ends and rule.when == "before":
            await _end(rule, scope, receive, send)
            return
        if not (ends or rule.truncate or rule.entry):
            await self._app(scope, receive, send)
            return
        start: Message = {}
        parts: list[bytes] = []

        async def keep(message: Message) -> None:
            if message["type"] == "http.response.start":
                start.update(message)
            else:
                parts.append(message.get("body", b""))

        await self._app(scope, receive, keep)
        if ends:
            await _end(rule, scope, receive, send)
            return
        body = b"".join(parts)
        if rule.entry:
            body = _spoiled(body, rule)
        headers = [pair for pair in start["headers"] if pair[0] != b"content-length"]
        await send({**start, "headers": [*headers, (b"content-length", str(len(body)).encode())]})
        if rule.truncate:
            await send({"type": "http.response.body", "body": body[: len(body) // 2], "more_body": True})
            await _hang_up(receive, flush=True)
        else:
            await send({"type": "http.response.body", "body": body})


async def _end(rule: Rule, scope: Scope, receive: Receive, send: Send) -> None:
    if rule.drop:
        await _hang_up(receive, flush=False)
        return
    headers = {"retry-after": rule.retry_after} if rule.retry_after is not None else None
    if rule.when == "before":
        # An answer to a half-read upload would show as a broken pipe instead of a status.
        await Request(scope, receive).body()
    await PlainTextResponse(rule.body, rule.status or 500, headers)(scope, receive, send)


async def _hang_up(receive: Receive, *, flush: bool) -> None:
    """Close the connection under the server. ASGI has no word for it; uvicorn's request cycle owns the transport."""
    transport = getattr(getattr(receive, "__self__", None), "transport", None)
    if transport is None:
        raise ConnectionAbortedError("this server does not let go of its connection")
    if flush:
        transport.close()
    else:
        transport.abort()
    while (await receive())["type"] != "http.disconnect":
        pass


def _spoiled(body: bytes, rule: Rule) -> bytes:
    """A page, or the single latest entry, with one entry spoilt; its sequence stays readable but in `garbage`."""
    try:
        page = orjson.loads(body)
    except orjson.JSONDecodeError:
        return body
    entries = page if isinstance(page, list) else [page]
    for entry in entries:
        names = {name.lower(): name for name in entry}
        if rule.sequence is None or entry.get(names.get("sequence", "")) == rule.sequence:
            break
    else:
        return body
    if rule.entry == "unknown-action":
        entry[names.get("action", "action")] = "Archive"
    elif rule.entry == "broken":
        kept = {name: entry[name] for name in entry if name.lower() in ("sequence", "action", "state", "timestamp")}
        entry.clear()
        entry.update({**kept, "studyInstanceUid": 17, "metadata": "<none>"})
    else:
        whole = orjson.dumps(page)
        part = orjson.dumps(entry)
        return whole.replace(part, part[:-1].rstrip(b"}") + b",]", 1)
    return orjson.dumps(page)


def _json(value: Json, status: int = 200) -> Response:
    return Response(orjson.dumps(value), status, media_type="application/json")
