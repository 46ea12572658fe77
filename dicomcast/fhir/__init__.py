"""The FHIR side: what its resources and writes look like to us, and the client of the service."""
