"""FHIR resources as we hold, name and write them.

A server's copy is raw JSON: it never goes through a model class, and a decimal that somebody else wrote comes back
to the letter (`1.50` stays `1.50`).
"""

import re
import uuid
from dataclasses import dataclass
from urllib.parse import quote

from dicomcast.decimals import Json

_NAMESPACE = uuid.UUID("8f2f6e1c-6d0e-5c55-9a0b-3d1c7a4e9b10")
"""Of all ids that we assign. It must never change: a lost database finds its resources by it."""

TAG = {"system": "urn:dicomcast", "code": "created"}
"""`meta.tag` of a Patient, an Endpoint or an Observation that we created."""


@dataclass(frozen=True, slots=True)
class Held:
    """A resource as the service holds it. `version` is None where the service keeps none."""

    type: str
    id: str
    version: str | None
    resource: Json

    @property
    def reference(self) -> str:
        """`Type/id`."""
        return f"{self.type}/{self.id}"


def held(resource: Json, *, etag: str | None = None) -> Held:
    """Wrap what a read or a search returned."""
    version = version_in(etag) or (resource.get("meta") or {}).get("versionId")
    return Held(resource["resourceType"], resource["id"], version, resource)


def version_in(etag: str | None) -> str | None:
    """`3` of `W/"3"`, `"3"` or a bare `3` (HAPI's transaction responses)."""
    return re.sub(r'^W/|"', "", etag.strip()) or None if etag else None


@dataclass(frozen=True, slots=True)
class Write:
    """One create, update or delete.

    A create has an id that we assign, or `if_none_exist` (a search without `?`) and an id from the server; an update
    has `if_match`; a delete has no resource. `full_url` is what others in the same transaction refer to.
    """

    type: str
    resource: Json | None
    id: str | None = None
    if_match: str | None = None
    if_none_exist: str | None = None
    creates: bool = False

    @property
    def full_url(self) -> str:
        """`urn:uuid:` of what has no id yet; stable, so that a plan is a function of its input."""
        return f"urn:uuid:{assigned_id(self.type, self.id or self.if_none_exist or '')}"

    @property
    def reference(self) -> str:
        """What another resource of the same transaction writes to point here."""
        return f"{self.type}/{self.id}" if self.id else self.full_url


@dataclass(frozen=True, slots=True)
class Written:
    """What became of a `Write`."""

    type: str
    id: str
    version: str | None

    @property
    def reference(self) -> str:
        """`Type/id`."""
        return f"{self.type}/{self.id}"


def assigned_id(resource_type: str, identity: str) -> str:
    """The id of a resource that we create: a UUIDv5 of its type and its business identity."""
    return str(uuid.uuid5(_NAMESPACE, f"{resource_type}|{identity}"))


def token(system: str | None, value: str) -> str:
    r"""Search value `system|value`, with `\`, `|`, `,` and `$` of the value escaped (FHIR R4 search 3.1.1.4.1)."""
    escaped = re.sub(r"([\\|,$])", r"\\\1", value)
    return f"{system}|{escaped}" if system else escaped


def identifier_query(system: str | None, value: str) -> str:
    """`identifier=...`, percent-encoded: for `If-None-Exist`."""
    return f"identifier={quote(token(system, value), safe='')}"


def has_identifier(resource: Json, *, system: str | None, value: str) -> bool:
    """Whether a search hit really carries the identifier: some servers ignore what they can't search by."""
    return any(
        isinstance(one, dict) and one.get("value") == value and (system is None or one.get("system") == system)
        for one in resource.get("identifier") or ()
    )


def is_tagged(resource: Json) -> bool:
    """Whether the resource carries our `meta.tag`."""
    tags = (resource.get("meta") or {}).get("tag") or ()
    return any(tag.get("system") == TAG["system"] and tag.get("code") == TAG["code"] for tag in tags)


def pointing(resource: Json, addresses: dict[str, str]) -> Json:
    """The resource with its top-level references `urn:uuid:…` replaced by what they became."""

    def moved(value: Json) -> Json:
        if isinstance(value, list):
            return [moved(one) for one in value]
        if isinstance(value, dict) and value.get("reference") in addresses:
            return {**value, "reference": addresses[value["reference"]]}
        return value

    return {name: moved(value) for name, value in resource.items()}
