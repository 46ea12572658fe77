"""Every error of dicomcast, by how far its damage reaches and what the caller should do.

Error
├── NeedsPerson                  the process does not start, or stops: exit code 2
│   ├── Misconfigured            settings or mapping modules; lists every problem
│   ├── Incompatible             the FHIR service or the database schema is not one that we can work with
│   └── FeedWentBackwards        the change feed is not the one that we read before
├── LeaseHeld                    another worker syncs this feed: exit code 4
├── LeaseLost                    this worker may write nothing more; it drops its buffers and stands by
├── Unavailable                  a service does not answer: the pipeline pauses, nothing is skipped: exit code 3
│   ├── Denied                   a service refuses our credentials (401)
│   │   └── Forbidden            or one request alone (403)
│   └── Troubled                 one read failed (500, 502, 504, 408, timeout): the service's fault, or that read's own
├── Replan                       this attempt is void; look at both services again
│   ├── Conflict                 somebody else wrote first (409, 412, 200 to a create)
│   ├── Disagreement             a fold can't decide; reconcile can
│   └── OutcomeUnknown           a write may or may not have happened (timeout, 5xx, reset)
├── Rejected                     the FHIR service refuses the content (400, 404, 410, 422)
├── Held                         a job would delete too much: it waits for an operator
├── StudyFailed                  this study is parked with a failure row
└── InstanceFailed               this instance is parked with a failure row, its siblings go on

No message holds an attribute value: UIDs, tags, VRs, rule names, lengths and status codes only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


class Error(Exception):
    """Root of everything that dicomcast raises on purpose.

    `partial`: something of what was asked for together was done before this went wrong.
    """

    partial = False


class NeedsPerson(Error):
    """Nothing that a retry could mend."""


class Misconfigured(NeedsPerson):
    """Settings or mapping modules are wrong; `problems` lists all of them, each with its mend."""

    def __init__(self, problems: Sequence[str]):
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


class Incompatible(NeedsPerson):
    """The FHIR service lacks what we need, or the database schema is behind or ahead of this version."""


class FeedWentBackwards(NeedsPerson):
    """The change feed was reset or restored: what it calls a sequence is not what we recorded."""


class LeaseHeld(Error):
    """Another worker holds the lease of this feed."""


class LeaseLost(Error):
    """Our lease ran out or was taken over; nothing more may be written under it."""


class Unavailable(Error):
    """A service can't be used now.

    `service` is `dicom`, `fhir`, `database`, or `worker`: the one that holds the lease waits for another of them.
    `retry_after` is seconds or None.
    """

    def __init__(self, service: str, reason: str, *, retry_after: float | None = None):
        super().__init__(f"{service}: {reason}")
        self.service = service
        self.reason = reason
        self.retry_after = retry_after


class Denied(Unavailable):
    """A service answers 401 (or 403): a token, an audience or a role is wrong or not yet in force."""


class Forbidden(Denied):
    """A service answers 403: our credentials may do nothing, or not this one thing; a probe can tell."""


class Troubled(Unavailable):
    """A read got no useful answer; whether the service is down or this one request is poison, a probe can tell."""


class Replan(Error):
    """What we planned from is no longer so."""


class Conflict(Replan):
    """The FHIR resource moved under us; `referred`: or others refer to what should go (409).

    `replaced`: what a create with an id of ours has overwritten, in the FHIR client's words.
    """

    referred = False
    replaced: Sequence[Any] = ()


class Disagreement(Replan):
    """New instances contradict what the study holds, under rule `rule`; only the whole study can settle it."""

    def __init__(self, rule: str):
        super().__init__(f"rule {rule}: instances disagree")
        self.rule = rule


class OutcomeUnknown(Replan):
    """A write was sent and its answer never came, or says nothing about its effect."""


class Rejected(Error):
    """The FHIR service refuses a request; `code` is the issue code of its OperationOutcome, where it sent one."""

    def __init__(self, status: int, *, code: str | None = None):
        super().__init__(f"HTTP {status}" + (f", issue code {code}" if code else ""))
        self.status = status
        self.code = code


class Held(Error):
    """A job would take more studies out of FHIR than anybody has allowed; what is left of it waits."""

    def __init__(self, job_id: int, reason: str):
        super().__init__(reason)
        self.job_id = job_id


class _Parked(Error):
    """What a failure row is made of: `kind` (stable word), `stage`, `rule` and `tag` where there is one, a message."""

    def __init__(self, kind: str, message: str, *, stage: str, rule: str | None = None, tag: str | None = None):
        super().__init__(message)
        self.kind = kind
        self.stage = stage
        self.rule = rule
        self.tag = tag


class StudyFailed(_Parked):
    """The study can't be brought into FHIR as it is."""


class InstanceFailed(_Parked):
    """One instance can't be mapped; its siblings can."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of failure: what it is about, whether it may heal by itself (and is tried again), and what to do."""

    about: str
    heals: bool
    to_do: str


_CORRECT = "correct the attribute that `tag` names in the archive"
_LOOK = "look at the service that `stage` names (`read`: DICOM, `write`: FHIR)"

KINDS: dict[str, Kind] = {
    "patient-id-missing": Kind("instance", False, "give it a PatientID in the archive; it is then synced by itself"),
    "uid-missing": Kind("instance", False, _CORRECT),
    "uid-invalid": Kind("instance", False, _CORRECT),
    "sop-class-missing": Kind("instance", False, _CORRECT),
    "value-invalid": Kind("instance", False, _CORRECT),
    "modality-missing": Kind("instance", False, _CORRECT),
    "value-missing": Kind("instance", False, "a required rule found nothing: correct what `tag` names, or the rule"),
    "invalid": Kind(
        "instance or study",
        False,
        "the rule that `rule` names made what FHIR does not allow: correct it and replay, or correct the attributes",
    ),
    "metadata-missing": Kind(
        "instance", False, "the archive announced it but has no metadata of it: store it again, or delete it"
    ),
    "metadata-refused": Kind(
        "study", True, "the archive refuses to give its metadata (406 and the like): see to it there"
    ),
    "malformed-entry": Kind(
        "change feed entry", False, "tell whoever runs the DICOM service; `verify` its study, or `--since` before it"
    ),
    "unknown-action": Kind(
        "change feed entry", False, "tell whoever runs the DICOM service; `verify` its study, or `--since` before it"
    ),
    "partition": Kind("change feed entry", False, "another data partition's: run a worker for it, or dismiss it"),
    "patient-unknown": Kind("study", True, "policy `lookup`: create the Patient"),
    "ambiguous": Kind("study", True, "several resources carry one identifier: merge them"),
    "rejected": Kind("study", True, "the FHIR service refuses the resource; its rules may be stricter than R4's"),
    "denied": Kind("study", True, "a service answers 403 for this study alone: see to the rights on it"),
    "conflict": Kind("study", True, _LOOK),
    "server-error": Kind("study", True, _LOOK),
    "internal": Kind("study", True, "a bug: report the place that the message names"),
}
"""Every kind of failure but those that a site's own rules name (`missing` of a required rule)."""


def kind(name: str) -> Kind:
    """What is known of a kind of failure."""
    return KINDS.get(name) or Kind(
        "instance", False, "the rule that `rule` names found nothing: correct it, or the data"
    )
