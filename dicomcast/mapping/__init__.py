"""DICOM to FHIR by declarative rules: what instances say, as Patient, ImagingStudy and Endpoint (FHIR R4).

Pure functions over JSON: nothing is fetched or written here. A `Mapping` is loaded once and knows the rest.
"""

from dicomcast.dicom.values import Invalid, Json
from dicomcast.mapping.engine import Instance, Issue, Values
from dicomcast.mapping.loading import Mapping, load
from dicomcast.mapping.rules import Context, Report, Rule, Slice
from dicomcast.mapping.study import Built, Observed

__all__ = [
    "Built",
    "Context",
    "Instance",
    "Invalid",
    "Issue",
    "Json",
    "Mapping",
    "Observed",
    "Report",
    "Rule",
    "Slice",
    "Values",
    "load",
]
