"""Public data sets, as they are downloaded, to rows of a case table.

Every reader finds the images and masks of one layout, writes each mask with 0 and 1 alone into a
folder of its own, and names the modality from where the layout says it. Subjects are then split.
Nothing is registered here: `space = "native"` of a configuration does that.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from mome_sdk.errors import InputError
from mome_sdk.files import make_folders
from mome_sdk.nifti import read_nifti, write_nifti
from mome_sdk.volume import Volume

from .dataset import Scan

# Tokens of the authors' file names (before "_to_MNI152"), and of BraTS.
TOKENS = {"t1": "T1", "t1ce": "T1ce", "t2": "T2", "flair": "FLAIR", "dwi": "DWI"}


class Found(NamedTuple):
    """An image and its mask in a download.

    Attributes:
        image, label: Files.
        modality, subject, split: As of a case table; a split that is not given is drawn.
        lesion: The mask's values that are the lesion; all but 0 if none is named.
        session: What tells a subject's visits apart.
    """

    image: Path
    label: Path
    modality: str
    subject: str
    split: str = ""
    lesion: tuple[int, ...] = ()
    session: str = ""


class Layout(NamedTuple):
    """A data set's lesion type, and what finds its images below a folder."""

    lesion_type: str
    find: Callable[[Path], Iterator[Found]]


def brats2021(root: Path) -> Iterator[Found]:
    """BraTS2021_NNNNN/BraTS2021_NNNNN_{t1,t1ce,t2,flair,seg}.nii.gz; labels 1, 2 and 4."""
    for label in sorted(root.rglob("BraTS2021_*_seg.nii.gz")):
        subject = label.name.removesuffix("_seg.nii.gz")
        for token in ("t1", "t1ce", "t2", "flair"):
            image = label.with_name(f"{subject}_{token}.nii.gz")
            yield Found(image, label, TOKENS[token], subject)


def atlas2(root: Path) -> Iterator[Found]:
    """ATLAS 2.0: sub-*/ses-*/anat/*_T1w.nii.gz with *_label-L_desc-T1lesion_mask.nii.gz."""
    for label in sorted(root.rglob("sub-*_label-L_desc-T1lesion_mask.nii.gz")):
        stem = label.name.partition("_label-")[0]
        image = label.with_name(f"{stem}_T1w.nii.gz")
        yield Found(image, label, "T1", stem.partition("_")[0])


def isles2022(root: Path) -> Iterator[Found]:
    """ISLES 2022: sub-*/ses-*/dwi/*_dwi.nii.gz; the mask below derivatives/, *_msk.nii.gz."""
    for label in sorted((root / "derivatives").rglob("sub-*_msk.nii.gz")):
        stem = label.name.removesuffix("_msk.nii.gz")
        images = [p for p in root.rglob(f"{stem}_dwi.nii.gz") if "derivatives" not in p.parts]
        image = images[0] if images else root / f"{stem}_dwi.nii.gz"
        yield Found(image, label, "DWI", stem.partition("_")[0])


def wmh2017(root: Path) -> Iterator[Found]:
    """WMH 2017: <site>/[<scanner>/]<number>/pre/{T1,FLAIR}.nii.gz with wmh.nii.gz.

    Label 2 is another pathology: it becomes background.
    """
    for label in sorted(root.rglob("wmh.nii.gz")):
        home = label.parent
        subject = "-".join(home.relative_to(root).parts)
        for name in ("T1", "FLAIR"):
            yield Found(home / "pre" / f"{name}.nii.gz", label, name, subject, lesion=(1,))


def msseg2016(root: Path) -> Iterator[Found]:
    """MSSEG 2016: Center_*/Patient_*/Preprocessed_Data/*_preprocessed.nii.gz, Masks/Consensus."""
    names = {"T1": "T1", "GADO": "T1ce", "T2": "T2", "FLAIR": "FLAIR"}
    for label in sorted(root.rglob("Masks/Consensus.nii.gz")):
        home = label.parent.parent
        for name, modality in names.items():
            image = home / "Preprocessed_Data" / f"{name}_preprocessed.nii.gz"
            yield Found(image, label, modality, f"{home.parent.name}-{home.name}")


def oasis_wmh(root: Path) -> Iterator[Found]:
    """OASIS-3 with masks of white matter hyperintensities: OASxxxxx_MR_dNNNN/ a session.

    In each folder one file whose name has T1w, one with FLAIR, one with mask. A subject is the part
    of the name before the session: patients with two sessions stay together.
    """
    for home in sorted(p for p in root.rglob("OAS*_MR_d*") if p.is_dir()):
        masks = sorted(home.rglob("*mask*.nii.gz"))
        if not masks:
            continue
        for token, modality in (("T1w", "T1"), ("FLAIR", "FLAIR")):
            images = [p for p in sorted(home.rglob(f"*{token}*.nii.gz")) if p not in masks]
            image = images[0] if images else home / f"{home.name}_{token}.nii.gz"
            subject, _, session = home.name.partition("_")
            yield Found(image, masks[0], modality, subject, session=session)


def nnunet_raw(root: Path) -> Iterator[Found]:
    """The authors' nnU-Net folder: imagesTr, labelsTr, imagesTs, labelsTs.

    Names are <subject>_<modality>_to_MNI152_0000.nii.gz: the modality is the last part before
    "_to_MNI152", and never another that looks like one.

    Raises:
        InputError: `data.modality`, a name has another token there.
    """
    pattern = re.compile(r"(?P<subject>.+)_(?P<token>[^_]+)_to_MNI152_0000\.nii\.gz")
    for images, split in (("imagesTr", "train"), ("imagesTs", "test")):
        for image in sorted((root / images).glob("*_0000.nii.gz")):
            match = pattern.fullmatch(image.name)
            if match is None or match["token"].lower() not in TOKENS:
                raise InputError(
                    "data.modality",
                    f"{image.name} does not say its modality.",
                    hint="Expected: <subject>_<t1|t1ce|t2|flair|DWI>_to_MNI152_0000.nii.gz.",
                )
            label = root / images.replace("images", "labels")
            label /= image.name.replace("_0000.nii.gz", ".nii.gz")
            yield Found(image, label, TOKENS[match["token"].lower()], match["subject"], split)


LAYOUTS: dict[str, Layout] = {
    "BraTS2021": Layout("glioma", brats2021),
    "ATLAS2": Layout("chronic stroke", atlas2),
    "ISLES2022": Layout("acute stroke", isles2022),
    "WMH2017": Layout("white matter hyperintensities", wmh2017),
    "MSSEG2016": Layout("multiple sclerosis", msseg2016),
    "OASIS": Layout("white matter hyperintensities", oasis_wmh),
    "nnUNet": Layout("lesion", nnunet_raw),
}


def prepare_dataset(
    name: str, root: Path, labels: Path, *, seed: int = 0, val: float = 0.16, test: float = 0.2
) -> list[Scan]:
    """The rows of a download; its masks are written into a folder.

    Args:
        name: A key of LAYOUTS.
        root: Where the download was unpacked.
        labels: Folder for the masks with 0 and 1 alone, made if need be.
        seed: Of the split.
        val, test: Shares of the subjects; of an nnU-Net folder, test is what it says.

    Raises:
        InputError: `data.layout`, nothing of that layout is there; `data.file`, an image is
            missing; what `nnunet_raw` raises.
    """
    layout = LAYOUTS[name]
    found = list(layout.find(root))
    if not found:
        raise InputError(
            "data.layout",
            f"{root} holds nothing that is laid out as {name}.",
            hint=f"Expected: {(layout.find.__doc__ or '').splitlines()[0]}",
        )
    make_folders(labels)
    scans = []
    for item in tqdm(found, desc=name, unit="image", disable=None):
        for path in (item.image, item.label):
            if not path.is_file():
                raise InputError("data.file", f"{name}: there is no {path}.")
        parts = (name, item.subject, item.session, item.modality)
        mask = labels / f"{'_'.join(part for part in parts if part)}.nii.gz"
        _write_mask(item, mask)
        scans.append(
            Scan(
                item.image, mask, name, item.modality, layout.lesion_type, item.subject, item.split
            )
        )
    return split_subjects(scans, seed=seed, val=val, test=test)


def _write_mask(item: Found, path: Path) -> None:
    label = read_nifti(item.label)
    inside = np.isin(label.array, item.lesion) if item.lesion else label.array > 0
    write_nifti(Volume(inside.astype(np.uint8), label.affine), path)


def split_subjects(scans: Sequence[Scan], *, seed: int, val: float, test: float) -> list[Scan]:
    """The scans with their split: subjects in a random order that depends on seed and names alone.

    Scans that have the split "test" keep it, and those that have "train" are split into "train" and
    "val"; so a published test set stays what it is.
    """
    free = sorted({s.subject for s in scans if not s.split})
    given = sorted({s.subject for s in scans if s.split == "train"})
    splits = {s.subject: "test" for s in scans if s.split == "test"}
    rng = np.random.default_rng(seed)
    for subjects, shares in ((free, {"test": test, "val": val}), (given, {"val": val})):
        order = [subjects[i] for i in rng.permutation(len(subjects))]
        for name, share in shares.items():
            count = round(share * len(subjects))
            splits |= dict.fromkeys(order[:count], name)
            order = order[count:]
        splits |= dict.fromkeys(order, "train")
    return [dataclasses.replace(scan, split=splits[scan.subject]) for scan in scans]
