"""The SNOMED CT, DCM and UCUM concepts of the results, and the colours of segments."""

from __future__ import annotations

from highdicom.color import CIELabColor
from pydicom.sr.coding import Code

# PS3.16 CID 7150 (category), CID 7159 (type), CID 4 (region).
ABNORMAL_STRUCTURE = Code("49755003", "SCT", "Morphologically Abnormal Structure")
LESION = Code("52988006", "SCT", "Lesion")
BRAIN = Code("12738006", "SCT", "Brain")
# CID 7162, algorithm family.
ARTIFICIAL_INTELLIGENCE = Code("123110", "DCM", "Artificial Intelligence")
# The SR: what was measured, in which unit, how it was derived, and in which procedure (CID 100).
VOLUME = Code("118565006", "SCT", "Volume")
LESION_COUNT = Code("246206008", "SCT", "Number of lesions")
MILLILITRE = Code("mL", "UCUM", "milliliter")
NO_UNITS = Code("1", "UCUM", "no units")
TOTAL = Code("255619001", "SCT", "Total")
MR_HEAD = Code("241601008", "SCT", "MRI of head")
DEVICE = Code("121007", "DCM", "Device")

# Recommended Display CIELab Value: neighbours in the list are easy to tell apart on grey.
_COLOURS = (
    *((65.0, 58.0, 52.0), (78.0, -46.0, 40.0), (62.0, -4.0, -50.0), (90.0, -8.0, 82.0)),
    *((60.0, 68.0, -36.0), (80.0, -42.0, -14.0), (72.0, 32.0, 66.0), (55.0, 30.0, -66.0)),
)


def colour(number: int) -> CIELabColor:
    """The colour of segment `number`, from 1."""
    return CIELabColor(*_COLOURS[(number - 1) % len(_COLOURS)])
