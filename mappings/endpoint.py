"""Endpoint: where a viewer finds the images over DICOMweb."""

from dicomcast.mapping import Rule, Slice

RULES = (
    Rule(
        "endpoint.identifier",
        "endpoint",
        Slice("identifier", where={"system": "urn:ietf:rfc:3986"}, by="value", keys=("system", "value")),
        setting="dicom_url",
        steps=("endpoint_identifier",),
    ),
    Rule("endpoint.status", "endpoint", "status", constant="active"),
    Rule(
        "endpoint.connection_type",
        "endpoint",
        "connectionType",
        constant={"system": "http://terminology.hl7.org/CodeSystem/endpoint-connection-type", "code": "dicom-wado-rs"},
    ),
    Rule("endpoint.name", "endpoint", "name", setting="endpoint_name"),
    Rule(
        "endpoint.payload_type",
        "endpoint",
        "payloadType",
        constant=[
            {
                "coding": [{"system": "http://terminology.hl7.org/CodeSystem/endpoint-payload-type", "code": "none"}],
                "text": "DICOM WADO-RS",
            }
        ],
    ),
    Rule("endpoint.payload_mime_type", "endpoint", "payloadMimeType", constant=["application/dicom"]),
    Rule("endpoint.address", "endpoint", "address", setting="endpoint_address"),
)
