"""The engine: one change feed entry's way from the feed to FHIR.

`intake` reads pages and hands each entry to `changes`, which gathers them by study. When a study has settled, `worker`
gives it a lane, which takes one of two `roads`: fold merges new instances into the ImagingStudy that we wrote last,
reconcile builds it from everything that the DICOM service holds. Both ask `links` who Patient and Endpoint are, and end
in `plan`, a pure function from what FHIR holds and what we want to the writes that are needed. What came of it, and how
far the feed is settled (`watermark`), goes to the `ledger`, which commits them together. `patience` waits for services.
"""
