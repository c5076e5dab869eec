"""MR series of DICOM files in; segmentation, structured report and preview as DICOM objects out.

Nothing here opens a connection. Everything raised is a DicomError or a GeometryError.
"""

from __future__ import annotations

from importlib.util import find_spec

from mome_sdk.errors import DicomError

_MISSING = [name for name in ("pydicom", "highdicom") if find_spec(name) is None]
if _MISSING:
    raise DicomError(
        "dicom.missing",
        f"DICOM needs {' and '.join(_MISSING)}, which {'are' if _MISSING[1:] else 'is'} not "
        "installed.",
        hint='Add it: pip install "mome-sdk[dicom]".',
    )
