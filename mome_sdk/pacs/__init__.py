"""The node: receives studies, segments them, and sends the results back, over DICOM and HTTP."""
