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
    return [one for one in hits if resources.is_tagged(one.resource)]


async def known(fhir: FhirService, wanted: Sequence[mapping.Observed], held: Sequence[Held]) -> list[Held]:
    """`held`, and those that carry the identifier of a wanted one though they are no part of the study."""
    there = {(one["system"], one["value"]) for each in held for one in each.resource.get("identifier") or ()}
    tokens = [
        resources.token(one.identifier["system"], one.identifier["value"])
        for one in wanted
        if (one.identifier["system"], one.identifier["value"]) not in there
    ]
    queries = [
        Query("Observation", (("identifier", ",".join(tokens[at : at + _PER_SEARCH])), ("_count", "200")))
        for at in range(0, len(tokens), _PER_SEARCH)
    ]
    found = await fhir.search(queries) if queries else []
    return [*held, *(one for hits in found for one in hits)]


def writes(
    wanted: Sequence[mapping.Observed], held: Sequence[Held], *, rules: mapping.Mapping, naming: plan.Naming
) -> list[Write]:
    """What makes `held` into `wanted`: creates, updates, and deletes of ours that nobody wants any more."""
    found: list[Write | None] = []
    kept: set[str] = set()
    for one in wanted:
        same = {"system": one.identifier["system"], "value": one.identifier["value"]}
        before = next((each for each in held if resources.has_identifier(each.resource, **same)), None)
        if before is not None:
            kept.add(before.id)
        found.append(plan.observation(before, one, rules=rules, naming=naming))
    gone = [plan.delete(one) for one in held if one.id not in kept and resources.is_tagged(one.resource)]
    return [*(write for write in found if write is not None), *gone]
