"""dicom2fhir on the same pages. Runs in a virtual environment of its own and knows nothing of dicomcast.

`json` hands it DICOM JSON objects, which it takes as they are. `datasets` makes pydicom data sets of them first and
then does what it does with data sets that it read from files.
"""

import argparse
import asyncio
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, TypeAlias

import measure
import orjson
from dicom2fhir import dicom2fhir
from pydicom import Dataset

Json: TypeAlias = Any


class Peer:
    """One way to feed it."""

    def __init__(self, mode: str):
        self._mode = mode
        self._building = 0.0  # CPU seconds for pydicom data sets

    def convert(self, pages: list[Path]) -> bytes:
        """The transaction bundle as JSON, with all instances in its ImagingStudy."""
        self._building = 0.0
        options = {"dicom_timezone": "UTC", "generator": {"imaging_study": {"add_instances": True}}}
        bundle = asyncio.run(dicom2fhir.from_generator(self._instances(pages), config=options))
        return bundle.model_dump_json().encode()  # type: ignore[no-any-return]

    def facts(self, converted: bytes) -> Json:
        """What came out."""
        resources = [entry["resource"] for entry in json.loads(converted)["entry"]]
        (study,) = (found for found in resources if found["resourceType"] == "ImagingStudy")
        listed = [len(series["instance"]) for series in study["series"]]
        counted = {"instances": sum(listed), "series": len(listed), "bytes": len(converted)}
        return counted | {"building": self._building}

    async def _instances(self, pages: list[Path]) -> AsyncIterator[Json]:
        for page in pages:
            for entry in orjson.loads(page.read_bytes()):
                metadata = entry["metadata"]
                if self._mode == "datasets":
                    began = time.process_time()
                    dataset = Dataset.from_json(metadata)
                    self._building += time.process_time() - began
                    metadata = dataset.to_json_dict()
                yield metadata


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("mode", choices=["json", "datasets"])
    parser.add_argument("warm", type=Path)
    parser.add_argument("pages", type=Path)
    given = parser.parse_args()
    peer = Peer(given.mode)
    measure.report(peer.convert, given.warm, given.pages, peer.facts)
