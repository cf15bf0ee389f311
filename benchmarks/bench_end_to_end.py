"""The read inside a whole scoring step of MemSTC-Net and of PatchCore: what share of the step it takes, by whose read.

Networks of the published sizes in plain torch, with random weights and batch norms fitted to the images; the memories
hold features of other images. Every provider runs the same network, only the search differs: the best peer is the step
before, "ours, prepared" the step after. Maps and indices are checked against a search in float64.

MemSTC-Net (K. Zhou et al., section III), one 224 x 224 image: encoders of the structure and of the edges, a read of
their memories (2,048 keys of 512 values each) at 14 x 14 places, the texture decoder on both reads, fused by attention,
|I - Î|. The U-Nets that find structure and edges are left out: they would add to what is not the read.

PatchCore (K. Roth et al., section 3), one 224 x 224 image: WideResNet-50-2 up to its third stage, the features of
stages two and three averaged to 28 x 28 patches of 1,024 values, the nearest of 16,384 rows, its distance as map.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from bench_nearest_keys import cdist_argmin, float64_search, product_argmin
from harness import Case, Provider, Step, each_provider, largest_error
from torch import Tensor, nn

import memad_fast

SIZE = 224
Search = Callable[[Tensor], tuple[Tensor, Tensor]]  # queries [N, D] -> squared distances [N, 1], indices [N, 1]
Read = Callable[[int, Tensor], tuple[Tensor, Tensor]]  # the same, of the memory with that number


# --- MemSTC-Net ---------------------------------------------------------------------------------------------------

ENCODER = "C64 C64 Mp C128 C128 Mp C256 C256 Mp C512 C512 Mp C512 C512"
DECODER = "Up C512 C512 Up C256 C256 Up C128 C128 Up C64 C64 conv3"
ATTENTION = "C64 C64 Mp C128 C128 Up C64 conv1"


def network(channels: int, plan: str) -> nn.Sequential:
    """Layers as the paper writes them: Ck is 3 x 3 convolution, batch norm, ReLU; convk the convolution alone."""
    layers: list[nn.Module] = []
    for name in plan.split():
        if name == "Mp":
            layers.append(nn.MaxPool2d(2))
        elif name == "Up":
            layers.append(nn.Upsample(scale_factor=2))
        else:
            width = int(name.removeprefix("conv").removeprefix("C"))
            layers.append(nn.Conv2d(channels, width, 3, padding=1))
            if name.startswith("C"):
                layers += [nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            channels = width
    return nn.Sequential(*layers)


class MemSTC(nn.Module):
    """Encode structure and edges, read the texture of each, decode both, fuse, compare."""

    slots, patches = (2048, 2048), 196

    def __init__(self) -> None:
        super().__init__()
        self.encoders = nn.ModuleList([network(1, ENCODER), network(1, ENCODER)])
        self.decoder = network(512, DECODER)
        self.attention = network(3, ATTENTION)
        self.textures = torch.randn(2, 2048, 512)

    def queries(self, images: Tensor) -> list[Tensor]:
        """For each memory ``[196, 512]`` an image. Brightness stands in for structure and edges."""
        brightness = images.mean(dim=1, keepdim=True)
        return [encoder(brightness).permute(0, 2, 3, 1).reshape(-1, 512) for encoder in self.encoders]

    def score(self, images: Tensor, read: Read) -> tuple[Tensor, Tensor]:
        found = [read(memory, query)[1][:, 0] for memory, query in enumerate(self.queries(images))]
        side = SIZE // 16
        maps = [
            textures[indices].reshape(-1, side, side, 512).permute(0, 3, 1, 2)
            for textures, indices in zip(self.textures, found, strict=True)
        ]
        weight = torch.sigmoid(self.attention(images))
        restored = weight * self.decoder(maps[0]) + (1 - weight) * self.decoder(maps[1])
        return (images - restored).abs().mean(dim=1), torch.cat(found)


# --- PatchCore ----------------------------------------------------------------------------------------------------


class Bottleneck(nn.Module):
    """The block of WideResNet-50-2: 1 x 1, 3 x 3 with the stride, 1 x 1, and a shortcut."""

    def __init__(self, before: int, width: int, after: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *normalised(before, width, 1, 1), nn.ReLU(inplace=True),
            *normalised(width, width, 3, stride), nn.ReLU(inplace=True),
            *normalised(width, after, 1, 1),
        )  # fmt: skip
        has_new_shape = stride > 1 or before != after
        self.shortcut = nn.Sequential(*(normalised(before, after, 1, stride) if has_new_shape else []))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x), inplace=True)


def normalised(before: int, after: int, size: int, stride: int) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(before, after, size, stride, padding=size // 2, bias=False), nn.BatchNorm2d(after)


def stage(before: int, width: int, after: int, stride: int, blocks: int) -> nn.Sequential:
    rest = [Bottleneck(after, width, after, 1) for _ in range(blocks - 1)]
    return nn.Sequential(Bottleneck(before, width, after, stride), *rest)


class PatchCore(nn.Module):
    """Features of two stages as patches, the nearest of the bank, its distance resized to the image."""

    slots, patches = (16_384,), 784

    def __init__(self) -> None:
        super().__init__()
        stem = (*normalised(3, 64, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, padding=1))
        self.second = nn.Sequential(*stem, stage(64, 128, 256, 1, 3), stage(256, 256, 512, 2, 4))
        self.third = stage(512, 512, 1024, 2, 6)

    def queries(self, images: Tensor) -> list[Tensor]:
        """``[784, 1024]`` an image."""
        second = self.second(images)
        maps = [F.avg_pool2d(x, 3, 1, padding=1) for x in (second, self.third(second))]
        resized = F.interpolate(maps[1], size=maps[0].shape[2:], mode="bilinear")
        patches = torch.cat([maps[0], resized], dim=1).permute(0, 2, 3, 1).reshape(-1, 1, 1536)
        return [F.adaptive_avg_pool1d(patches, 1024)[:, 0]]

    def score(self, images: Tensor, read: Read) -> tuple[Tensor, Tensor]:
        distances, indices = read(0, self.queries(images)[0])
        side = SIZE // 8
        near = distances.clamp(min=0).sqrt().reshape(-1, 1, side, side)
        return F.interpolate(near, size=(SIZE, SIZE), mode="bilinear"), indices[:, 0]


# --- the step with each search ------------------------------------------------------------------------------------


def pictures(count: int) -> Tensor:
    """Images with coarse and fine texture, no two alike."""
    coarse = F.interpolate(torch.rand(count, 3, 14, 14), size=(SIZE, SIZE), mode="bicubic")
    return (coarse + 0.2 * torch.rand(count, 3, SIZE, SIZE)).contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
def fitted(model: MemSTC | PatchCore) -> tuple[Any, ...]:
    """The model, one image, and memories filled with the features of other images."""
    model.to(memory_format=torch.channels_last)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 1.0  # keep the statistics of the next batch
    model.score(pictures(2), lambda memory, query: (query[:, :1].abs(), torch.zeros(len(query), 1, dtype=torch.int64)))
    model.eval()
    parts = [model.queries(batch) for batch in pictures(max(model.slots) // model.patches + 1).split(4)]
    memories = [torch.cat(part)[:slots] for part, slots in zip(zip(*parts, strict=True), model.slots, strict=True)]
    return model, pictures(1), *memories


def prepared(keys: Tensor) -> Search:
    searched = memad_fast.prepare_keys(keys)
    return lambda query: memad_fast.nearest_keys(query, searched)


def by_cdist(keys: Tensor) -> Search:
    return lambda query: cdist_argmin(query, keys)


def by_product(keys: Tensor) -> Search:
    half_squares = keys.square().sum(dim=1) / 2
    return lambda query: product_argmin(query, keys, half_squares)


def by_faiss(keys: Tensor) -> Search:
    import faiss

    index = faiss.IndexFlatL2(keys.shape[1])
    index.add(keys.numpy())

    def search(query: Tensor) -> tuple[Tensor, Tensor]:
        distances, indices = index.search(query.numpy(), 1)
        return torch.from_numpy(distances), torch.from_numpy(indices)

    return search


def with_search(name: str, prepare: Callable[[Tensor], Search], **options: Any) -> Provider:
    """The whole step, with the time of its reads."""

    def step(model: MemSTC | PatchCore, image: Tensor, *memories: Tensor) -> Step:
        searches = [prepare(keys) for keys in memories]
        score = torch.inference_mode()(model.score)
        return Step(lambda read: score(image, read), lambda memory, query: searches[memory](query))

    return Provider(name, step, **options)


PROVIDERS = [
    with_search("ours, prepared", prepared, is_ours=True),
    with_search("cdist+argmin", by_cdist),
    with_search("mm+argmin", by_product),
    with_search("faiss IndexFlatL2", by_faiss, requires="faiss"),
]


@torch.inference_mode()
def exact_step(model: MemSTC | PatchCore, image: Tensor, *memories: Tensor) -> tuple[Tensor, Tensor]:
    return model.score(image, lambda memory, query: float64_search(query, memories[memory]))


def case(name: str, build: Callable[[], MemSTC | PatchCore]) -> Case:
    return Case(
        name,
        inputs=lambda: fitted(build()),
        providers=PROVIDERS,
        expected=exact_step,
        tolerance=1e-6,
        error=lambda got, exact: largest_error(got[0], exact[0]),
        wrong=lambda got, exact: float((got[1] != exact[1]).double().mean()),
    )


CASES = [case("MemSTC-Net, one image", MemSTC), case("PatchCore, one image", PatchCore)]


@each_provider(CASES)
def bench_end_to_end(measure: Callable, case: Case, provider: Provider) -> None:
    measure(case, provider)
