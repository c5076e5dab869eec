"""What all comparison systems promise: they learn, repeat, and can be saved; published sizes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from mome_sdk.architecture import Architecture
from mome_sdk.sliding_window import SlidingWindow
from mome_sdk.training.batch import Batch, Origin
from mome_sdk.training.comparators.hermes import Hermes, HermesConfig, HermesNetwork
from mome_sdk.training.comparators.modality_onehot import ModalityOneHot
from mome_sdk.training.comparators.multitalent import MultiTalent
from mome_sdk.training.comparators.nnunet import NnUNet
from mome_sdk.training.comparators.sam_med3d import SamConfig, SamMed3D
from mome_sdk.training.system import System

ARCH = Architecture((4, 8, 8), (1, 2, 2), (1, 1, 1), (1, 1), experts=1)
PUBLISHED = Architecture(
    (32, 64, 128, 256, 320, 320), (1, 2, 2, 2, 2, 2), (2,) * 6, (2,) * 5, experts=1
)
MODALITIES = ("T1", "FLAIR")
ORIGINS = (Origin("T1", "One"), Origin("FLAIR", "Two"))
TASKS = ("One T1", "Two FLAIR", "Three T1")
SMALL_SAM = SamConfig(
    size=(16, 16, 16), patch=4, dim=24, depth=2, heads=2, global_blocks=(1,), window=3, out_dim=24,
    decoder_mlp=32, decoder_heads=2, clicks=4,
)  # fmt: skip
SMALL_HERMES = HermesConfig(
    features=(4, 8, 8, 8), modalities=3, tokens=2, blocks=1, head_channels=4
)

SYSTEMS: dict[str, Callable[[], System]] = {
    "nnunet": lambda: NnUNet(ARCH),
    "multitalent": lambda: MultiTalent(ARCH, TASKS),
    "modality_onehot": lambda: ModalityOneHot(ARCH, MODALITIES),
    "hermes": lambda: Hermes(SMALL_HERMES, MODALITIES),
    "sam_med3d": lambda: SamMed3D(SMALL_SAM),
}


def made() -> Batch:
    """Bright boxes in noise."""
    noise = torch.randn(2, 1, 16, 16, 16, generator=torch.Generator().manual_seed(1))
    lesion = torch.zeros(2, 16, 16, 16, dtype=torch.uint8)
    lesion[0, 3:9, 4:10, 5:11] = 1
    lesion[1, 8:14, 2:8, 6:12] = 1
    return Batch(noise + 4 * lesion[:, None], lesion, ORIGINS)


def trained(name: str, steps: int, *, amp: bool = False) -> tuple[System, list[float]]:
    torch.manual_seed(0)
    system, losses = SYSTEMS[name](), []
    optimizer = torch.optim.AdamW(system.network.parameters(), lr=1e-2)
    for step in range(steps):
        torch.manual_seed(step)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            loss = system.loss(made(), step / steps)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return system, losses


@pytest.mark.slow
@pytest.mark.parametrize("name", SYSTEMS)
def test_a_system_learns_repeats_and_can_be_saved(name):
    system, losses = trained(name, 12)
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.1
    _, again = trained(name, 3)
    assert again == losses[:3]
    other = SYSTEMS[name]()
    other.network.load_state_dict(system.network.state_dict())
    batch, window = made(), SlidingWindow((16, 16, 16), threads=1)
    image, truth = batch.images[0].numpy(), batch.lesions[0].numpy()
    masks = [each.segment(image, ORIGINS[0], window, truth) for each in (system, other)]
    np.testing.assert_array_equal(*masks)
    assert masks[0].dtype == np.uint8
    assert masks[0].shape == (16, 16, 16)
    inside = masks[0][truth == 1].mean() - masks[0][truth == 0].mean()
    assert inside > 0.2, "the mask says nothing of the lesion"


@pytest.mark.slow
@pytest.mark.parametrize("name", SYSTEMS)
def test_a_system_trains_in_bf16(name):
    _, plain = trained(name, 1)
    _, half = trained(name, 1, amp=True)
    assert half[0] == pytest.approx(plain[0], abs=0.05)


def test_what_must_be_told_at_test():
    needs = {name: set(make().needs_at_test) for name, make in SYSTEMS.items()}
    assert needs == {
        "nnunet": set(),
        "multitalent": {"dataset", "modality"},
        "modality_onehot": {"modality"},
        "hermes": {"modality"},
        "sam_med3d": {"mask"},
    }
    assert MultiTalent(ARCH, ("One",), by="dataset").needs_at_test == {"dataset"}


def parameters(network: torch.nn.Module) -> int:
    return sum(weight.numel() for weight in network.parameters())


def test_published_sizes():
    """MoME paper and the systems' own papers; comparators counted from their public code."""
    with torch.device("meta"):
        assert parameters(NnUNet(PUBLISHED).network) == 31_195_594
        # 805 = 32 + 64 + 128 + 256 + 320 weights of five heads, and five biases, for each channel
        assert parameters(MultiTalent(PUBLISHED, tuple("ab")).network) == 31_195_594
        seventeen = MultiTalent(PUBLISHED, tuple("abcdefghijklmnopq"))
        assert parameters(seventeen.network) == 31_195_594 + 15 * 805
        hermes = HermesNetwork(HermesConfig(tasks=72, modalities=6))
        assert parameters(hermes) == 60_884_998
        parts = (hermes.unet, hermes.fusion, hermes.mask_head, hermes.modality_head)
        assert [parameters(part) for part in parts] == [
            40_560_480,
            17_907_008,
            1_223_968,
            1_193_542,
        ]
        assert parameters(HermesNetwork(HermesConfig(tasks=1, modalities=5))) == 60_795_781
        sam = SamMed3D(SamConfig()).network
        assert parameters(sam) == 100_509_232
        parts = (sam.encoder, sam.prompts, sam.decoder)
        assert [parameters(part) for part in parts] == [92_924_928, 8_668, 7_575_636]
