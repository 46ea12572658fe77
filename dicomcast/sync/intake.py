"""From the change feed into the buffer: pages ahead, in order, and the gaps that may fill late."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from functools import partial
from typing import TypeVar

from dicomcast import errors, mapping, settings
from dicomcast.clock import Clock
from dicomcast.dicom import feed
from dicomcast.dicom.service import PAGE, DicomService
from dicomcast.sync.changes import Buffer, StudyChange, failure_of
from dicomcast.sync.ledger import Ledger, mark_of
from dicomcast.sync.patience import Patience

_T = TypeVar("_T")

_PAGES_AHEAD = 4
_LOOK_AGAIN_EVERY = 30.0
"""Seconds between looks at gaps and at failures whose retry is due."""
_GAP_MAY_FILL = timedelta(minutes=10)
_DEFAULT_PARTITION = "Microsoft.Default"


class Intake:
    """Reads one feed. `behind`: more than a page is missing; `head`: the newest entry when it was first reached."""

    def __init__(
        self,
        dicom: DicomService,
        *,
        ledger: Ledger,
        buffer: Buffer,
        rules: mapping.Mapping,
        patience: Patience,
        clock: Clock,
        options: settings.Dicom,
        busy: Callable[[str], bool],
    ):
        self._dicom = dicom
        self._ledger = ledger
        self._buffer = buffer
        self._rules = rules
        self._patience = patience
        self._clock = clock
        self._options = options
        self._busy = busy
        self._read_to = 0
        self.behind = True
        self.head: int | None = None
        self.feed_time: datetime | None = None
        self.moved = asyncio.Event()
        """Set when there may be something to do."""

    async def take_up(self) -> None:
        """Go on where the feed was left, after making sure that it is the same feed."""
        latest = await self._dicom.latest()
        newest = latest.sequence if latest else 0
        position = self._ledger.position
        if position is None:
            start = self._options.start
            if isinstance(start, datetime):
                self._ledger.begin(await self._dicom.before(start, newest=newest))
            else:
                self._ledger.begin(newest if start == "now" else 0)
        elif position.watermark > 0:
            self._refuse_backwards(newest, position.watermark)
            if position.mark is not None:
                entries = await self._dicom.page(position.watermark - 1, width=1, metadata=False)
                marks = [mark_of(one) for one in entries if isinstance(one, feed.ChangeFeedEntry)]
                if len(marks) < len(entries):
                    raise errors.Unavailable(
                        "dicom", f"the entry {position.watermark} was read before and can't be now"
                    )
                if position.mark not in marks:
                    raise errors.FeedWentBackwards(
                        f"the change feed's entry {position.watermark} is not the one that was synced: the feed was "
                        "reset or restored; sync under a new name (dicom.feed) to start it afresh"
                    )
        self._read_to = self._ledger.watermark.seen

    async def read(self, *, once: bool) -> None:
        """Read to the head; then, unless `once`, look for more, at gaps, and at retries that are due."""
        looked = -_LOOK_AGAIN_EVERY
        while True:
            if self._clock.monotonic() - looked >= _LOOK_AGAIN_EVERY:
                looked = self._clock.monotonic()
                await self._patience.with_("dicom", self._read_gaps)
            latest = await self._patience.with_("dicom", self._dicom.latest)
            self._refuse_backwards(latest.sequence if latest else 0, self._read_to)
            self._ledger.saw(latest.sequence if latest else 0)
            if self._read_to < self._ledger.latest:
                await self._read_pages(self._ledger.latest)
                continue
            for study_uid in await self._patience.with_("database", self._ledger.due):
                if not self._busy(study_uid):
                    self.reconcile_soon(study_uid, "retry")
            self._reached_head(once=once)
            if once:
                return
            await self._patience.wait(self._options.poll)

    def reconcile_soon(self, study_uid: str, reason: str) -> StudyChange:
        """Put a study on the exact road without waiting for more of it."""
        change = self._buffer.touch(study_uid, now=self._clock.monotonic())
        change.reconcile(reason)
        change.urgent = True
        self.moved.set()
        return change

    def _refuse_backwards(self, newest: int, read: int) -> None:
        if newest < read:
            raise errors.FeedWentBackwards(
                f"the change feed ends at {newest}, but {read} was read before: it was reset or restored; "
                "sync under a new name (dicom.feed) to start it afresh"
            )

    async def _read_pages(self, latest: int) -> None:
        """Pages up to `latest`, in order, a few fetched ahead."""
        self.behind = latest - self._read_to > PAGE
        async with _ahead(self._page(after, latest) for after in range(self._read_to, latest, PAGE)) as pages:
            async for entries in pages:
                end = min(self._read_to + PAGE, latest)
                for entry in _each_once(entries):
                    if self._ledger.watermark.seen < entry.sequence <= end:
                        self._take(entry)
                self._read_to = end
                self.moved.set()
                while self._buffer.full:
                    self._buffer.room.clear()
                    await self._patience.wait(1.0, moved=self._buffer.room)

    async def _page(self, after: int, latest: int) -> list[feed.Entry]:
        page = partial(self._dicom.page, after, width=min(PAGE, latest - after))
        return await self._patience.with_("dicom", page)

    def _take(self, entry: feed.Entry) -> None:
        """One entry's way: noted, then recorded as a failure, or handed to its study."""
        moved_to = None if isinstance(entry, feed.Malformed) else feed.other_study(entry)
        if entry.sequence > self._ledger.watermark.seen:
            late = False
            self._ledger.read(entry, parts=2 if moved_to else 1)
        else:
            late = True
            self._ledger.filled(entry.sequence, parts=2 if moved_to else 1)
        if isinstance(entry, feed.Malformed) or self._elsewhere(entry):
            self._record(entry)
            return
        change = self._buffer.touch(entry.study_uid, now=self._clock.monotonic())
        change.add(entry, self._rules)
        change.feed_time = self.feed_time = feed.moment(entry) or self.feed_time
        change.entered = change.entered or change.feed_time
        if late:
            self.reconcile_soon(entry.study_uid, "late")
        if moved_to:
            self.reconcile_soon(moved_to, "UIDs changed").note(entry.sequence)

    def _elsewhere(self, entry: feed.ChangeFeedEntry) -> bool:
        return entry.partition not in (None, self._options.partition or _DEFAULT_PARTITION)

    def _record(self, entry: feed.Entry) -> None:
        """A malformed entry, or another partition's: a failure and no more."""
        if isinstance(entry, feed.Malformed):
            failed = entry.error
        else:
            message = "the entry belongs to a data partition that this worker does not read (dicom.partition)"
            failed = errors.InstanceFailed("partition", message, stage="read")
        key = (entry.series_uid, entry.sop_uid)
        failure = failure_of(failed, study_uid=entry.study_uid, key=key, sequence=entry.sequence)
        self._ledger.fail(failure, sequence=entry.sequence)

    async def _read_gaps(self) -> None:
        """Look again for sequences that were skipped: the service may commit them late.

        However long ago one was missed, it is given up only after one more look: a `sync` may come once a day.
        """
        now = self._clock.now()
        gaps = await self._ledger.gaps()
        wanted = [sequence for sequence in gaps if not self._ledger.watermark.is_late(sequence)]
        missed = set(wanted)
        while wanted:
            window = [sequence for sequence in wanted if sequence < wanted[0] + PAGE]
            wanted = wanted[len(window) :]
            width = window[-1] - window[0] + 1
            for entry in await self._dicom.page(window[0] - 1, width=width, metadata=False):
                if entry.sequence in missed:
                    missed.discard(entry.sequence)
                    for whole in await self._dicom.page(entry.sequence - 1, width=1):
                        self._take(whole)
        self._ledger.give_up_on(sequence for sequence in missed if now - gaps[sequence] > _GAP_MAY_FILL)

    def _reached_head(self, *, once: bool) -> None:
        """Whatever was gathered while catching up is written now."""
        if self.behind or once:
            for change in self._buffer:
                change.urgent = True
        self.behind = False
        self.head = self._ledger.latest if self.head is None else self.head
        self.moved.set()


def _each_once(entries: list[feed.Entry]) -> Iterator[feed.Entry]:
    """The entries, of which the list keeps none: what was read of one is gone before the next."""
    entries.reverse()
    while entries:
        yield entries.pop()


@asynccontextmanager
async def _ahead(fetches: Iterable[Awaitable[_T]]) -> AsyncIterator[AsyncIterator[_T]]:
    """The results of `fetches` in order, with a few under way beyond the one that is awaited."""
    coming = iter(fetches)
    tasks: deque[asyncio.Future[_T]] = deque()

    async def results() -> AsyncIterator[_T]:
        while True:
            for fetch in coming:
                tasks.append(asyncio.ensure_future(fetch))
                if len(tasks) == _PAGES_AHEAD:
                    break
            if not tasks:
                return
            yield await tasks[0]
            tasks.popleft()

    try:
        yield results()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
