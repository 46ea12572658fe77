"""How far the feed is settled: the highest sequence below which nothing is under way."""

from collections.abc import Collection
from dataclasses import dataclass, field

_EDGE = 50
"""Of a gap wider than twice this, only so many numbers at each end may still come: identity jumps skip thousands."""


@dataclass(slots=True)
class Watermark:
    """Sequences that were read and are not settled yet.

    `seen` is the highest entry read; what is missing below it may be committed late by the DICOM service, and is the
    caller's to look for again (`late`).
    """

    seen: int
    _pending: dict[int, int] = field(default_factory=dict)
    _late: dict[int, int] = field(default_factory=dict)

    @property
    def low(self) -> int:
        """The watermark. Entries are read in ascending order, so the first one pending is the lowest."""
        return next(iter(self._pending)) - 1 if self._pending else self.seen

    def may_be_low(self, sequence: int) -> bool:
        """Whether an entry that was read is, or may become, the one at the watermark."""
        return sequence == self.seen or sequence in self._pending or sequence + 1 in self._pending

    def idle(self, *, but: Collection[int] = (), up_to: int | None = None) -> bool:
        """Whether everything that was read (up to a sequence) is settled, `but` some."""
        pending = (sequence for sequence in self._pending if up_to is None or sequence <= up_to)
        return all(sequence in but for sequence in (*pending, *self._late))

    def read(self, sequence: int, *, parts: int = 1) -> list[int]:
        """Take note of an entry above all others; the sequences skipped before it that may still come.

        `parts`: how many studies must settle it.
        """
        skipped = range(self.seen + 1, sequence)
        self.seen = sequence
        self._pending[sequence] = parts
        if len(skipped) > 2 * _EDGE:
            return [*skipped[:_EDGE], *skipped[-_EDGE:]]
        return list(skipped)

    def late(self, sequence: int, *, parts: int = 1) -> None:
        """Take note of an entry that filled a gap."""
        self._late[sequence] = parts

    def is_late(self, sequence: int) -> bool:
        """Whether a gap was filled by an entry that is being dealt with."""
        return sequence in self._late

    def settle(self, sequence: int) -> bool:
        """An entry's effect is in FHIR, or its failure recorded; True where that closes a gap."""
        under_way = self._late if sequence in self._late else self._pending
        under_way[sequence] -= 1
        if under_way[sequence] == 0:
            del under_way[sequence]
            return under_way is self._late
        return False
