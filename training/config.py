"""One frozen TrainConfig, read from a TOML file; every number of a run stands in that file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mome_sdk.architecture import Architecture
from mome_sdk.errors import InputError
from mome_sdk.settings import build, read_toml

NOTHING = "nothing"  # what an expert may start from
Range = tuple[float, float]
Index3 = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One training stage.

    Attributes:
        epochs: What the schedule counts: learning rate and curriculum are constant within one, and
            a run is saved, and resumes, after each.
        iterations: Optimiser steps of an epoch.
        batch: Patches in each step.
        lr: Learning rate at epoch 0; it falls as (1 - epoch / epochs) ** 0.9.
        optimizer: "adamw" or "sgd" (Nesterov, momentum 0.99, as published).
        weight_decay: For every parameter.
        patch: Edges of the patches; None for those of inference.
        small_patch: Edges of the patches of the first `small_epochs` epochs, which are cheaper; the
            rest of the epochs have the patch of inference.
        small_epochs: Number of those epochs.
        weighting: Which cases are drawn, of a case table: "uniform" as published, or balanced by
            "modality", or by the square root of the size of a "dataset-sqrt" or "task-sqrt".
        augment: "nnunet" or "none", of patches of a case table.
        validation: Batches after each epoch for the pseudo-Dice, of the case table's "val" rows.
        checkpoint: What the stage hands on: its "last" weights, or the "best" by pseudo-Dice.
        average: Decay of a running mean of the weights that takes their place at the end; 0: none.
        amp: "off", or the forward pass in "bf16", or on CUDA in "fp16" with scaled gradients.
    """

    epochs: int
    iterations: int
    batch: int
    lr: float
    optimizer: Literal["sgd", "adamw"]
    weight_decay: float
    patch: Index3 | None = None
    small_patch: Index3 | None = None
    small_epochs: int = 0
    weighting: Literal["uniform", "modality", "dataset-sqrt", "task-sqrt"] = "uniform"
    augment: Literal["nnunet", "none"] = "none"
    validation: int = 0
    checkpoint: Literal["last", "best"] = "last"
    average: float = 0.0
    amp: Literal["off", "bf16", "fp16"] = "off"

    def __post_init__(self) -> None:
        if min(self.epochs, self.iterations, self.batch) < 1:
            raise InputError("argument.config", "epochs, iterations and batch are 1 or more.")
        if (self.small_patch is None) != (self.small_epochs == 0):
            raise InputError("argument.config", "small_patch and small_epochs go together.")
        if self.checkpoint == "best" and self.validation == 0:
            raise InputError("argument.config", "The best checkpoint needs validation batches.")


@dataclass(frozen=True, kw_only=True)
class GateConfig(StageConfig):
    """The stage in which the gate alone learns, from the fused loss.

    Attributes:
        start: Modality of the expert whose weights the gate starts from.
        distinct: Steps with patches of their own, for which the experts are computed once and
            kept in memory; later steps see the same patches mirrored.
    """

    start: str
    distinct: int


@dataclass(frozen=True, kw_only=True)
class JointConfig(StageConfig):
    """The joint stage; `lr` is that of the experts.

    Attributes:
        gate_lr: Learning rate of the gating network.
        experts: "trained" by the first stage, or "random", an ablation.
        heads: Of the trained experts: "kept", or "random" again as in the published loader.
        gate_start: "random" as published, or the "average" of the experts.
        gates: "hierarchical", or "finest": coarser levels average the experts, an ablation.
        curriculum: "quadratic" (equation 2), or "none": the fused loss alone, an ablation.
        own_loss: The specialisation loss of a batch: "sum" as in the published code, or the "mean"
            that equation 2 is for one image.
        memory: "plain", or "checkpoint": each network's activations are computed again in the
            backward pass instead of kept.
    """

    gate_lr: float
    experts: Literal["trained", "random"] = "trained"
    heads: Literal["kept", "random"] = "kept"
    gate_start: Literal["random", "average"] = "random"
    gates: Literal["hierarchical", "finest"] = "hierarchical"
    curriculum: Literal["quadratic", "none"] = "quadratic"
    own_loss: Literal["sum", "mean"] = "sum"
    memory: Literal["plain", "checkpoint"] = "plain"


@dataclass(frozen=True)
class LossConfig:
    """Dice + cross-entropy with deep supervision.

    Attributes:
        levels: Output levels with a loss; their weights are 1, 1/2, 1/4, ... divided by the sum.
        dice_smooth: Added to numerator and denominator of the soft Dice, voxels (published: 1e-5).
        tissue_weight: Weight of an expert's auxiliary tissue head (0 in the published training). It
            ended the collapse to "all background" of small networks and is thrown away.
    """

    levels: int
    dice_smooth: float
    tissue_weight: float


@dataclass(frozen=True)
class ModalitySynthesis:
    """Contrast of one modality; all intensities relative to white matter = 1.

    Attributes:
        gm, csf: Mean of grey matter and CSF.
        cerebellum: Factor on both cerebellar tissues.
        mix: Probability of each lesion kind: multiple sclerosis, infarct, tumour.
        lesion: Range of lesion brightness by part ("ms", "infarct", "oedema", "solid").
        reference: What the range multiplies: "brightest" (the larger of WM and GM) or "gm".
        lesion_max: Upper limit of lesion brightness, relative to white matter.
        necrosis, rim: Tumour centre and its enhancing rim, relative to white matter.
        label_threshold: Share of the painted lesion above which a voxel is labelled.
        thick_slices: Probability of a thick-slice acquisition.
    """

    gm: Range
    csf: Range
    cerebellum: Range
    mix: Mapping[str, float]
    lesion: Mapping[str, Range]
    reference: str
    lesion_max: float
    necrosis: Range
    rim: Range
    label_threshold: float
    thick_slices: float


@dataclass(frozen=True)
class SynthesisConfig:
    """Geometry and acquisition of the synthetic images, the same for all modalities.

    Attributes:
        lesion_free: Share of patches without a lesion.
        volume_ml: Lesion volume of a case, drawn log-uniformly.
        noise: Standard deviation of white noise before the blur, relative to white matter.
        blur_mm: Standard deviation of the point spread.
        bias: Largest standard deviation of the log bias field on grids of 2, 3 and 5 points.
        regional: Regional variation of tissue means (grey matter, white matter).
        artefacts: Probability of each unlabelled bright structure of healthy tissue.
    """

    lesion_free: float
    volume_ml: Range
    noise: Range
    blur_mm: Range
    bias: tuple[float, float, float]
    regional: tuple[float, float]
    artefacts: float
    modality: Mapping[str, ModalitySynthesis]


@dataclass(frozen=True)
class DataConfig:
    """Which anatomies train and which are only evaluated (file stems in the label map folder)."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]


@dataclass(frozen=True)
class TableConfig:
    """A case table (`dataset.read_table`) as training data.

    Attributes:
        path: Of the CSV file; a relative one is looked for in the folder given by `--data`.
        space: "model", the images lie on the model grid; "native", they are registered first.
    """

    path: str
    space: Literal["model", "native"] = "model"


@dataclass(frozen=True)
class EvaluationConfig:
    """The fixed held-out cases: `cases` whole heads for each modality, alternating anatomies."""

    seed: int
    cases: int


@dataclass(frozen=True)
class TrainConfig:
    """Everything that defines a run.

    Attributes:
        name: Of the bundle that the run makes.
        licence: Terms of the weights.
        notice: What is said with every result.
        seed: Of weights and data; with `threads` equal, a run repeats.
        modalities: In expert order.
        patch: Window (D, H, W), the same in training and inference: instance norm makes other
            windows give other results.
        loss: Of all stages.
        experts, joint: The stage of an expert from nothing, the stage of all networks.
        data, synthesis, evaluation: Label maps, what is painted into them patch by patch, and the
            held-out cases; or
        table: the cases that train. One of the two is expected.
        continued: Each round of an expert that starts from weights.
        warm_start: Expert -> what each of its rounds starts from: first the weights of another
            expert, finished or after a round ("T1-1"), or "nothing" (with the stage `experts`); in
            every further round its own ("T2": "FLAIR", "T2").
        gate: The stage between experts and joint. The published training has none: without it the
            joint stage starts with a gate that knows nothing.

    Raises:
        InputError: `argument.config`, an expert or the gate starts from what cannot be there.
    """

    name: str
    licence: str
    notice: str
    seed: int
    modalities: tuple[str, ...]
    patch: Index3
    architecture: Architecture
    loss: LossConfig
    experts: StageConfig
    joint: JointConfig
    data: DataConfig | None = None
    synthesis: SynthesisConfig | None = None
    evaluation: EvaluationConfig | None = None
    table: TableConfig | None = None
    continued: StageConfig | None = None
    warm_start: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    gate: GateConfig | None = None

    @property
    def painted(self) -> tuple[DataConfig, SynthesisConfig, EvaluationConfig]:
        """What a run on label maps has.

        Raises:
            InputError: `argument.config`, it is a run on a case table.
        """
        if self.data is None or self.synthesis is None or self.evaluation is None:
            raise InputError(
                "argument.config",
                f"{self.name} has no [data], [synthesis] and [evaluation].",
                hint="Name a configuration that paints lesions into label maps.",
            )
        return self.data, self.synthesis, self.evaluation

    def __post_init__(self) -> None:
        if (self.table is None) == (self.data is None):
            raise InputError(
                "argument.config",
                f"{self.name} has {'both' if self.table else 'neither'} of [table] and [data].",
                hint="One of them is expected: cases of a table, or label maps to paint into.",
            )
        if self.table is None:
            _ = self.painted
        if self.warm_start and self.continued is None:
            raise InputError("argument.config", "warm_start needs a stage [continued].")
        for name, rounds in self.warm_start.items():
            self._check_modality("warm_start", name)
            if rounds[:1] in ((), (name,)) or set(rounds[1:]) - {name}:
                raise InputError(
                    "argument.config",
                    f"warm_start.{name} is {list(rounds)}.",
                    hint=f"Expected: another modality, a round of it such as 'T1-1', or 'nothing'; "
                    f"then {name!r} for every further round.",
                )
            if rounds[0] != NOTHING:
                self._check_modality(f"warm_start.{name}", rounds[0].partition("-")[0])
        if self.gate:
            self._check_modality("gate.start", self.gate.start)
        self.expert_order()

    def _check_modality(self, key: str, name: str) -> None:
        if name not in self.modalities:
            raise InputError(
                "argument.config",
                f"{key} names {name!r}.",
                hint=f"The modalities are: {', '.join(self.modalities)}.",
            )

    def _start_of(self, name: str) -> str:
        """The modality that an expert starts from, or `NOTHING`."""
        return self.warm_start.get(name, (NOTHING,))[0].partition("-")[0]

    def expert_order(self) -> list[str]:
        """The modalities, each after the one whose expert it starts from."""
        order: list[str] = []
        while waiting := [name for name in self.modalities if name not in order]:
            ready = [name for name in waiting if self._start_of(name) in {*order, NOTHING}]
            if not ready:
                circle = ", ".join(waiting)
                raise InputError("argument.config", f"warm_start goes in a circle: {circle}.")
            order += ready
        return order


def load_config(path: str | Path) -> TrainConfig:
    """Read a TOML file into a TrainConfig.

    Raises:
        InputError: `argument.config`, the file cannot be read, or a key is missing, unknown or of
            the wrong type; the text names it.
    """
    return build(TrainConfig, read_toml(path), str(path))
