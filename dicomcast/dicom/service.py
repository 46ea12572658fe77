"""Client of the DICOM service: the change feed by sequence, metadata by WADO-RS, existence by QIDO-RS.

The feed is read through v1 whatever version serves the rest: only there does an offset name a sequence, so that a
position can be taken up again exactly. Its `limit` is a width of sequence numbers, not a count: a page may hold fewer
entries than that, and an empty page is not the end.
"""

import re
from collections.abc import AsyncIterator
from datetime import date, datetime

import orjson

from dicomcast import errors, wire
from dicomcast.dicom import feed, values
from dicomcast.dicom.values import DataSet, Json

PAGE = 100
"""Sequence numbers per page: the most that v1 allows."""

_SEARCHED = 200
"""Studies per page of a search: the most that the service allows."""

_SAME_PAGE = 100
"""Times that one page comes again before a search counts as one that knows no offset."""

_FEED = {"Accept": "application/json"}
_DICOM_JSON = {"Accept": "application/dicom+json"}
_SEQUENCE = re.compile(rb'"sequence"\s*:\s*([1-9][0-9]{0,17})\b', re.IGNORECASE)


class DicomService:
    """One DICOM service, or one data partition of it. Every method may raise `Unavailable` and `Denied`."""

    def __init__(self, service: wire.Service, *, version: str = "v1", partition: str | None = None):
        self._service = service
        self._root = f"/{version}" + (f"/partitions/{partition}" if partition else "")

    @property
    def requests(self) -> int:
        """HTTP requests sent so far."""
        return self._service.requests

    async def close(self) -> None:
        """Drop all connections."""
        await self._service.close()

    async def latest(self) -> feed.Entry | None:
        """The entry with the highest sequence, without metadata; None while the feed is empty (204)."""
        response = await self._read("/v1/changefeed/latest", params={"includeMetadata": "false"}, headers=_FEED)
        try:
            raw = orjson.loads(response.content) if response.content.strip() else None
            return feed.parse(raw) if raw else None
        except ValueError:
            # One spoilt entry must not stop the feed: where its sequence can be made out, reading goes up to it.
            named = _SEQUENCE.search(response.content)
            if response.content.lstrip().startswith(b"{") and named:
                failed = errors.InstanceFailed("malformed-entry", "the entry is not JSON", stage="read")
                return feed.Malformed(int(named[1]), failed)
            raise errors.Unavailable("dicom", "the newest change feed entry can't be read") from None

    async def before(self, moment: datetime, *, newest: int) -> int:
        """The sequence before the first entry recorded at `moment` or later, else `newest`; only v2 can say."""
        # Times and sequences may disagree by what was committed side by side: the lowest of a page, not the first.
        params: dict[str, str | int] = {"startTime": moment.isoformat(), "limit": 200, "includeMetadata": "false"}
        try:
            response = await self._service.read("GET", "/v2/changefeed", params=params, headers=_FEED)
        except errors.Rejected as refused:
            raise errors.Incompatible(
                f"{refused} to /v2/changefeed: without it a time can't be found in the feed"
            ) from None
        try:
            entries = feed.page(response.content)
        except ValueError:
            raise errors.Unavailable("dicom", "a change feed page can't be read") from None
        return entries[0].sequence - 1 if entries else newest

    async def answers(self) -> bool:
        """Probe: whether the service is well just now, or only one read is not."""
        try:
            await self.latest()
        except errors.Unavailable:
            return False
        return True

    async def page(self, after: int, *, width: int = PAGE, metadata: bool = True) -> list[feed.Entry]:
        """Entries of the sequences `after + 1` to `after + width`, ascending.

        A page that can't be parsed is read entry by entry. One that the service can't serve with metadata (a single
        vanished blob fails a page with 500) is read without, and its entries then have none.
        """
        params: dict[str, str | int] = {
            "offset": after,
            "limit": width,
            "includeMetadata": "true" if metadata else "false",
        }
        try:
            response = await self._read("/v1/changefeed", params=params, headers=_FEED)
        except errors.Troubled:
            if not metadata:
                raise
            return await self.page(after, width=width, metadata=False)
        content = b"[]" if response.status_code == 204 else response.content.strip()
        if not content.startswith(b"["):
            # A gateway's page or a message of the service: an outage, and no fault of any entry.
            raise errors.Unavailable("dicom", "a change feed page is not a list")
        try:
            return feed.page(content, alone=after + 1 if width == 1 else None)
        except ValueError:
            if width == 1:
                failed = errors.InstanceFailed("malformed-entry", "the entry is not JSON", stage="read")
                return [feed.Malformed(after + 1, failed)]
        singly: list[feed.Entry] = []
        for sequence in range(after + 1, after + width + 1):
            singly += await self.page(sequence - 1, width=1, metadata=metadata)
        return singly

    async def study(self, study_uid: str) -> AsyncIterator[DataSet]:
        """Metadata of every instance of a study, in no order, as it arrives.

        Raises `LookupError` where the service answers 404, before the first instance, and `StudyFailed` where it
        refuses to say (406 and the like).
        """
        path = f"{self._root}/studies/{study_uid}/metadata"
        try:
            async with self._service.stream(path, headers=_DICOM_JSON, also={404}) as (status, chunks):
                if status == 404:
                    raise LookupError(study_uid)
                if status != 204:
                    async for instance in json_array(chunks):
                        yield instance
        except errors.Rejected as refused:
            message = f"the DICOM service refuses the study's metadata: {refused}"
            raise errors.StudyFailed("metadata-refused", message, stage="read") from None

    async def lists(self, study_uid: str) -> bool:
        """Whether QIDO-RS finds the study: the second witness of a study that is gone."""
        return bool(await self._found("studies", {"StudyInstanceUID": study_uid, "limit": 1}))

    async def studies(self, *, dates: tuple[date, date] | None = None) -> AsyncIterator[list[str]]:
        """Study Instance UIDs that QIDO-RS finds, page by page, newest first; with `dates` of these days only.

        Pages overlap: studies that are deleted meanwhile move those behind them forward. From a page that shares
        nothing with the one before the search goes back until it does: none is missed, and some come twice.
        """
        days = {"StudyDate": f"{dates[0]:%Y%m%d}-{dates[1]:%Y%m%d}"} if dates else {}
        before: list[str] = []
        offset = same = 0
        while True:
            found = await self._found("studies", {**days, "limit": _SEARCHED, "offset": offset})
            page = [uid for uid in (values.uid_in(one, "0020000D") for one in found) if uid]
            # What arrives meanwhile moves the rest back: now and then a page comes twice.
            same = same + 1 if page == before else 0
            if same == _SAME_PAGE or len(page) < len(found):
                raise errors.Unavailable("dicom", "a search for studies ignores the offset, or names no UIDs")
            yield page
            if offset and set(page).isdisjoint(before):
                offset = max(0, offset - _SEARCHED // 2)
                continue
            if len(page) < 2 or (page[-1:] == before[-1:] and len(page) < len(before)):
                return
            before, offset = page, offset + len(page) - max(1, len(page) // 10)

    async def study_of(self, series_uid: str) -> str | None:
        """The study that a series belongs to, by QIDO-RS."""
        found = await self._found("series", {"SeriesInstanceUID": series_uid, "limit": 1})
        return next((uid for uid in (values.uid_in(one, "0020000D") for one in found) if uid), None)

    async def _found(self, level: str, params: dict[str, str | int]) -> list[Json]:
        response = await self._read(f"{self._root}/{level}", params=params, headers=_DICOM_JSON)
        try:
            found = orjson.loads(response.content) if response.content.strip() else []
        except orjson.JSONDecodeError:
            raise errors.Unavailable("dicom", "a search answer is not JSON") from None
        if not isinstance(found, list):
            raise errors.Unavailable("dicom", "a search answer is not a list")
        return found

    async def _read(self, path: str, *, params: dict[str, str | int], headers: dict[str, str]) -> wire.Response:
        """Nothing that we ask of a DICOM service is rightly refused: a wrong address, or a gateway in between."""
        try:
            return await self._service.read("GET", path, params=params, headers=headers)
        except (errors.Rejected, errors.Conflict) as refused:
            asked = self._service.url + path
            raise errors.Unavailable(
                "dicom", f"{refused} to {asked}; is dicom.url the address of a DICOM service?"
            ) from None


_PLAIN = rb'[^"\[\]{}]++|"(?:[^"\\]++|\\.)*+"'
_FLAT = rb"\[(?:%b)*+\]" % _PLAIN
_BRACKET = re.compile(rb"(?:%b)*+([\[\]{}])" % _PLAIN, re.DOTALL)
"""The next bracket that stands outside of strings; a string that is not complete yet gives no match."""
_DEEPER = re.compile(rb"(?:%b|%b|\{(?:%b|%b)*+\})*+([\[\]{}])" % (_PLAIN, _FLAT, _PLAIN, _FLAT), re.DOTALL)
"""The same, where arrays and objects that hold no more than arrays are passed as a whole: most of a data set."""


async def json_array(chunks: AsyncIterator[bytes]) -> AsyncIterator[DataSet]:
    """Items of a JSON array of objects with no more than one of them and a chunk in memory.

    Raises `Unavailable` where the body is cut or is something else: an empty answer would say that a study is gone.
    """
    pending, depth, begin, scanned, text_from, ended = bytearray(), 0, 0, 0, 0, False
    async for chunk in chunks:
        pending += chunk
        while bracket := (_BRACKET if depth < 2 else _DEEPER).match(pending, scanned):
            scanned = bracket.end()
            if depth < 2:
                between = bytes(pending[text_from : scanned - 1]).strip()
                fits = bracket[1] in (b"{]" if depth else b"[") and between in ((b"", b",") if depth else (b"",))
                if ended or not fits:
                    raise errors.Unavailable("dicom", "a metadata answer is not a JSON array of objects")
            if bracket[1] in b"[{":
                depth += 1
                begin = scanned - 1 if depth == 2 else begin
            else:
                depth -= 1
                ended = depth == 0
                if depth == 1:
                    yield _dataset(bytes(pending[begin:scanned]))
            text_from = scanned
        cut = begin if depth >= 2 else text_from
        del pending[:cut]
        begin, scanned, text_from = 0, scanned - cut, text_from - cut
    if not ended or pending.strip():
        raise errors.Unavailable("dicom", "a metadata answer was cut short or is not JSON")


def _dataset(text: bytes) -> DataSet:
    try:
        return DataSet.parse(text)
    except ValueError:
        raise errors.Unavailable("dicom", "a metadata answer is not JSON") from None
