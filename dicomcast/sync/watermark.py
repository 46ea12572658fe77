"""How far the feed is settled: the highest sequence below which nothing is under way."""

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
    _late: set[int] = field(default_factory=set)

    @property
    def low(self) -> int:
        """The watermark. Entries are read in ascending order, so the first one pending is the lowest."""
        return next(iter(self._pending)) - 1 if self._pending else self.seen

    @property
    def idle(self) -> bool:
        """Whether everything that was read is settled."""
        return not self._pending and not self._late

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

    def late(self, sequence: int) -> bool:
        """Take note of an entry that filled a gap; False if it is being dealt with already."""
        if sequence in self._late:
            return False
        self._late.add(sequence)
        return True

    def settle(self, sequence: int) -> bool:
        """An entry's effect is in FHIR, or its failure recorded; True where that closes a gap."""
        if sequence in self._late:
            self._late.remove(sequence)
            return True
        parts = self._pending[sequence] - 1
        if parts:
            self._pending[sequence] = parts
        else:
            del self._pending[sequence]
        return False
