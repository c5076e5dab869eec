"""SAM-Med3D: a vision transformer that is clicked at, in training and at test.

Wang et al., 2023. A click needs the known mask: it is put where the last mask is wrong. The
image is encoded once; each click then refines the mask of the one before. The order of axes is
(D, H, W) throughout, and position encodings are sines and cosines, so that published weights do not
fit; the published parameter count does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from mome_sdk.sliding_window import SlidingWindow

from ..batch import Batch, Origin
from ..config import Index3

TEST_CLICKS = 10
NOT_A_POINT = -1


@dataclass(frozen=True)
class SamConfig:
    """Sizes; the defaults are the published `vit_b_ori`.

    Attributes:
        size: Box (D, H, W) of voxels that is seen; of a larger image the middle.
        patch: Edge of the cube of voxels that becomes a token.
        dim, depth, heads: Of the encoder.
        global_blocks: Blocks with position tables of the size of the grid; the others have tables
            of `window`, published for windows that are larger than the grid.
        window: See above.
        out_dim: Of the image embedding, tokens and prompts.
        mask_channels: Of the first convolution on the last mask, times 4.
        decoder_mlp, decoder_heads: Of the two-way transformer, two layers deep.
        clicks: In training.
    """

    size: Index3 = (128, 128, 128)
    patch: int = 16
    dim: int = 768
    depth: int = 12
    heads: int = 12
    global_blocks: tuple[int, ...] = (2, 5, 8, 11)
    window: int = 14
    out_dim: int = 384
    mask_channels: int = 16
    decoder_mlp: int = 2048
    decoder_heads: int = 8
    clicks: int = 11

    @property
    def grid(self) -> Index3:
        """Tokens along (D, H, W)."""
        z, y, x = (edge // self.patch for edge in self.size)
        return z, y, x


class _Norm(nn.LayerNorm):
    """Layer norm over the channels of (B, C, D, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


# ---- the image


class _SelfAttention(nn.Module):
    """Attention among all tokens, with a bias from their distance along each axis."""

    def __init__(self, config: SamConfig, *, is_global: bool) -> None:
        super().__init__()
        self.heads, self.grid = config.heads, config.grid
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.out = nn.Linear(config.dim, config.dim)
        width = config.dim // config.heads
        sizes = config.grid if is_global else (max(config.window, *config.grid),) * 3
        self.tables = nn.ParameterList(nn.Parameter(torch.zeros(2 * s - 1, width)) for s in sizes)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=self._bias(q))
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out

    def _bias(self, q: Tensor) -> Tensor:
        """(B, heads, n, n): for each axis the query times the table's row for the distance."""
        d, h, w = self.grid
        q = q.unflatten(2, self.grid)
        terms = []
        for axis, (size, table) in enumerate(zip(self.grid, self.tables, strict=True)):
            steps = torch.arange(size, device=q.device)
            rows = table[steps[:, None] - steps[None, :] + len(table) // 2].to(q.dtype)
            letter = "dhw"[axis]
            bias = torch.einsum(f"bndhwc,{letter}kc->bndhwk", q, rows)
            terms.append(bias.view(*bias.shape[:5], *(size if a == axis else 1 for a in range(3))))
        whole = terms[0] + terms[1] + terms[2]
        return whole.expand(*whole.shape[:5], d, h, w).flatten(5).flatten(2, 4)


class _EncoderBlock(nn.Module):
    def __init__(self, config: SamConfig, *, is_global: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(config.dim), nn.LayerNorm(config.dim)
        self.attention = _SelfAttention(config, is_global=is_global)
        self.mlp = nn.Sequential(
            nn.Linear(config.dim, 4 * config.dim), nn.GELU(), nn.Linear(4 * config.dim, config.dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class _ImageEncoder(nn.Module):
    """Image (B, C, *size) to embedding (B, out_dim, *grid)."""

    def __init__(self, config: SamConfig) -> None:
        super().__init__()
        self.grid = config.grid
        self.embed = nn.Conv3d(1, config.dim, config.patch, config.patch)
        tokens = int(np.prod(config.grid))
        self.position = nn.Parameter(0.02 * torch.randn(1, tokens, config.dim))
        self.blocks = nn.ModuleList(
            _EncoderBlock(config, is_global=index in config.global_blocks)
            for index in range(config.depth)
        )
        self.neck = nn.Sequential(
            nn.Conv3d(config.dim, config.out_dim, 1, bias=False),
            _Norm(config.out_dim),
            nn.Conv3d(config.out_dim, config.out_dim, 3, padding=1, bias=False),
            _Norm(config.out_dim),
        )

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.neck(x.transpose(1, 2).unflatten(2, self.grid))
        return out


# ---- the prompts


class _PromptEncoder(nn.Module):
    """A click and the last mask, as tokens and as a map to add to the image embedding."""

    def __init__(self, config: SamConfig) -> None:
        super().__init__()
        self.size, self.grid = config.size, config.grid
        frequencies = np.random.default_rng(0).standard_normal((3, config.out_dim // 2), np.float32)
        self.frequencies: Tensor
        self.register_buffer("frequencies", torch.from_numpy(frequencies))
        self.labels = nn.Embedding(2, config.out_dim)  # not lesion, lesion
        self.no_point = nn.Embedding(1, config.out_dim)
        self.no_mask = nn.Embedding(1, config.out_dim)
        few, many = config.mask_channels // 4, config.mask_channels
        self.mask = nn.Sequential(
            nn.Conv3d(1, few, 2, 2),
            _Norm(few),
            nn.GELU(),
            nn.Conv3d(few, many, 2, 2),
            _Norm(many),
            nn.GELU(),
            nn.Conv3d(many, config.out_dim, 1),
        )

    def positions(self, places: Tensor) -> Tensor:
        """Encoding (..., out_dim) of places (..., 3) between 0 and 1 along (D, H, W)."""
        angles = 2 * np.pi * ((2 * places - 1) @ self.frequencies)
        return torch.cat((angles.sin(), angles.cos()), dim=-1)

    def image_positions(self) -> Tensor:
        """(out_dim, *grid): of the middle of each token's cube."""
        axes = [(torch.arange(size) + 0.5) / size for size in self.grid]
        places = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
        return self.positions(places.to(self.no_mask.weight)).movedim(-1, 0)

    def points(self, voxels: Tensor, labels: Tensor) -> Tensor:
        """(B, 2, out_dim): the click at voxels (B, 3) with labels (B,), and an empty place."""
        places = (voxels + 0.5) / torch.tensor(self.size, device=voxels.device)
        clicked = self.positions(places) + self.labels(labels.clamp_min(0))
        empty = self.no_point.weight.expand(len(labels), -1)
        token = torch.where((labels == NOT_A_POINT)[:, None], empty, clicked)
        return torch.stack((token, empty), dim=1)

    def dense(self, last: Tensor | None, batch: int) -> Tensor:
        """(B, out_dim, *grid): of the last low-resolution logits, if there are any."""
        if last is None:
            return self.no_mask.weight[0][None, :, None, None, None].expand(batch, -1, *self.grid)
        out: Tensor = self.mask(last)
        return out


# ---- the mask


class _Attention(nn.Module):
    def __init__(self, dim: int, inner: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(dim, inner) for _ in range(3))
        self.out = nn.Linear(inner, dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = (self.q(q), self.k(k), self.v(v))
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        mixed = functional.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


class _TwoWayLayer(nn.Module):
    """Tokens among themselves, tokens to image, a perceptron, image to tokens."""

    def __init__(self, config: SamConfig, *, first: bool) -> None:
        super().__init__()
        dim, heads = config.out_dim, config.decoder_heads
        self.first = first
        self.self_attention = _Attention(dim, dim, heads)
        self.to_image = _Attention(dim, dim // 2, heads)
        self.mlp = nn.Sequential(
            nn.Linear(dim, config.decoder_mlp), nn.ReLU(), nn.Linear(config.decoder_mlp, dim)
        )
        self.to_tokens = _Attention(dim, dim // 2, heads)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(4))

    def forward(
        self, tokens: Tensor, image: Tensor, token_place: Tensor, place: Tensor
    ) -> tuple[Tensor, Tensor]:
        if self.first:
            tokens = self.self_attention(tokens, tokens, tokens)
        else:
            q = tokens + token_place
            tokens = tokens + self.self_attention(q, q, tokens)
        tokens = self.norms[0](tokens)
        tokens = tokens + self.to_image(tokens + token_place, image + place, image)
        tokens = self.norms[1](tokens)
        tokens = self.norms[2](tokens + self.mlp(tokens))
        image = image + self.to_tokens(image + place, tokens + token_place, tokens)
        return tokens, self.norms[3](image)


def _perceptron(*sizes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class _MaskDecoder(nn.Module):
    """Low-resolution logits (B, 1, 4 x grid). Of four mask tokens the first is used, and the head
    that guesses a mask's quality not at all, as published.
    """

    def __init__(self, config: SamConfig) -> None:
        super().__init__()
        dim = config.out_dim
        self.grid = config.grid
        self.tokens = nn.Embedding(5, dim)  # quality, four masks
        self.layers = nn.ModuleList(_TwoWayLayer(config, first=i == 0) for i in range(2))
        self.final = _Attention(dim, dim // 2, config.decoder_heads)
        self.final_norm = nn.LayerNorm(dim)
        self.upscale = nn.Sequential(
            nn.ConvTranspose3d(dim, dim // 4, 2, 2),
            _Norm(dim // 4),
            nn.GELU(),
            nn.ConvTranspose3d(dim // 4, dim // 8, 2, 2),
            nn.GELU(),
        )
        self.masks = nn.ModuleList(_perceptron(dim, dim, dim, dim // 8) for _ in range(4))
        self.quality = _perceptron(dim, 256, 256, 4)

    def forward(self, embedding: Tensor, place: Tensor, points: Tensor, dense: Tensor) -> Tensor:
        batch = len(points)
        start = torch.cat((self.tokens.weight.expand(batch, -1, -1), points), dim=1)
        image = (embedding + dense).flatten(2).transpose(1, 2)
        places = place.flatten(1).T[None].to(image)
        tokens = start
        for layer in self.layers:
            tokens, image = layer(tokens, image, start, places)
        tokens = self.final_norm(tokens + self.final(tokens + start, image + places, image))
        features = self.upscale(image.transpose(1, 2).unflatten(2, self.grid))
        weights = self.masks[0](tokens[:, 1])
        return torch.einsum("bc,bcdhw->bdhw", weights, features)[:, None]


class SamNetwork(nn.Module):
    """Encoder, prompts and decoder."""

    def __init__(self, config: SamConfig) -> None:
        super().__init__()
        self.size = config.size
        self.encoder = _ImageEncoder(config)
        self.prompts = _PromptEncoder(config)
        self.decoder = _MaskDecoder(config)

    def click(
        self, embedding: Tensor, voxels: Tensor, labels: Tensor, last: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Logits (B, 1, *size), and those of low resolution for the next click."""
        dense = self.prompts.dense(last, len(labels))
        points = self.prompts.points(voxels, labels)
        low = self.decoder(embedding, self.prompts.image_positions(), points, dense)
        return functional.interpolate(low, size=self.size, mode="trilinear"), low


# ---- clicks


class Clicks(NamedTuple):
    """voxels (B, 3) along (D, H, W); labels (B,): 1 lesion, 0 not, -1 no click."""

    voxels: Tensor
    labels: Tensor


def draw_clicks(found: Tensor, truth: Tensor, rng: np.random.Generator) -> Clicks:
    """One random voxel of each sample where found (B, D, H, W) differs from truth, if any does."""
    voxels, labels = [], []
    for mask, known in zip(found, truth, strict=True):
        wrong = torch.nonzero(mask != known)
        if len(wrong):
            voxel = wrong[int(rng.integers(len(wrong)))]
            voxels.append(voxel)
            labels.append(int(known[tuple(voxel)]))
        else:
            voxels.append(torch.zeros(3, dtype=torch.long, device=truth.device))
            labels.append(NOT_A_POINT)
    return Clicks(torch.stack(voxels), torch.tensor(labels, device=truth.device))


class SamMed3D:
    """Clicks in the wrong places, from the known mask, in training and at test.

    A prediction sees the box of `config.size` in the middle of the image; outside, nothing is
    found. The last of ten clicks counts; `click_masks` has the others.
    """

    needs_at_test: frozenset[str] = frozenset({"mask"})

    def __init__(self, config: SamConfig) -> None:
        self.config = config
        self.network = SamNetwork(config)

    def loss(self, batch: Batch, progress: float) -> Tensor:
        """Mean over all clicks of Dice + cross-entropy; the gradient passes through all of them.

        One click in the middle, and the last, give no point: the mask alone is refined.
        """
        images, truth = (
            _boxed(batch.images, self.config.size),
            _boxed(batch.lesions, self.config.size),
        )
        embedding = self.network.encoder(images)
        rng = np.random.default_rng(int(torch.randint(2**31, (1,))))
        silent = {int(rng.integers(1, max(2, self.config.clicks - 2))), self.config.clicks - 1}
        found, last = torch.zeros_like(truth), None
        losses = []
        for number in range(self.config.clicks):
            clicks = draw_clicks(found, truth, rng)
            if number in silent:
                clicks = Clicks(clicks.voxels, torch.full_like(clicks.labels, NOT_A_POINT))
            logits, last = self.network.click(embedding, clicks.voxels, clicks.labels, last)
            losses.append(click_loss(logits[:, 0], truth))
            found = (logits[:, 0].detach() > 0).to(truth.dtype)
        return torch.stack(losses).mean()

    def segment(
        self,
        image: NDArray[np.float32],
        origin: Origin,
        window: SlidingWindow,
        truth: NDArray[np.uint8] | None = None,
    ) -> NDArray[np.uint8]:
        """The mask (D, H, W) of an image (C, D, H, W) after ten clicks against the known one."""
        assert truth is not None
        *_, last = self.click_masks(image, truth)
        return last

    @torch.inference_mode()
    def click_masks(
        self, image: NDArray[np.float32], truth: NDArray[np.uint8], *, seed: int = 0
    ) -> Iterator[NDArray[np.uint8]]:
        """The mask (D, H, W) after each of ten clicks; where it is perfect, nothing is clicked."""
        size = self.config.size
        device = next(self.network.parameters()).device
        boxed = _boxed(torch.from_numpy(image.copy())[None], size).to(device)
        known = _boxed(torch.from_numpy(truth.copy())[None], size).to(device)
        embedding = self.network.encoder(boxed)
        rng = np.random.default_rng(seed)
        found, last = torch.zeros_like(known), None
        masks = []
        for _ in range(TEST_CLICKS):
            clicks = draw_clicks(found, known, rng)
            if int(clicks.labels[0]) != NOT_A_POINT:
                logits, last = self.network.click(embedding, clicks.voxels, clicks.labels, last)
                found = (logits[:, 0] > 0).to(known.dtype)
            masks.append(_boxed(found, truth.shape)[0].cpu().numpy().astype(np.uint8))
        return iter(masks)


def _boxed(x: Tensor, size: Sequence[int]) -> Tensor:
    """The last three axes cut or padded with zeros to `size`, about their middle."""
    pads: list[int] = []
    for have, want in zip(x.shape[-3:], size, strict=True):
        before = int((want - have) / 2)  # towards zero: cut and put back at the same place
        pads = [before, want - have - before, *pads]
    return functional.pad(x, pads)


def click_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """1 - Dice with squared denominators, plus binary cross-entropy; both (B, D, H, W)."""
    logits, known = logits.float(), truth.float()
    entropy = functional.binary_cross_entropy_with_logits(logits, known)
    p, axes = logits.sigmoid(), (1, 2, 3)
    overlap = 2 * (p * known).sum(axes) + 1e-5
    total = (p**2).sum(axes) + (known**2).sum(axes) + 1e-5
    return entropy + (1 - overlap / total).mean()
