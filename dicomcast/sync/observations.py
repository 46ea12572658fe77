"""The Observations that instances of a study bring with them (dose reports), beside their ImagingStudy.

They are found by `partOf` and known by our tag. Those of a report that is gone go too; what others observed is theirs.
"""

from collections.abc import Sequence

from dicomcast import mapping
from dicomcast.fhir import resources
from dicomcast.fhir.resources import Held, Write
from dicomcast.fhir.service import FhirService, Query
from dicomcast.sync import plan

_PER_SEARCH = 50


async def of_study(fhir: FhirService, held: Held | None) -> list[Held]:
    """Ours among those that are part of this ImagingStudy."""
    if held is None:
        return []
    (hits,) = await fhir.search([Query("Observation", (("part-of", held.reference), ("_count", "200")))])
    return [one for one in hits if resources.is_tagged(one.resource) and _is_part(one, held)]


async def known(fhir: FhirService, wanted: Sequence[mapping.Observed], held: Sequence[Held]) -> list[Held]:
    """`held`, and those that carry the identifier of a wanted one though they are no part of the study."""
    there = _by_identifier(held)
    identities = {(one.identifier["system"], one.identifier["value"]) for one in wanted}
    tokens = [resources.token(*identity) for identity in sorted(identities - there.keys())]
    queries = [
        Query("Observation", (("identifier", ",".join(tokens[at : at + _PER_SEARCH])), ("_count", "200")))
        for at in range(0, len(tokens), _PER_SEARCH)
    ]
    found = await fhir.search(queries) if queries else []
    return [*held, *(one for hits in found for one in hits if identities & _identities(one))]


def writes(
    wanted: Sequence[mapping.Observed], held: Sequence[Held], *, rules: mapping.Mapping, naming: plan.Naming
) -> list[Write]:
    """What makes `held` into `wanted`: creates, updates, and deletes of ours that nobody wants any more."""
    there = _by_identifier(held)
    found: list[Write | None] = []
    kept: set[str] = set()
    for one in wanted:
        before = there.get((one.identifier["system"], one.identifier["value"]))
        if before is not None:
            kept.add(before.id)
        found.append(plan.observation(before, one, rules=rules, naming=naming))
    gone = [one for one in held if one.id not in kept and resources.is_tagged(one.resource)]
    # What could not go before, because others refer to it, stays as it is.
    found += [plan.delete(one) for one in gone if one.resource.get("status") != plan.WRONG]
    return [write for write in found if write is not None]


def _is_part(one: Held, study: Held) -> bool:
    """Whether a hit really is part of the study: some servers ignore what they can't search by."""
    whole = one.resource.get("partOf")
    references = {str(each.get("reference")) for each in whole or () if isinstance(each, dict)}
    return any(text == study.reference or text.endswith(f"/{study.reference}") for text in references)


def _identities(one: Held) -> set[tuple[str, str]]:
    identifiers = one.resource.get("identifier") or ()
    return {(str(each.get("system")), str(each.get("value"))) for each in identifiers if isinstance(each, dict)}


def _by_identifier(held: Sequence[Held]) -> dict[tuple[str, str], Held]:
    return {identity: one for one in reversed(held) for identity in _identities(one)}
