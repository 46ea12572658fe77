"""The DICOM side: the change feed, the metadata of studies, and readers for DICOM JSON and DICOM files."""
