"""What Microsoft's DicomCast did with a change feed, request by request, to compare with; figures as a line of JSON.

Its rule: pages of 10 entries, one entry after another. For each: a search of the Patient by identifier, of the Endpoint
by name and connection type, of the ImagingStudy by identifier; then one transaction with the whole ImagingStudy and one
instance more. The checkpoint moves once per page. Written anew from that description, for feeds of creates.

It is a lower bound of what that takes: plain JSON, few elements, no validation, no retry.
"""

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any, TypeAlias

import httpx
import measure
import orjson

Json: TypeAlias = Any

PAGE = 10  # entries
_CONNECTION = {"system": "http://terminology.hl7.org/CodeSystem/endpoint-connection-type", "code": "dicom-wado-rs"}
_JSON = {"Content-Type": "application/fhir+json", "Accept": "application/fhir+json"}


class DicomCast:
    """Both services, and how far the feed is settled."""

    def __init__(self, *, dicom: str, fhir: str, system: str, checkpoint: Path):
        self._http = httpx.Client(timeout=600)
        self._dicom = dicom
        self._fhir = fhir
        self._system = system
        self._checkpoint = checkpoint

    def catch_up(self) -> int:
        """All there is in the feed, page by page; the last sequence."""
        at = 0
        while at < self._get(f"{self._dicom}/v1/changefeed/latest")["sequence"]:
            page = self._get(f"{self._dicom}/v1/changefeed", offset=at, limit=PAGE)
            for entry in page:
                self._settle(entry["metadata"])
            at = page[-1]["sequence"] if page else at + PAGE
            self._checkpoint.write_text(str(at), encoding="utf-8")
        return at

    def _get(self, url: str, **query: str | int) -> Json:
        return orjson.loads(self._http.get(url, params=query).raise_for_status().content)

    def _search(self, kind: str, **query: str) -> Json | None:
        """The one hit, if there is one."""
        entries = self._get(f"{self._fhir}/{kind}", **query).get("entry") or [None]
        return entries[0] and entries[0]["resource"]

    def _settle(self, dataset: Json) -> None:
        patient_id, study_uid = _value(dataset, "00100020"), _value(dataset, "0020000D")
        patient = self._search("Patient", identifier=f"{self._system}|{patient_id}")
        connection = "|".join(_CONNECTION.values())
        endpoint = self._search("Endpoint", **{"name": "DICOM WADO-RS endpoint", "connection-type": connection})
        study = self._search("ImagingStudy", identifier=f"urn:dicom:uid|urn:oid:{study_uid}")
        ids = itertools.count(1)
        entries: list[Json] = []

        def reference(found: Json | None, new: Json, condition: str) -> Json:
            """Of what is there, or of what this transaction creates."""
            if found is not None:
                return {"reference": f"{found['resourceType']}/{found['id']}"}
            full_url = f"urn:uuid:00000000-0000-0000-0000-{next(ids):012}"
            request = {"method": "POST", "url": new["resourceType"], "ifNoneExist": condition}
            entries.append({"fullUrl": full_url, "resource": new, "request": request})
            return {"reference": full_url}

        whose = reference(patient, self._patient(dataset), f"identifier={self._system}|{patient_id}")
        where = reference(endpoint, self._endpoint(), f"name=DICOM WADO-RS endpoint&connection-type={connection}")
        if study is None:
            new = _with(_study(dataset, subject=whose, endpoint=where), dataset)
            reference(None, new, f"identifier=urn:dicom:uid|urn:oid:{study_uid}")
        else:
            address = f"ImagingStudy/{study['id']}"
            request = {"method": "PUT", "url": address, "ifMatch": f'W/"{study["meta"]["versionId"]}"'}
            resource = _with(study, dataset)
            entries.append({"fullUrl": f"{self._fhir}/{address}", "resource": resource, "request": request})
        bundle = orjson.dumps({"resourceType": "Bundle", "type": "transaction", "entry": entries})
        answer = self._http.post(self._fhir, content=bundle, headers=_JSON).raise_for_status()
        for one in orjson.loads(answer.content)["entry"]:
            assert one["response"]["status"].startswith("20"), one["response"]["status"]

    def _patient(self, dataset: Json) -> Json:
        family, _, given = _value(dataset, "00100010")["Alphabetic"].partition("^")
        return {
            "resourceType": "Patient",
            "identifier": [{"system": self._system, "value": _value(dataset, "00100020")}],
            "name": [{"use": "usual", "family": family, "given": given.split("^")[:1]}],
        }

    def _endpoint(self) -> Json:
        return {
            "resourceType": "Endpoint",
            "status": "active",
            "name": "DICOM WADO-RS endpoint",
            "connectionType": _CONNECTION,
            "payloadType": [{"text": "DICOM WADO-RS"}],
            "payloadMimeType": ["application/dicom"],
            "address": f"{self._dicom}/v1",
        }


def _value(dataset: Json, tag: str) -> Json:
    return dataset[tag]["Value"][0]


def _study(dataset: Json, *, subject: Json, endpoint: Json) -> Json:
    date = _value(dataset, "00080020")
    return {
        "resourceType": "ImagingStudy",
        "identifier": [{"system": "urn:dicom:uid", "value": f"urn:oid:{_value(dataset, '0020000D')}"}],
        "status": "available",
        "subject": subject,
        "started": f"{date[:4]}-{date[4:6]}-{date[6:]}",
        "endpoint": [endpoint],
        "note": [{"text": _value(dataset, "00081030")}],
        "series": [],
    }


def _with(study: Json, dataset: Json) -> Json:
    """The study and one instance more."""
    uid, modality = _value(dataset, "0020000E"), _value(dataset, "00080060")
    series = next((one for one in study["series"] if one["uid"] == uid), None)
    if series is None:
        series = {
            "uid": uid,
            "number": _value(dataset, "00200011"),
            "modality": {"system": "http://dicom.nema.org/resources/ontology/DCM", "code": modality},
            "description": _value(dataset, "0008103E"),
            "instance": [],
        }
        study["series"].append(series)
    sop_class = {"system": "urn:ietf:rfc:3986", "code": f"urn:oid:{_value(dataset, '00080016')}"}
    number = _value(dataset, "00200013")
    series["instance"].append({"uid": _value(dataset, "00080018"), "sopClass": sop_class, "number": number})
    return study


def main() -> None:
    """Run, and say what it took; imports are not timed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("settings", type=json.loads)
    options = parser.parse_args().settings
    measure.one_core()
    wall, cpu, delayed = time.perf_counter(), time.process_time(), measure.delayed()
    dicomcast = DicomCast(
        dicom=options["dicom"]["url"],
        fhir=options["fhir"]["url"],
        system=options["patient"]["system"],
        checkpoint=Path("checkpoint.txt"),
    )
    entries = dicomcast.catch_up()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    figures = {"cpu": cpu, "wall": wall, "delayed": measure.delayed() - delayed, "peak": measure.peak()}
    print(json.dumps(figures | {"report": {"entries": entries}}))


if __name__ == "__main__":
    main()
