"""Keeps a FHIR R4 service in step with a DICOM service."""

from importlib import metadata

__version__ = metadata.version("dicomcast")
