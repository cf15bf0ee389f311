"""MemSTC-Net: which texture belongs to which structure is remembered from normal images, and read back by structure.

    I ── F_s ── S ── Enc_s ── z_s ── key of M_s      S  semantic structure: maps of classes, where labels exist
    I ── F_e ── E ── Enc_e ── z_e ── key of M_e      E  low-level structure: a map of edges
    I ── Enc_t ───────────── z_t ── value of both    a pair for every pixel of the encoders' map (14 × 14 at 224)

    M_s, M_e   the value beside the nearest key                                      (eq. 6, 7; StructureTextureMemory)
    Î_s, Î_e = Dec_t(read of M_s), Dec_t(read of M_e)
    Î = W·Î_s + (1 − W)·Î_e,  W = sigmoid(F_att(I));  with one structure Î is its own                        (eq. 8, 9)

    L = L_enc + λ_rec·L_rec + λ_adv·L_adv + λ_s·L_sr^s + λ_e·L_sr^e                                            (eq. 13)
    L_enc  = λ1·mean|I − Dec_t(z_t)| + λ2·mean|S − Dec_s(z_s)| + λ3·mean|E − Dec_e(z_e)|                        (eq. 4)
    L_rec  = mean|I − Î|,  L_sr = mean|F(I) − F(Î)| for each F                                             (eq. 10, 12)
    L_adv  = mean(−log D(Î));  D minimises mean(−log D(I)) + mean(−log(1 − D(Î)))              (eq. 11, non-saturating)
    A = (1 − γ)·mean|I − Î| + γ·mean|S − Ŝ|                                                                    (eq. 16)

Who learns from what: F_s and F_e are frozen. What is stored is detached, and a read tells nobody which key was nearest;
so L_rec, L_adv and L_sr, which all come through Î, reach Dec_t and F_att only. Enc_t, Enc_s, Enc_e, Dec_s and Dec_e
learn from L_enc, and Dec_t from that too. Without a memory ("concat") Î reaches the encoders as well.

Source: K. Zhou et al., "Memorizing Structure-Texture Correspondence for Image Anomaly Detection". The paper does not
give the form of the discriminator or of the GAN loss; they are those of pix2pix, which it follows elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from memad_fast._arguments import check_choice
from memad_fast.index import Index
from memad_fast.memory import StructureTextureIndex, StructureTextureMemory
from memad_fast.models.base import (
    AnomalyModel,
    Objective,
    Preset,
    Scores,
    Stage,
    Trainable,
    TrainingSettings,
    parameters_of,
)
from memad_fast.models.convolution import convolution, convolutions
from memad_fast.models.discriminator import PatchDiscriminator, judge, non_saturating_critic, non_saturating_maker
from memad_fast.models.extractors import EdgeConfig, EdgeExtractor, SemanticExtractor

STRUCTURES = ("semantic", "edges")


@dataclass(frozen=True)
class MemSTCConfig:
    """The architecture, the losses and the score of a MemSTC-Net; every value is plain JSON.

    Attributes:
        image_size: side of the square images, in pixels; 16 (for the extractors) and 2 to the number of ``widths``
            divide it.
        channels: 1 (grey) or 3 (colour).
        structures: "semantic", "edges" or both, in this order (table VI). Edges alone is the industrial mode; with
            "semantic" an F_s is to be given to ``MemSTC``.
        widths: channels of the encoders' levels, with a max-pool after each.
        edge_width: channels of the first level of F_e, where none is given.
        critic_width, critic_strides: of the discriminator, see ``PatchDiscriminator``.
        items: k, pairs that each memory holds.
        memory: "stcm", or "concat": no memory, the decoder gets structure and texture features side by side. One for
            all structures, or one for each (table VII).
        key: what is searched, "structure" or "structure+texture" (table VIII).
        value: what is read, "texture" or "structure+texture" (table VIII).
        fusion: of Î_s and Î_e: "attention" (eq. 8, 9) or "mean" (table IX).
        encoding_weights: λ1, λ2, λ3 of L_enc: texture, semantic structure, edges. With memories, λ2 and λ3 scale all
            that their encoder and decoder learn from; Adam takes the same steps whatever they are, but for 0.
        reconstruction_weight: λ_rec.
        adversarial_weight: λ_adv; 0 leaves the discriminator out.
        semantic_weight, edge_weight: λ_sr of each structure; 0 leaves its regularisation out (table X).
        gamma: γ, the share of the semantic structure in the score (table XI).
        cycles: how often the image passes through the network before it is compared (table XII).
    """

    image_size: int
    channels: int
    structures: tuple[str, ...] = ("edges",)
    widths: tuple[int, ...] = (64, 128, 256, 512)
    edge_width: int = 32
    critic_width: int = 64
    critic_strides: int = 3
    items: int = 2048
    memory: tuple[str, ...] = ("stcm",)
    key: str = "structure"
    value: str = "texture"
    fusion: str = "attention"
    encoding_weights: tuple[float, ...] = (0.5, 0.5, 0.5)
    reconstruction_weight: float = 1.0
    adversarial_weight: float = 0.1
    semantic_weight: float = 0.05
    edge_weight: float = 0.01
    gamma: float = 0.0
    cycles: int = 1

    def __post_init__(self) -> None:
        for name, kinds, entry in (
            ("structures", (str,), "a structure"),
            ("memory", (str,), "a memory"),
            ("widths", (int,), "a width"),
            ("encoding_weights", (int, float), "a weight"),
        ):
            value = getattr(self, name)
            value = (value,) if isinstance(value, str) else value
            if not isinstance(value, (list, tuple)) or not value or not all(type(each) in kinds for each in value):
                raise ValueError(f"{name}: expected {entry} or several, got {value!r}")
            object.__setattr__(self, name, tuple(value))  # JSON gives lists
        for name, least in (
            ("image_size", 1), ("channels", 1), ("edge_width", 1), ("critic_width", 1), ("critic_strides", 0),
            ("items", 1), ("cycles", 1),
        ):  # fmt: skip
            if type(getattr(self, name)) is not int or getattr(self, name) < least:
                raise ValueError(f"{name}: expected an int of at least {least}, got {getattr(self, name)!r}")
        if self.channels not in (1, 3):
            raise ValueError(f"channels: expected 1 or 3, got {self.channels}")
        self._check_structures()
        self._check_sizes()
        check_choice("key", self.key, ("structure", "structure+texture"))
        check_choice("value", self.value, ("texture", "structure+texture"))
        check_choice("fusion", self.fusion, ("attention", "mean"))
        self._check_weights()

    def memory_of(self, structure: str) -> str:
        """ "stcm" or "concat"."""
        return self.memory[self.structures.index(structure) if len(self.memory) > 1 else 0]

    def _check_structures(self) -> None:
        if self.structures not in (("semantic",), ("edges",), STRUCTURES):
            raise ValueError(f"structures: expected semantic, edges or semantic,edges, got {','.join(self.structures)}")
        for each in self.memory:
            check_choice("memory", each, ("stcm", "concat"))
        if len(self.memory) not in (1, len(self.structures)):
            raise ValueError(
                f"memory: expected one, or one for each of {','.join(self.structures)}, got {','.join(self.memory)}"
            )

    def _check_sizes(self) -> None:
        if len(self.widths) < 2 or min(self.widths) < 1:
            raise ValueError(f"widths: expected at least two positive widths, got {self.widths}")
        divisor = max(16, 1 << len(self.widths))
        if self.image_size % divisor or self.image_size < 32:
            raise ValueError(
                f"image_size: expected a multiple of {divisor}, at least 32 ({len(self.widths)} poolings; 4 of the"
                f" extractors), got {self.image_size}"
            )
        if self.adversarial_weight and self.image_size >> self.critic_strides < 3:
            raise ValueError(
                f"critic_strides: {self.critic_strides} leave nothing of {self.image_size} pixels (image_size) to judge"
            )

    def _check_weights(self) -> None:
        if len(self.encoding_weights) != 3:
            raise ValueError(f"encoding_weights: expected λ1, λ2 and λ3, got {self.encoding_weights}")
        weights = {f"encoding_weights[{index}]": value for index, value in enumerate(self.encoding_weights)} | {
            name: getattr(self, name)
            for name in ("reconstruction_weight", "adversarial_weight", "semantic_weight", "edge_weight")
        }
        for name, value in weights.items():
            if type(value) not in (int, float) or not 0.0 <= value < math.inf:
                raise ValueError(f"{name}: expected a finite number of at least 0, got {value!r}")
        if type(self.gamma) not in (int, float) or not 0.0 <= self.gamma <= 1.0:
            raise ValueError(f"gamma: expected 0 to 1, got {self.gamma!r}")
        if self.gamma > 0 and "semantic" not in self.structures:
            raise ValueError(f"gamma: expected 0 without the semantic structure, got {self.gamma}")


class Branch(nn.Module):
    """One kind of structure: its extractor, its auto-encoder, its memory, and what a read becomes for Dec_t."""

    def __init__(self, config: MemSTCConfig, name: str, extractor: EdgeExtractor | SemanticExtractor) -> None:
        super().__init__()
        self.config = config
        self.extractor = extractor
        maps = extractor.config.classes if isinstance(extractor, SemanticExtractor) else 1
        depth = config.widths[-1]
        self.encoder = make_encoder(maps, config.widths)
        self.decoder = make_decoder(maps, config.widths)
        self.memory: StructureTextureMemory | StructureTextureIndex | None = None
        wide = config.memory_of(name) == "concat" or config.value == "structure+texture"
        if config.memory_of(name) == "stcm":
            key_dim = depth if config.key == "structure" else 2 * depth
            self.memory = StructureTextureMemory(config.items, key_dim, 2 * depth if wide else depth)
        # Dec_t takes texture features; where those of the structure are beside them, a convolution makes one of both.
        self.join = nn.Conv2d(2 * depth, depth, 1) if wide else nn.Identity()

    @property
    def queries_texture(self) -> bool:
        """Whether a read needs the image's own texture features."""
        return self.memory is None or self.config.key == "structure+texture"

    def read(self, structure: Tensor, texture: Tensor | None) -> Tensor:
        """What Dec_t gets for the features ``[B, D, h, w]`` of one batch."""
        if self.memory is None:
            return self.join(_joined(structure, texture))
        if self.training and self.memory.is_empty:  # the first batch of all finds nothing but itself
            _, read = self.pair(structure, texture)
        else:
            read, _, _ = self.memory(self._key(structure, texture))
        count, _, height, width = structure.shape
        return self.join(read.to(structure.dtype).unflatten(0, (count, height, width)).permute(0, 3, 1, 2))

    def pair(self, structure: Tensor, texture: Tensor | None) -> tuple[Tensor, Tensor]:
        """Keys and values ``[B·h·w, …]`` of these features: one of each a pixel, detached."""
        assert texture is not None
        value = texture if self.config.value == "texture" else _joined(structure, texture)
        return self._key(structure, texture), _pixels(value)

    def _key(self, structure: Tensor, texture: Tensor | None) -> Tensor:
        return _pixels(structure if self.config.key == "structure" else _joined(structure, texture))


@dataclass(frozen=True)
class Encoded:
    """What the network sees in one batch of images."""

    structures: dict[str, Tensor]  # S [B, classes, H, W], E [B, 1, H, W], in [0, 1]; by name
    features: dict[str, Tensor]  # z_s, z_e [B, D, h, w]
    texture: Tensor | None  # z_t [B, D, h, w]; None where it was not asked for


class MemSTC(AnomalyModel):
    """Structure-texture correspondence memory for image anomaly detection.

    Args:
        config: the architecture; ``MemSTC.presets()`` holds the published settings and small ones.
        edges: F_e, where it was trained beforehand; else the first stage trains one.
        semantic: F_s, trained beforehand on labelled images of some source; needed for the semantic structure.

    Raises:
        ValueError: the semantic structure is asked for and no F_s given, or a part is given that is not asked for.

    ``image_score`` is A of eq. 16, ``anomaly_map`` the same for every pixel, ``reconstruction`` Î, which may leave
    [0, 1] a little: its last layer is a plain convolution. ``parts``: "image", mean|I − Î|, and with the semantic
    structure "semantic", mean|S − Ŝ|.

    The memories are read and written one pixel of the encoders' map at a time, in training first read and then written,
    else every pixel would find itself. So does the very first batch, for which there is nothing to read yet. An image
    that is scored is seen through its structure alone: Enc_t is not run, unless "concat" or ``key`` ask for it.

    Example:
        >>> import torch
        >>> from memad_fast.models import MemSTC
        >>> model = MemSTC(MemSTC.presets()["digits"].config)
        >>> model.remember(torch.rand(2, 1, 32, 32))
        >>> model.score(torch.rand(2, 1, 32, 32)).reconstruction.shape
        torch.Size([2, 1, 32, 32])
    """

    name: ClassVar[str] = "memstc"
    Config: ClassVar[type] = MemSTCConfig
    PARTS: ClassVar[Mapping[str, type[Trainable]]] = {"edges": EdgeExtractor, "semantic": SemanticExtractor}
    config: MemSTCConfig

    def __init__(
        self,
        config: MemSTCConfig,
        *,
        edges: EdgeExtractor | None = None,
        semantic: SemanticExtractor | None = None,
    ) -> None:
        super().__init__(config, edges=edges, semantic=semantic)
        if "semantic" in config.structures and semantic is None:
            raise ValueError(
                "semantic: labels of some source are needed for the semantic structure: train an extractor on them"
                " (memad-fast fit-semantic) and give it as part semantic; structures=edges does without"
            )
        for name in self.given_parts:
            if name not in config.structures:
                raise ValueError(
                    f"{name}: a part is given that structures={','.join(config.structures)} has no use for; set"
                    " structures to semantic, edges or semantic,edges"
                )
        if "edges" in config.structures and edges is None:
            edges = EdgeExtractor(EdgeConfig(config.image_size, config.channels, config.edge_width))
        self.texture_encoder = make_encoder(config.channels, config.widths)
        self.texture_decoder = make_decoder(config.channels, config.widths)
        self.branches = nn.ModuleDict(
            {
                name: Branch(config, name, extractor)
                for name, extractor in (("semantic", semantic), ("edges", edges))
                if extractor is not None
            }
        )
        attends = len(config.structures) == 2 and config.fusion == "attention"
        self.attention = make_attention(config.channels, config.widths) if attends else None
        self.critic = (
            PatchDiscriminator(config.channels, width=config.critic_width, strides=config.critic_strides)
            if config.adversarial_weight
            else None
        )
        # What the generator's part of a training step leaves for those that come after it.
        self._made: Tensor | None = None  # Î
        self._pairs: dict[str, tuple[Tensor, Tensor]] = {}  # for each memory

    @classmethod
    def presets(cls) -> dict[str, Preset]:
        """Settings by name.

        "small" is for folders of parts, "digits" for images of a few dozen pixels: narrow networks that train on two
        CPU cores in minutes, on edges alone. "paper-industrial" is the published setting for MVTec, "paper" and
        "paper-oct" those for fundus and OCT images, which need an F_s.
        """
        return {**_SMALL, **_PAPER}

    @classmethod
    def paper(cls, setting: str = "paper-industrial", **parts: Any) -> MemSTC:
        """An untrained network in a published setting: "paper-industrial", "paper" or "paper-oct"."""
        check_choice("setting", setting, tuple(_PAPER))
        return cls(_PAPER[setting].config, **parts)

    def stages(self) -> tuple[Stage, ...]:
        """F_e, where edges are used and none is given; then the rest: generator and discriminator in turns."""
        generator: list[nn.Module | None] = [self.texture_encoder, self.texture_decoder, self.attention]
        for branch in self._branches().values():
            generator += [branch.encoder, branch.decoder, branch.join]
        objectives = [Objective("generator", parameters_of(*generator), self.generator_losses)]
        if self.critic is not None:
            objectives.append(Objective("critic", parameters_of(self.critic), self.critic_losses))
        rest = Stage("memory", tuple(objectives), observe=self._remember_step, time_share=4.0)
        if "edges" in self.given_parts or "edges" not in self.branches:
            return (rest,)
        return (*self._branches()["edges"].extractor.stages(), rest)

    def generator_losses(self, images: Tensor) -> dict[str, Tensor]:
        """``total`` (eq. 13) and its terms before their λ; in ``encoding`` (L_enc, eq. 4) λ1 to λ3 are included.

        The other terms are ``reconstruction``, ``adversarial``, ``semantic`` and ``edges`` (L_sr), those in use.
        """
        encoded = self._encode(images)
        assert encoded.texture is not None
        made = self._make(images, encoded)
        self._made, self._pairs = made.detach(), self._pairs_of(encoded)
        of_texture, of_semantic, of_edges = self.config.encoding_weights
        encoding = of_texture * _l1(images, self.texture_decoder(encoded.texture))
        terms = {"reconstruction": (self.config.reconstruction_weight, _l1(images, made))}
        if self.critic is not None:
            adversarial = non_saturating_maker(judge(self.critic, made))
            terms["adversarial"] = (self.config.adversarial_weight, adversarial)
        for name, branch in self._branches().items():
            structure = encoded.structures[name]
            of_structure = of_semantic if name == "semantic" else of_edges
            encoding = encoding + of_structure * _l1(structure, branch.decoder(encoded.features[name]))
            weight = self.config.semantic_weight if name == "semantic" else self.config.edge_weight
            if weight:
                terms[name] = (weight, _l1(structure, branch.extractor.extract(made)))
        total = encoding + torch.stack([weight * value for weight, value in terms.values()]).sum()
        return {"total": total, "encoding": encoding, **{name: value for name, (_, value) in terms.items()}}

    def critic_losses(self, images: Tensor) -> dict[str, Tensor]:
        """``total`` of the discriminator (eq. 11): ``images`` against the Î that ``generator_losses`` made of them."""
        assert self.critic is not None
        assert self._made is not None, "generator_losses comes first"
        return {"total": non_saturating_critic(self.critic(images), self.critic(self._made.to(images.dtype)))}

    @property
    def indexes(self) -> dict[str, Index]:
        """The memories that are indexes, by the structure that is their key: "semantic", "edges"."""
        memories = {name: branch.memory for name, branch in self._branches().items()}
        return {name: each.index for name, each in memories.items() if isinstance(each, StructureTextureIndex)}

    def use_indexes(self, indexes: Mapping[str, Index]) -> None:
        """Remember in these indexes from now on: pairs of years, with ``remember``, on a disk.

        An empty one takes over the pairs that the memory holds, oldest first, so that scores stay what they are (ties
        between keys aside); one that holds pairs is read instead. A training writes at every step what it cannot take
        back: fit first, then use indexes.

        Args:
            indexes: by structure: metric "l2", keys and values as long as those of the memory.

        Raises:
            ValueError: no such memory, or an index that does not fit it.
        """
        memories = {name: branch.memory for name, branch in self._branches().items() if branch.memory is not None}
        super().use_indexes({name: index for name, index in indexes.items() if name not in memories})
        made = {name: StructureTextureMemory.on(index) for name, index in indexes.items()}
        for name, index in indexes.items():
            expected, got = _dims(memories[name]), (index.dim, index.values_dim)
            if got != expected:
                raise ValueError(f"index: expected (dim, values_dim) {expected} for memory {name!r}, got {got}")
        for name, memory in made.items():
            former = memories[name]
            if memory.is_empty and isinstance(former, StructureTextureMemory):
                memory.copy_from(former)
            self._branches()[name].memory = memory.train(former.training)

    @torch.no_grad()
    def remember(self, images: Tensor) -> None:
        """Write the pairs of ``images`` ``[B, C, H, W]`` into the memories, as the network sees them in eval mode."""
        self.check_images(images)
        training = self.training
        self.eval()
        self._write(self._pairs_of(self._encode(images)))
        self.train(training)

    def _remember_step(self, images: Tensor) -> None:
        """End a training step: write what it saw. With several devices that is each one's share of ``images``, and the
        memories gather the shares.
        """
        self._write(self._pairs)
        self._made, self._pairs = None, {}

    def _pairs_of(self, encoded: Encoded) -> dict[str, tuple[Tensor, Tensor]]:
        return {
            name: branch.pair(encoded.features[name], encoded.texture)
            for name, branch in self._branches().items()
            if branch.memory is not None
        }

    def _write(self, pairs: dict[str, tuple[Tensor, Tensor]]) -> None:
        for name, (keys, values) in pairs.items():
            memory = self._branches()[name].memory
            assert memory is not None
            memory.train().write(keys, values)

    def _score(self, images: Tensor) -> Scores:
        if any(branch.memory is not None and branch.memory.is_empty for branch in self._branches().values()):
            raise RuntimeError("the memory is empty: fit the model, remember(images), or load a run, first")
        with_texture = any(branch.queries_texture for branch in self._branches().values())
        encoded = self._encode(images, with_texture=with_texture)
        made = self._make(images, encoded)
        for _ in range(self.config.cycles - 1):
            made = self._make(made, self._encode(made, with_texture=with_texture))
        heat = _error(images, made)
        parts = {"image": heat.mean(dim=(1, 2, 3))}
        if "semantic" in self.branches:
            gamma, extractor = self.config.gamma, self._branches()["semantic"].extractor
            semantic = _error(encoded.structures["semantic"], extractor.extract(made))
            parts["semantic"] = semantic.mean(dim=(1, 2, 3))
            heat = (1 - gamma) * heat + gamma * semantic
        return Scores(heat.mean(dim=(1, 2, 3)), heat, made.float(), parts)

    def _encode(self, images: Tensor, *, with_texture: bool = True) -> Encoded:
        branches = self._branches()
        with torch.no_grad():
            structures = {name: branch.extractor.extract(images) for name, branch in branches.items()}
        features = {name: branch.encoder(structures[name]) for name, branch in branches.items()}
        return Encoded(structures, features, self.texture_encoder(images) if with_texture else None)

    def _make(self, images: Tensor, encoded: Encoded) -> Tensor:
        """Î (eq. 9)."""
        reads = [branch.read(encoded.features[name], encoded.texture) for name, branch in self._branches().items()]
        made = [self.texture_decoder(read) for read in reads]
        if len(made) == 1:
            return made[0]
        weight = 0.5 if self.attention is None else self.attention(images).sigmoid()
        return weight * made[0] + (1 - weight) * made[1]

    def _branches(self) -> dict[str, Branch]:
        """Of each structure in use, "semantic" first."""
        return cast("dict[str, Branch]", dict(self.branches.items()))


def make_encoder(channels: int, widths: Sequence[int]) -> nn.Sequential:
    """C64 C64 Mp C128 C128 Mp C256 C256 Mp C512 C512 Mp C512 C512."""
    layers, source = [], channels
    for width in widths:
        layers += [*convolutions(source, width), nn.MaxPool2d(2)]
        source = width
    return nn.Sequential(*layers, *convolutions(source, source))


def make_decoder(channels: int, widths: Sequence[int]) -> nn.Sequential:
    """Up C512 C512 Up C256 C256 Up C128 C128 Up C64 C64 C_m; the last is a plain convolution."""
    layers, source = [], widths[-1]
    for width in reversed(widths):
        layers += [nn.Upsample(scale_factor=2), *convolutions(source, width)]
        source = width
    return nn.Sequential(*layers, nn.Conv2d(source, channels, 3, padding=1))


def make_attention(channels: int, widths: Sequence[int]) -> nn.Sequential:
    """F_att: C64 C64 Mp C128 C128 Up C64 C1; a plain convolution last, since BN and ReLU would hold W above 0.5."""
    low, high = widths[:2]
    return nn.Sequential(
        *convolutions(channels, low),
        nn.MaxPool2d(2),
        *convolutions(low, high),
        nn.Upsample(scale_factor=2),
        *convolution(high, low),
        nn.Conv2d(low, 1, 3, padding=1),
    )


def _dims(memory: StructureTextureMemory | StructureTextureIndex) -> tuple[int, int | None]:
    """Length of a key and of a value."""
    if isinstance(memory, StructureTextureIndex):
        return memory.index.dim, memory.index.values_dim
    return memory.keys.shape[1], memory.values.shape[1]


def _joined(structure: Tensor, texture: Tensor | None) -> Tensor:
    assert texture is not None
    return torch.cat((structure, texture), dim=1)


def _pixels(features: Tensor) -> Tensor:
    """``[B, D, h, w]`` → ``[B·h·w, D]``, detached."""
    return features.detach().permute(0, 2, 3, 1).flatten(0, 2)


def _l1(target: Tensor, made: Tensor) -> Tensor:
    """The mean of |difference|, float32 where autocast gives 16 bits."""
    return functional.l1_loss(made.to(target.dtype), target)


def _error(target: Tensor, made: Tensor) -> Tensor:
    """|difference| of every pixel, averaged over the channels: ``[B, 1, H, W]`` float32."""
    return (target - made).abs().float().mean(dim=1, keepdim=True)


_PAPER_TRAINING = TrainingSettings(learning_rate=1e-3, batch_size=8, epochs=800, betas=(0.1, 0.9))

# Section IV-A and, for γ, table XI.
_PAPER = {
    "paper": Preset(MemSTCConfig(image_size=224, channels=3, structures=STRUCTURES, gamma=0.4), _PAPER_TRAINING),
    "paper-oct": Preset(MemSTCConfig(image_size=224, channels=1, structures=STRUCTURES, gamma=0.8), _PAPER_TRAINING),
    "paper-industrial": Preset(MemSTCConfig(image_size=224, channels=3), _PAPER_TRAINING),
}

# Settled on folders of 31 and 168 images at 64 pixels and on scikit-learn's digits. The rate falls over most of the few
# steps: at β1 = 0.1 each follows its own batch, and a constant rate ends wherever the last one led.
_SMALL_TRAINING = TrainingSettings(learning_rate=1e-3, batch_size=8, epochs=30, betas=(0.1, 0.9), constant_share=0.3)

# Three poolings: with the paper's four, 64 pixels would leave 4 × 4 of them to remember.
_SMALL = {
    "small": Preset(
        MemSTCConfig(image_size=64, channels=1, widths=(8, 16, 32), edge_width=8, critic_width=8, critic_strides=2),
        _SMALL_TRAINING,
    ),
    "digits": Preset(
        MemSTCConfig(image_size=32, channels=1, widths=(8, 16, 32), edge_width=8, critic_width=8, critic_strides=1),
        _SMALL_TRAINING,
    ),
}
