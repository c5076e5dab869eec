"""One DICOM study: read, choose a series, and turn what was found in it into files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mome_sdk.cases import Case
from mome_sdk.dicom.capture import make_capture
from mome_sdk.dicom.classify import Rules, choose, load_rules
from mome_sdk.dicom.objects import encoded
from mome_sdk.dicom.report import make_report
from mome_sdk.dicom.sandbox import Limits
from mome_sdk.dicom.seg import Segments, make_seg
from mome_sdk.dicom.series import Series, checked_series, open_study
from mome_sdk.errors import InputError
from mome_sdk.files import check_writable, make_folder, remove_file, write_file
from mome_sdk.model import Model
from mome_sdk.report import picture
from mome_sdk.segmentation import Segmentation
from mome_sdk.volume import Volume

_STEM = "lesions"


@dataclass(frozen=True, eq=False)
class Chosen:
    """The series of a study to segment.

    Attributes:
        series: Slices in order.
        volume: Their voxels, (I, J, K) on the grid of the series.
        considered: A line about every series of the study: what it is, or why it is not used.
    """

    series: Series
    volume: Volume
    considered: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """What `--json` says of the series; see result.schema.json."""
        return {
            "label": self.series.label,
            "modality": self.series.modality,
            "slices": len(self.series.frames),
            "reasons": list(self.series.reasons),
            "considered": list(self.considered),
        }


@dataclass(frozen=True)
class StudyCase(Case):
    """A DICOM folder or zip file and the files to write for it.

    Attributes:
        nifti: Whether the mask is wanted as a NIfTI file.
        seg, sr, sc: Where the DICOM objects go; None for those that are not wanted.
        segments: See `make_seg`.
        empty_seg: Whether a SEG is written where nothing was found.
    """

    nifti: bool = True
    seg: Path | None = None
    sr: Path | None = None
    sc: Path | None = None
    segments: Segments = "lesion"
    empty_seg: bool = False

    @property
    def outputs(self) -> dict[str, Path | None]:
        """As of a Case; and the DICOM objects."""
        mask = {"output": self.mask if self.nifti else None}
        return {**super().outputs, **mask, "seg": self.seg, "sr": self.sr, "sc": self.sc}

    def save_study(self, chosen: Chosen, segmentation: Segmentation, bundle: Model) -> StudyCase:
        """Write the files, each of them whole or not at all; the DICOM objects first.

        Returns:
            The case without the SEG, where nothing was found and no empty one is wanted. A SEG
            that an earlier run left there is removed then.

        Raises:
            DicomError: `dicom.build`, the series' headers do not allow an object.
            InputError: `argument.output`, a file cannot be written.
        """
        paths = {"seg": self.seg, "sr": self.sr, "sc": self.sc}
        made = results(
            chosen,
            segmentation,
            [name for name, path in paths.items() if path is not None],
            segments=self.segments,
            empty_seg=self.empty_seg,
        )
        for name, data in made.items():
            path = paths[name]
            assert path is not None
            write_file(path, data)
        if self.nifti:
            segmentation.save(self.mask)
        self.save_beside(chosen.volume, segmentation, bundle)
        if self.seg is None or "seg" in made:
            return self
        remove_file(self.seg)
        return replace(self, seg=None)


def read_study(
    source: Path | Sequence[Path],
    wanted: str = "auto",
    *,
    rules: Rules | None = None,
    limits: Limits | None = None,
) -> Chosen:
    """Choose a series of a study and read it.

    Args:
        source: A folder, a zip file, or the files of the study.
        wanted: "t1", "t1ce", "t2", "flair", "dwi", or "auto" for the first that is there in the
            order of the rules.
        rules: What decides; the built-in ones if not given.
        limits: What the files may ask for.

    Raises:
        DicomError: `dicom.*`: nothing usable is there, or a file is damaged or hostile.
        GeometryError: `dicom.slice-*`: the slices of the chosen series are no whole, even stack.
            No other series is taken instead.
    """
    with open_study(source, limits=limits) as study:
        choice = choose(study.stacks, wanted, rules or load_rules())
        series = checked_series(choice.stack, modality=choice.modality, reasons=choice.reasons)
        lines = tuple(verdict.line for verdict in choice.verdicts)
        return Chosen(series, study.volume(series), lines)


def results(
    chosen: Chosen,
    segmentation: Segmentation,
    formats: Sequence[str],
    *,
    segments: Segments = "lesion",
    empty_seg: bool = False,
) -> dict[str, bytes]:
    """The DICOM objects of a result, as the bytes of files.

    Args:
        chosen: What was segmented.
        segmentation: What was found.
        formats: Of "seg", "sr" and "sc" those that are wanted. With both, the SR refers to the SEG.
        segments: See `make_seg`.
        empty_seg: Whether a SEG is made of an empty mask; an SR always is, with a count of 0.

    Returns:
        Format -> bytes. The same arguments give the same bytes.
    """
    series = chosen.series
    made: dict[str, bytes] = {}
    seg = None
    if "seg" in formats and (empty_seg or np.any(segmentation.mask)):
        seg = make_seg(series, segmentation, segments=segments)
        made["seg"] = encoded(seg)
    if "sr" in formats:
        made["sr"] = encoded(make_report(series, segmentation, seg=seg, segments=segments))
    if "sc" in formats:
        png = picture(chosen.volume, segmentation)
        made["sc"] = encoded(make_capture(series, segmentation, png))
    return made


def study_case(
    source: Path,
    output: Path,
    *,
    formats: Sequence[str],
    segments: Segments = "lesion",
    empty_seg: bool = False,
    probability: bool = False,
    report: bool = False,
) -> StudyCase:
    """The files to write for a study; checked before any work.

    Args:
        source: The DICOM folder or zip file.
        output: A folder, made if need be; or, for the format "nifti" alone, the mask's file.
        formats: Of "nifti", "seg", "sr" and "sc".
        segments, empty_seg: As of StudyCase.
        probability, report: Whether these are wanted, too.

    Raises:
        InputError: `argument.output`, `argument.output-folder`: a file could not be written.
    """
    single = output.name.endswith((".nii", ".nii.gz"))
    if (single and set(formats) != {"nifti"}) or output.suffix == ".dcm":
        raise InputError(
            "argument.output",
            f"The output is named {str(output)!r}, with the format {','.join(formats)}.",
            hint="Name a folder: NIfTI alone can go to a file whose name ends in .nii or .nii.gz.",
        )
    if not single:
        make_folder(output)
    mask = output if single else output / f"{_STEM}.nii.gz"
    base = mask.name.removesuffix(".gz").removesuffix(".nii")
    objects = {name: mask.with_name(f"{base}_{name}.dcm") for name in ("seg", "sr", "sc")}
    case = StudyCase(
        str(source),
        source,
        mask,
        probability=mask.with_name(f"{base}_probability.nii.gz") if probability else None,
        picture=mask.with_name(f"{base}.png") if report else None,
        report=mask.with_name(f"{base}.html") if report else None,
        nifti="nifti" in formats,
        segments=segments,
        empty_seg=empty_seg,
        seg=objects["seg"] if "seg" in formats else None,
        sr=objects["sr"] if "sr" in formats else None,
        sc=objects["sc"] if "sc" in formats else None,
    )
    for path in case.files:
        check_writable(path)
    return case
