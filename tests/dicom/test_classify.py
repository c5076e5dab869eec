"""Which series is what: the usual protocols, what is no candidate, a site's own rules, no guess."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydicom import Dataset

from dicom_files import PROTOCOLS, classic, enhanced, save
from mome_sdk.dicom.classify import (
    MODALITIES,
    Rules,
    Verdict,
    choose,
    classify,
    load_rules,
)
from mome_sdk.dicom.series import open_study
from mome_sdk.dicom.stacks import FACTS, Stack
from mome_sdk.errors import DicomError, InputError
from phantom import grid, phantom

pytestmark = pytest.mark.usefixtures("in_this_process")

VOLUME = phantom(where=grid(8.0).reorient("LPS"))


@pytest.fixture(scope="session")
def rules() -> Rules:
    return load_rules()


def stacks_of(images: list[Dataset], folder: Path) -> tuple[Stack, ...]:
    save(images, folder)
    with open_study(folder) as study:
        return study.stacks


def stack(**facts: Any) -> Stack:
    """A stack of which only these facts are known."""
    known: dict[str, Any] = dict.fromkeys(FACTS)
    known |= {"ImageType": ["ORIGINAL", "PRIMARY"], "ScanningSequence": ["SE"], "Text": ""}
    known |= {"Slices": 24, "CoverageMm": 120.0, "Orientations": 1, "SeriesNumber": 1}
    known |= {"Trace": False, "Contrast": False, "LaterCopy": False, "VoxelMm3": 1.0, "Time": ""}
    return Stack("Series 1 (00000000)", (), (24,), {**known, **facts})


def of(rules: Rules, **facts: Any) -> Verdict:
    return classify(stack(**facts), rules)


@pytest.fixture(scope="session")
def whole_study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven series as a scanner makes them; b0 and b1000 share one."""
    folder = tmp_path_factory.mktemp("study")
    images: list[Dataset] = []
    for number, protocol in enumerate(("localizer", "T1", "T2", "FLAIR", "DWI"), start=1):
        made = classic(VOLUME, protocol, number=number)
        if protocol == "localizer":
            made = made[:3]
            for image, cosines in zip(
                made, ((1, 0, 0, 0, 1, 0), (0, 1, 0, 0, 0, -1)), strict=False
            ):
                image.ImageOrientationPatient = [str(c) for c in cosines]
        images += made
    for k, image in enumerate(classic(VOLUME, "b0", number=5)):
        image.InstanceNumber = 100 + k
        images.append(image)
    images += classic(VOLUME, "ADC", number=6)
    images += classic(VOLUME, "T1ce", number=7)
    save(images, folder)
    return folder


def test_a_whole_study_is_told_apart(whole_study: Path, rules: Rules) -> None:
    with open_study(whole_study) as study:
        found = {
            (stack.facts["SeriesNumber"], stack.facts["BValue"]): classify(stack, rules)
            for stack in study.stacks
        }
    assert {key: v.modality for key, v in found.items() if v.modality} == {
        **{(2, None): "T1", (3, None): "T2", (4, None): "FLAIR", (5, 1000.0): "DWI"},
        (7, None): "T1ce",
    }
    assert found[(1, None)].reasons == ("a localizer",)
    assert found[(5, 0.0)].reasons[0].startswith("a diffusion image without diffusion weighting")
    assert found[(6, None)].reasons[0].startswith("a map computed from diffusion images")


@pytest.mark.parametrize("modality", MODALITIES)
def test_each_can_be_asked_for(modality: str, whole_study: Path, rules: Rules) -> None:
    with open_study(whole_study) as study:
        choice = choose(study.stacks, modality.lower(), rules)
    assert choice.modality == modality
    assert choice.reasons
    assert len(choice.verdicts) == len(study.stacks)


def test_auto_takes_the_first_of_the_preference(whole_study: Path, rules: Rules) -> None:
    with open_study(whole_study) as study:
        assert choose(study.stacks, "auto", rules).modality == "FLAIR"


@pytest.mark.parametrize("protocol", MODALITIES)
def test_enhanced_headers_say_the_same(protocol: str, tmp_path: Path, rules: Rules) -> None:
    image = enhanced([VOLUME], protocol, b_values=(PROTOCOLS[protocol].get("DiffusionBValue"),))
    (only,) = stacks_of([image], tmp_path)
    assert classify(only, rules).modality == protocol


T1_TIMES = {"EchoTime": 3.0, "RepetitionTime": 2300.0, "InversionTime": 900.0}


@pytest.mark.parametrize(
    ("facts", "modality"),
    [
        ({"EchoTime": 12.0, "RepetitionTime": 500.0}, "T1"),
        ({**T1_TIMES, "Contrast": True}, "T1ce"),
        ({**T1_TIMES, "Text": "t1_mprage +c"}, "T1ce"),
        ({**T1_TIMES, "Text": "t1 post", "LaterCopy": True}, "T1ce"),
        ({**T1_TIMES, "Text": "t1 post"}, "T1"),
        ({**T1_TIMES, "Text": "t1 pre gd", "Contrast": True}, "T1"),
        (
            {
                "EchoTime": 24.0,
                "RepetitionTime": 2000.0,
                "InversionTime": 860.0,
                "Text": "t1 flair",
            },
            "T1",
        ),
        ({"EchoTime": 100.0, "RepetitionTime": 5000.0}, "T2"),
        ({"EchoTime": 388.0, "RepetitionTime": 5000.0, "InversionTime": 1650.0}, "FLAIR"),
        ({"EchoTime": 120.0, "RepetitionTime": 9000.0, "Text": "ax flair"}, "FLAIR"),
        ({"Text": "flair"}, "FLAIR"),
        ({"ScanningSequence": ["EP"], "BValue": 1000.0}, "DWI"),
        ({"ScanningSequence": ["EP"], "BValue": 1500.0, "ImageType": ["DERIVED", "TRACEW"]}, "DWI"),
        ({}, None),
        ({"EchoTime": 20.0, "RepetitionTime": 3000.0}, None),  # proton density
        ({"ScanningSequence": ["EP"], "EchoTime": 80.0, "RepetitionTime": 6000.0}, None),
        ({"ScanningSequence": ["GR"], "EchoTime": 25.0, "RepetitionTime": 600.0}, None),
        ({"BValue": 2000.0}, None),
        ({"BValue": 500.0}, None),
        ({"Text": "dwi_adc", "BValue": 1000.0}, None),
        ({"EchoTime": 100.0, "RepetitionTime": 5000.0, "Slices": 5}, None),
        ({"EchoTime": 100.0, "RepetitionTime": 5000.0, "CoverageMm": 40.0}, None),
        ({"EchoTime": 100.0, "RepetitionTime": 5000.0, "Orientations": 3}, None),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "M", "MOSAIC"], "Text": "t2"}, None),
        ({"ImageType": ["DERIVED", "SECONDARY", "MIP"], "Text": "t2"}, None),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "P"], "Text": "t1"}, None),
        ({"ImageType": ["DERIVED", "SECONDARY"], "Text": "t1"}, None),
        ({"EchoTime": 4.0, "RepetitionTime": 22.0, "Text": "tof_3d"}, None),
    ],
)
def test_headers_and_what_they_mean(
    facts: dict[str, Any], modality: str | None, rules: Rules
) -> None:
    verdict = of(rules, **facts)
    assert verdict.modality == modality
    assert verdict.reasons
    assert all(verdict.reasons)


def test_close_scores_are_no_verdict(rules: Rules) -> None:
    verdict = of(rules, Text="t1 t2")
    assert verdict.modality is None
    assert "its headers fit T1 (40) and T2 (40)" in verdict.line


def test_nothing_is_guessed_and_every_series_is_named(rules: Rules) -> None:
    unknown = stack(EchoTime=20.0, RepetitionTime=3000.0)
    for wanted in ("auto", "flair"):
        with pytest.raises(DicomError) as caught:
            choose([unknown, stack(BValue=0.0)], wanted, rules)
        assert caught.value.code == "dicom.no-series"
        assert "its headers do not say what it is" in caught.value.message
        assert "without diffusion weighting (b under 100) [BValue 0]" in caught.value.message


def test_another_series_is_not_taken_instead(rules: Rules) -> None:
    t2 = stack(EchoTime=100.0, RepetitionTime=5000.0)
    with pytest.raises(DicomError, match=r"There is no FLAIR series\. Series 1 .*: T2 \("):
        choose([t2], "flair", rules)


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ({"BValue": 1500.0}, {"BValue": 1000.0, "Trace": True}),
        ({"BValue": 1000.0, "Trace": True}, {"BValue": 1000.0}),
        ({"BValue": 1000.0, "VoxelMm3": 0.5}, {"BValue": 1000.0}),
        ({"BValue": 1000.0, "Slices": 30}, {"BValue": 1000.0}),
        ({"BValue": 1000.0}, {"BValue": 1000.0, "SeriesNumber": 9}),
    ],
)
def test_of_several_the_better_is_taken_in_any_order(
    better: dict[str, Any], worse: dict[str, Any], rules: Rules
) -> None:
    good, bad = stack(**better), stack(**worse)
    for order in ([good, bad], [bad, good]):
        choice = choose(order, "dwi", rules)
        assert choice.stack is good
        assert choice.reasons[-1] == "the best of 2 DWI images"


def test_a_missing_agent_is_seen_by_time_and_name(tmp_path: Path, rules: Rules) -> None:
    """Two equal T1 series; the later is called post."""
    first = classic(VOLUME, "T1", number=2)
    second = classic(VOLUME, "T1", number=3, SeriesDescription="t1_mprage_post")
    stacks = stacks_of(first + second, tmp_path)
    assert [classify(s, rules).modality for s in stacks] == ["T1", "T1ce"]


@pytest.mark.parametrize(
    ("creator", "tags", "value", "b_value"),
    [
        ("SIEMENS MR HEADER", (0x00190010, 0x0019100C, "IS"), "1000", 1000.0),
        ("GEMS_PARM_01", (0x00430010, 0x00431039, "IS"), ["1000001000", "8", "0", "0"], 1000.0),
        ("Philips Imaging DD 001", (0x20010010, 0x20011003, "FL"), 1000.0, 1000.0),
    ],
)
def test_vendors_own_b_values_are_read(
    creator: str, tags: tuple[int, int, str], value: Any, b_value: float, tmp_path: Path
) -> None:
    images = classic(VOLUME, "DWI", DiffusionBValue=None)
    for image in images:
        image.add_new(tags[0], "LO", creator)
        image.add_new(tags[1], tags[2], value)
    (only,) = stacks_of(images, tmp_path)
    assert only.facts["BValue"] == b_value


def test_reasons_and_labels_hold_nothing_of_the_headers_text(tmp_path: Path, rules: Rules) -> None:
    images = classic(VOLUME, "T2", SeriesDescription="t2 Fixture Zora")
    (only,) = stacks_of(images, tmp_path)
    line = classify(only, rules).line
    assert "Zora" not in line
    assert images[0].SeriesInstanceUID not in line


SITE = """
preference = ["T1"]
[[exclude]]
name = "no-third"
reason = "the site's phantom"
when = { SeriesNumber = { at_least = 900 } }
[[exclude]]
name = "derived"
reason = "never"
when = { Text = { text = ["never"] } }
[[class]]
name = "site-flair"
modality = "FLAIR"
score = 500
reason = "the site's name for it"
when = { Text = { text = ["kopf spezial"] } }
"""


def test_a_site_replaces_and_adds_rules(tmp_path: Path) -> None:
    (tmp_path / "site.toml").write_text(SITE)
    rules = load_rules(tmp_path / "site.toml")
    assert rules.preference == ("T1",)
    assert rules.least_score == load_rules().least_score
    assert of(rules, Text="kopf spezial 3").modality == "FLAIR"
    assert of(rules, Text="t1", ImageType=["DERIVED"]).modality == "T1"
    assert of(rules, Text="t1", SeriesNumber=900).reasons[0].startswith("the site's phantom")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("exclude = [", "cannot be read as TOML"),
        ("surprise = 1", "it holds surprise"),
        ('preference = ["PET"]', "its preference is"),
        ('[[exclude]]\nname = "x"\nreason = "y"', "its rule x holds"),
        (
            '[[class]]\nname="x"\nreason="y"\nscore=1\nmodality="PET"\nwhen={}',
            "its rule x is for 'PET'",
        ),
        ('[[exclude]]\nname="x"\nreason="y"\nwhen={ Age = { above = 1 } }', "asks for Age"),
        ('[[exclude]]\nname="x"\nreason="y"\nwhen={ Text = { above = 1 } }', "tests Text by above"),
        (
            '[[exclude]]\nname="x"\nreason="y"\nwhen={ EchoTime = { above = "9" } }',
            "by above = '9'",
        ),
        (
            '[[exclude]]\nname="x"\nreason="y"\nwhen={ Text = { matches = ["(a+)+"] } }',
            "by matches",
        ),
    ],
)
def test_rules_that_are_not_understood_are_refused(text: str, found: str, tmp_path: Path) -> None:
    (tmp_path / "site.toml").write_text(text)
    with pytest.raises(InputError) as caught:
        load_rules(tmp_path / "site.toml")
    assert caught.value.code == "argument.series-rules"
    assert found in caught.value.message


def test_a_missing_rules_file_and_an_unknown_series_are_refused(
    tmp_path: Path, rules: Rules
) -> None:
    with pytest.raises(InputError, match=r"\[argument.series-rules\]"):
        load_rules(tmp_path / "none.toml")
    with pytest.raises(InputError, match=r"\[argument.series\] The series is 'pet'"):
        choose([stack()], "pet", rules)


def test_every_rule_has_a_name_of_its_own(rules: Rules) -> None:
    """Of two with one name a site could replace only one."""
    for listed in (rules.exclude, rules.classes):
        names = [rule.name for rule in listed]
        assert len(set(names)) == len(names)
