"""From what FHIR holds and what we want to the writes that are needed. Pure: no service, no clock, no database."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace

import orjson

from dicomcast import decimals, mapping
from dicomcast.decimals import Json
from dicomcast.fhir import resources
from dicomcast.fhir.resources import Held, Write

WRONG = "entered-in-error"
_FILLED = "urn:dicomcast:filled"
_LISTED = 10_000
"""Most instances that are listed: more, and services stop indexing them, or take minutes for each change."""
_MARKS = 20  # so that they fit where a server keeps 200 characters of a tag (HAPI)


@dataclass(frozen=True, slots=True)
class Naming:
    """How new resources get their ids, and whom they come from."""

    client_ids: bool
    source: str
    """`meta.source` of an ImagingStudy that we created: identity of the DICOM service."""


def endpoint(held: Held | None, *, rules: mapping.Mapping, naming: Naming) -> Write | None:
    """Our Endpoint: created, completed where it was adopted, or None where it is as we want it."""
    wanted = rules.endpoint()
    if held is None:
        tagged = {**wanted, "meta": {"tag": [resources.TAG]}}
        return _create("Endpoint", tagged, identifier=wanted["identifier"][0], naming=naming)
    write = _update(held, rules.merge(held.resource, wanted), rules)
    if write is None or resources.is_tagged(held.resource):
        return write
    meta = held.resource.get("meta") or {}  # adopted, and from now on one of ours
    tagged = {**(write.resource or {}), "meta": {**meta, "tag": [*(meta.get("tag") or ()), resources.TAG]}}
    return replace(write, resource=tagged)


def again(held: Held, *, rules: mapping.Mapping, naming: Naming) -> Write:
    """A write of our Endpoint that changes nothing where it is as we want it."""
    wanted = rules.endpoint()
    identifier = wanted["identifier"][0]
    query = resources.identifier_query(identifier["system"], identifier["value"])
    return endpoint(held, rules=rules, naming=naming) or Write("Endpoint", wanted, if_none_exist=query, creates=True)


def new_patient(wanted: Json) -> Write:
    """A Patient that nobody has yet: always created on condition, and tagged as ours."""
    identifier = wanted["identifier"][0]
    query = resources.identifier_query(identifier.get("system"), identifier["value"])
    return Write("Patient", {**wanted, "meta": {"tag": [resources.TAG]}}, if_none_exist=query, creates=True)


def patient(held: Held, wanted: Json, *, rules: mapping.Mapping) -> Write | None:
    """Demographics of a Patient that we may change; None where they are as we want them."""
    return _update(held, rules.merge(held.resource, wanted), rules)


def study(held: Held | None, wanted: Json, *, rules: mapping.Mapping, naming: Naming) -> Write | None:
    """The ImagingStudy with what we own of it as wanted, and what others put there as it is.

    The elements that our rules only fill are ours as long as they say what we wrote, and so are identifiers that are no
    longer wanted: marks in a tag tell that, whatever becomes of our database.
    """
    if held is None:
        return _create(
            "ImagingStudy", _marked(wanted, rules.fills, wanted), identifier=study_identifier(wanted), naming=naming
        )
    filled = still_filled(held.resource, rules)
    marks, identifiers = _marks(held.resource), held.resource.get("identifier") or ()
    kept = [one for one in identifiers if one in wanted["identifier"] or _hash(one) not in marks]
    merged = rules.merge({**held.resource, "identifier": kept}, wanted, fills=filled)
    others = rules.fills - filled
    more = {one for one in others if rules.same(merged, rules.merge(merged, wanted, fills=frozenset((one,))))}
    return _update(held, _marked(merged, filled | more, wanted), rules)


def listed(wanted: Json, *, instances: str) -> Json:
    """The ImagingStudy with its instances, or where it has too many (`auto`) or may have none, with their counts."""
    if instances == "all" or (instances == "auto" and wanted["numberOfInstances"] <= _LISTED):
        return wanted
    series = [{name: value for name, value in one.items() if name != "instance"} for one in wanted["series"]]
    return {**wanted, "series": series}


def lists_all(resource: Json) -> bool:
    """Whether an ImagingStudy lists every instance that it counts."""
    series = resource.get("series") or ()
    return bool(sum(len(one.get("instance") or ()) for one in series) == resource.get("numberOfInstances"))


def still_filled(resource: Json, rules: mapping.Mapping) -> frozenset[str]:
    """Of the elements that our rules only fill, those that are absent or as we left them."""
    marks = _marks(resource)
    return frozenset(one for one in rules.fills if _mark(resource, one) in (None, *marks))


def _marks(resource: Json) -> set[str]:
    tags = (resource.get("meta") or {}).get("tag") or ()
    return {mark for tag in tags if tag.get("system") == _FILLED for mark in str(tag.get("code")).split(",")}


def _marked(resource: Json, filled: Iterable[str], wanted: Json) -> Json:
    """The resource with the marks of these elements, and of all identifiers that we want, in a tag of ours."""
    meta = resource.get("meta") or {}
    tags = [tag for tag in meta.get("tag") or () if tag.get("system") != _FILLED]
    marks = [_hash(one) for one in wanted["identifier"] if one != study_identifier(wanted)]
    if marks := [*marks, *(mark for one in sorted(filled) if (mark := _mark(resource, one)) is not None)]:
        tags.append({"system": _FILLED, "code": ",".join(marks[:_MARKS])})
    rest = {name: value for name, value in meta.items() if name != "tag"} | ({"tag": tags} if tags else {})
    return {**resource, "meta": rest} if rest else resource


def _mark(resource: Json, name: str) -> str | None:
    """Eight hex digits of what an element says (`study.referrer`, `series.bodySite` of all series), or None."""
    level, _, element = name.partition(".")
    said = resource.get(element)
    if level == "series":
        parts = resource.get("series") or ()
        said = {str(part.get("uid")): part[element] for part in parts if element in part}
    if not said:
        return None
    return _hash((name, said))


def _hash(value: Json) -> str:
    return hashlib.sha256(decimals.dumps(value, option=orjson.OPT_SORT_KEYS)).hexdigest()[:8]


def observation(held: Held | None, wanted: mapping.Observed, *, rules: mapping.Mapping, naming: Naming) -> Write | None:
    """An Observation of ours: created and tagged, or with what we own of it as wanted."""
    if held is None:
        tagged = {**wanted.resource, "meta": {"tag": [resources.TAG]}}
        return _create("Observation", tagged, identifier=wanted.identifier, naming=naming)
    return _update(held, rules.merge(held.resource, wanted.resource, report=wanted.name), rules)


def ended(held: Held, *, status: str, endpoint: str | None, rules: mapping.Mapping) -> Write | None:
    """The ImagingStudy of a study that is gone, where it has to stay: no series, counts 0, `status`.

    `endpoint`: where it is no longer.
    """
    kept = {name: value for name, value in held.resource.items() if name not in ("series", "modality", "endpoint")}
    if others := [one for one in held.resource.get("endpoint") or () if one.get("reference") != endpoint]:
        kept["endpoint"] = others
    return _update(held, {**kept, "status": status, "numberOfSeries": 0, "numberOfInstances": 0}, rules)


def shared(held: Held, endpoint: str, *, there: bool) -> Write | None:
    """The ImagingStudy of another feed with our Endpoint at the end of its own, or without it."""
    others = [one for one in held.resource.get("endpoint") or () if one.get("reference") != endpoint]
    wanted = [*others, {"reference": endpoint}] if there else others
    if wanted == held.resource.get("endpoint"):
        return None
    return Write(held.type, {**held.resource, "endpoint": wanted}, id=held.id, if_match=held.version)


def delete(held: Held) -> Write:
    """Remove an ImagingStudy, or an Observation of ours."""
    return Write(held.type, None, id=held.id, if_match=held.version)


def erroneous(held: Held) -> Write:
    """An Observation of ours that should go and can't: others refer to it."""
    return Write(held.type, {**held.resource, "status": WRONG}, id=held.id, if_match=held.version)


def created_by_us(held: Held, study_uid: str, *, naming: Naming) -> bool:
    """Whether the ImagingStudy is one of ours: by the id that we would assign, or by `meta.source`.

    HAPI appends `#` and a request id to `meta.source`.
    """
    source = str((held.resource.get("meta") or {}).get("source") or "").partition("#")[0]
    return held.id == resources.assigned_id("ImagingStudy", f"urn:oid:{study_uid}") or source == naming.source


def study_identifier(resource: Json) -> Json:
    """`urn:dicom:uid`, `urn:oid:` and the Study Instance UID: the search key (FHIR R4 ImagingStudy, notes)."""
    return next(one for one in resource["identifier"] if one.get("system") == "urn:dicom:uid")


def _create(resource_type: str, wanted: Json, *, identifier: Json, naming: Naming) -> Write:
    if naming.client_ids:
        resource_id = resources.assigned_id(resource_type, identifier["value"])
        return Write(resource_type, {**wanted, "id": resource_id}, id=resource_id, creates=True)
    query = resources.identifier_query(identifier.get("system"), identifier["value"])
    return Write(resource_type, wanted, if_none_exist=query, creates=True)


def _update(held: Held, merged: Json, rules: mapping.Mapping) -> Write | None:
    if rules.same(held.resource, merged):
        return None
    return Write(held.type, merged, id=held.id, if_match=held.version)
