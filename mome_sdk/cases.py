"""Which images to segment, and which files to write for each of them."""

from __future__ import annotations

import contextlib
import csv
import os
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError, SpatialImage

from mome_sdk.errors import InputError, MomeError, PreparationError
from mome_sdk.files import check_writable, make_folder, make_folders, write_file
from mome_sdk.model import Model
from mome_sdk.nifti import read_nifti
from mome_sdk.preprocess.align import Alignment
from mome_sdk.report import picture, registration_picture, report
from mome_sdk.segmentation import Segmentation
from mome_sdk.volume import Volume

# The end of an image's path in a BIDS dataset. The suffixes are those of images that show lesions;
# T1ce is a T1w with the entity ce.
_BIDS = re.compile(
    r"(?:^|/)(?P<folder>sub-[A-Za-z0-9]+/(?:ses-[A-Za-z0-9]+/)?(?:anat|dwi))/"
    r"(?P<entities>sub-[A-Za-z0-9]+(?:_[a-z]+-[A-Za-z0-9+]+)*)"
    r"_(?P<suffix>T1w|T2w|FLAIR|dwi)\.nii(?:\.gz)?$"
)
_NOT_RAW = {"derivatives", "sourcedata"}
_LIST_COLUMN = "image"


@dataclass(frozen=True)
class Case:
    """One image and the files to write for it.

    Attributes:
        name: The image as the user named it: on the command line, in a list, or below a folder.
        image: Its path.
        mask: Where its mask goes.
        probability: Where the lesion probability goes, if it is wanted; likewise the others.
        bids: Whether the files are named as those of a BIDS derivative.
    """

    name: str
    image: Path
    mask: Path
    probability: Path | None = None
    picture: Path | None = None
    report: Path | None = None
    bids: bool = False

    @property
    def outputs(self) -> dict[str, Path | None]:
        """What `--json` calls each file -> its path, None if it is not wanted."""
        return {
            "output": self.mask,
            "probability": self.probability,
            "picture": self.picture,
            "report": self.report,
        }

    @property
    def files(self) -> list[Path]:
        """The files to write."""
        return [path for path in self.outputs.values() if path is not None]

    def record(self, segmentation: Segmentation) -> dict[str, Any]:
        """What `--json` prints of the case: a result of result.schema.json."""
        files = {name: str(path) if path else None for name, path in self.outputs.items()}
        return {"input": str(self.image), **files, **segmentation.as_json()}

    def refusal(self, error: MomeError) -> dict[str, Any]:
        """What `--json` prints when the case could not be done: a refusal of the schema."""
        said = {"code": error.code, "message": error.message, "hint": error.hint}
        return {"input": str(self.image), "error": said}

    @property
    def refused(self) -> Path:
        """The picture of what a check of the registration refused."""
        return self.mask.with_name(f"{_stem(self.mask)}_refused.png")

    def save(self, segmentation: Segmentation, bundle: Model) -> None:
        """Write the files, each of them whole or not at all.

        Raises:
            InputError: `argument.output`, `argument.output-folder`: one cannot be written.
        """
        segmentation.save(self.mask)
        self.save_beside(self.image, segmentation, bundle)

    def save_beside(self, image: Path | Volume, segmentation: Segmentation, bundle: Model) -> None:
        """Write probability, picture and report of a NIfTI file or of a volume: see `save`."""
        if self.probability is not None:
            segmentation.save_probability(self.probability)
        if self.picture is not None and self.report is not None:
            scan = image if isinstance(image, Volume) else read_nifti(image)
            png = picture(scan, segmentation)
            made = segmentation.provenance["preparation"]
            placed = None
            if made is not None:
                placed = registration_picture(scan, np.array(made["to_template"]), bundle)
            page = report(segmentation, png, title=self.image.name, registration=placed)
            write_file(self.picture, png)
            write_file(self.report, page.encode("utf-8", "backslashreplace"))


def draw_refusal(error: MomeError, image: Path | Volume, path: Path, bundle: Model) -> None:
    """Draw what a check of the registration refused, and name the picture in the error.

    Nothing is drawn of other errors, or where the picture cannot be written: it is the check's
    figure that the user has to see.
    """
    if not isinstance(error, PreparationError) or not isinstance(error.attempt, Alignment):
        return
    scan = image if isinstance(image, Volume) else read_nifti(image)
    png = registration_picture(scan, error.attempt.to_template, bundle)
    with contextlib.suppress(InputError):
        make_folders(path.parent)
        write_file(path, png)
        error.hint = f"{error.hint} See {path}.".strip()


def is_collection(path: Path) -> bool:
    """Whether a path stands for many images: a folder, or a list of them (.txt, .csv)."""
    return path.is_dir() or path.suffix.lower() in (".txt", ".csv")


def is_study(path: Path) -> bool:
    """Whether a path is a zip file, or a folder with DICOM files and without NIfTI files.

    DICOM files begin with 128 bytes of anything and "DICM"; their names say nothing.
    """
    if path.is_file():
        return path.suffix.lower() == ".zip"
    files: list[Path] = []
    for folder, inner, names in os.walk(path):
        inner[:] = [name for name in inner if name[0] != "."]
        files += [Path(folder, name) for name in names if name[0] != "."]
    if any(file.name.endswith((".nii", ".nii.gz")) for file in files):
        return False
    return any(_is_dicom(file) for file in sorted(files))


def _is_dicom(path: Path) -> bool:
    with contextlib.suppress(OSError):
        if path.is_file():  # no pipe: reading one would wait for ever
            with path.open("rb") as stream:
                return stream.read(132)[128:] == b"DICM"
    return False


def named_cases(
    images: Sequence[Path], output: Path, *, probability: bool, report: bool
) -> list[Case]:
    """One image and its mask, or several and the folder of their masks; checked before any work.

    Raises:
        InputError: `argument.output`, `argument.output-folder`: a file could not be written, would
            be written twice, or is one of the images; `argument.input`, there is no such folder.
    """
    if len(images) == 1:
        if not images[0].name.endswith((".nii", ".nii.gz")) and not images[0].exists():
            raise InputError(
                "argument.input",
                f"There is no file or folder {str(images[0])!r}.",
                hint="Check its name.",
            )
        masks = [output]
    else:
        make_folder(output)
        masks = [output / f"{_stem(image)}.nii.gz" for image in images]
    cases = [
        _case(str(image), image, mask, probability=probability, report=report)
        for image, mask in zip(images, masks, strict=True)
    ]
    _check_outputs(cases)
    for case in cases:
        for path in case.files:
            check_writable(path)
    return cases


def collected_cases(source: Path, output: Path, *, probability: bool, report: bool) -> list[Case]:
    """The images of a folder or of a list, and where their masks go below `output`.

    Args:
        source: A folder, searched for .nii and .nii.gz files at any depth (hidden ones and links
            to folders are left out, and so is `output` in it). Or a list: a .txt file with a path
            in each line, or a .csv file with the column `image`; paths start from the list's
            own folder.
        output: The folder of the results.
        probability: Whether probabilities are wanted.
        report: Whether pictures and reports are wanted.

    Returns:
        A case for each image, in the order of the list, or of the paths. Masks repeat the tree
        below the folder, or below the deepest folder that holds all images of the list:
        `a/b.nii` gives `output/a/b.nii.gz`. An image whose path is that of a BIDS dataset is
        named as a derivative of one: `sub-1/anat/sub-1_T1w.nii.gz` gives
        `output/sub-1/anat/sub-1_space-T1w_desc-lesion_mask.nii.gz`.

        A folder with a `dataset_description.json`, or with BIDS images in it, is a BIDS dataset:
        only T1w, T2w and FLAIR images in `anat` and single-volume dwi images in `dwi` are taken,
        and nothing from `derivatives` and `sourcedata`.

    Raises:
        InputError: `argument.input`, folder or list cannot be read or hold no image;
            `argument.output`, a mask would be written twice, or over an image.
    """
    if source.is_dir():
        if output.exists() and output.samefile(source):
            raise InputError(
                "argument.output",
                f"The output {str(output)!r} is the folder of the scans itself.",
                hint="Name another folder; it may lie in this one.",
            )
        folder, names = source, _found(source, output)
    else:
        folder, names = source.parent, _listed(source)
    if not names:
        raise InputError(
            "argument.input",
            f"{str(source)!r} names no image to segment.",
            hint="NIfTI files (.nii, .nii.gz) are expected; in a BIDS dataset those of anat and "
            "dwi with the suffix T1w, T2w, FLAIR or dwi.",
        )
    paths = [_plain(folder / name) for name in names]
    root = _plain(source)
    if not source.is_dir():
        root = Path(os.path.commonpath([str(path.parent) for path in paths]))
    cases = []
    for name, path in zip(names, paths, strict=True):
        bids = _BIDS.search(path.as_posix())
        place = (
            Path(bids["folder"], f"{bids['entities']}_space-{bids['suffix']}_desc-lesion_mask")
            if bids
            else path.relative_to(root).with_name(_stem(path))
        )
        mask = output / place.with_name(f"{place.name}.nii.gz")
        case = _case(
            name, folder / name, mask, probability=probability, report=report, bids=bids is not None
        )
        cases.append(case)
    _check_outputs(cases)
    return cases


def _case(
    name: str, image: Path, mask: Path, *, probability: bool, report: bool, bids: bool = False
) -> Case:
    if not mask.name.endswith((".nii", ".nii.gz")):
        raise InputError(
            "argument.output",
            f"The output for one input is named {str(mask)!r}.",
            hint="A file whose name ends in .nii or .nii.gz is expected.",
        )
    base = _stem(mask)
    chance = f"{base.removesuffix('mask')}probseg" if bids else f"{base}_probability"
    return Case(
        name,
        image,
        mask,
        probability=mask.with_name(f"{chance}.nii.gz") if probability else None,
        picture=mask.with_name(f"{base}.png") if report else None,
        report=mask.with_name(f"{base}.html") if report else None,
        bids=bids,
    )


def _check_outputs(cases: Sequence[Case]) -> None:
    """Refuse files that would be written twice, or over one of the images."""
    images = {case.image.resolve() for case in cases}
    seen: dict[Path, Case] = {}
    for case in cases:
        for path in case.files:
            place = path.resolve()
            if place in seen:
                raise InputError(
                    "argument.output",
                    f"{str(path)!r} would be written for {str(seen[place].image)!r} and for "
                    f"{str(case.image)!r}.",
                    hint="Inputs with the same name need a folder each.",
                )
            if place in images:
                raise InputError(
                    "argument.output",
                    f"The output {str(path)!r} is the input image itself.",
                    hint="Scans are never overwritten: name another file or folder.",
                )
            seen[place] = case


def _found(source: Path, output: Path) -> list[str]:
    """The images below a folder, as sorted paths from there."""
    skipped = output.resolve()
    found: list[Path] = []
    for folder, inner, files in os.walk(source, onerror=_refuse_folder):
        here = Path(folder)
        inner[:] = [name for name in inner if name[0] != "." and (here / name).resolve() != skipped]
        found += [
            here / name for name in files if name.endswith((".nii", ".nii.gz")) and name[0] != "."
        ]
    raw = [path for path in found if _is_raw_bids(path, source)]
    if raw or (source / "dataset_description.json").is_file():
        found = [path for path in raw if path.parent.name == "anat" or not _is_series(path)]
    return sorted(path.relative_to(source).as_posix() for path in found)


def _refuse_folder(error: OSError) -> None:
    raise InputError(
        "argument.input",
        f"The folder {str(error.filename)!r} cannot be read: {error.strerror}.",
        hint="Name folders that you have the right to read.",
    ) from error


def _is_raw_bids(path: Path, source: Path) -> bool:
    named = _BIDS.search(_plain(path).as_posix())
    return named is not None and _NOT_RAW.isdisjoint(path.relative_to(source).parts)


def _is_series(path: Path) -> bool:
    """Whether a header announces several volumes. Of a damaged file its case will speak."""
    with contextlib.suppress(ImageFileError, HeaderDataError, OSError, EOFError, zlib.error):
        image = nib.load(path)
        return isinstance(image, SpatialImage) and len(image.shape) > 3 and image.shape[3] > 1
    return False


def _listed(source: Path) -> list[str]:
    """The paths in a list, as they stand there."""
    try:
        # Names of files are bytes; a list from a spreadsheet may begin with a mark (BOM).
        text = source.read_text("utf-8-sig", "surrogateescape")
    except OSError as error:
        raise InputError(
            "argument.input",
            f"The list {str(source)!r} cannot be read: {error.strerror}.",
            hint="A folder, a list of images (.txt, .csv) or an image is expected.",
        ) from error
    if source.suffix.lower() == ".txt":
        return [line.strip() for line in text.splitlines() if line.strip()]
    table = csv.DictReader(text.splitlines())
    if _LIST_COLUMN not in (table.fieldnames or ()):
        raise InputError(
            "argument.input",
            f"The list {str(source)!r} has the columns {', '.join(table.fieldnames or ())!r}.",
            hint=f"A column named {_LIST_COLUMN!r} with the paths of the images is expected.",
        )
    return [row[_LIST_COLUMN] for row in table if row[_LIST_COLUMN]]


def _plain(path: Path) -> Path:
    """The absolute path without `..`; links are left as they are."""
    return Path(os.path.abspath(path))  # noqa: PTH100 - Path.resolve would follow links


def _stem(path: Path) -> str:
    """The file's name without .nii or .nii.gz."""
    return path.name.removesuffix(".gz").removesuffix(".nii")
