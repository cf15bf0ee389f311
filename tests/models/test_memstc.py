"""MemSTC-Net, whole: losses by hand, who learns from what, memories, options, parts, bad input, a planted defect."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from devices import NothingWaits
from torch import Tensor, nn

from memad_fast.data import from_arrays
from memad_fast.index import ExactIndex
from memad_fast.models import EdgeConfig, EdgeExtractor, MemSTC, MemSTCConfig, SemanticConfig, SemanticExtractor
from memad_fast.models.memstc import make_attention, make_decoder, make_encoder
from memad_fast.scoring import fit, load_run, save_run

TINY = MemSTCConfig(
    image_size=32, channels=1, widths=(4, 6, 8), edge_width=2, critic_width=4, critic_strides=1, items=300
)
BOTH = replace(TINY, structures=("semantic", "edges"), gamma=0.5)


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """These networks are too small to share."""


@pytest.fixture
def images() -> Tensor:
    return torch.rand(4, 1, 32, 32)


def make_semantic(image_size: int = 32, channels: int = 1) -> SemanticExtractor:
    config = SemanticConfig(image_size=image_size, channels=channels, values=(0, 1, 2), width=2, critic_width=4)
    return SemanticExtractor(config)


def make_tiny(config: MemSTCConfig = TINY, *, step: Tensor | None = None, **changes: Any) -> MemSTC:
    """A network with random weights, in training mode; with ``step``, one that remembers these images."""
    torch.manual_seed(0)
    config = replace(config, **changes)
    model = MemSTC(config, semantic=make_semantic() if "semantic" in config.structures else None).train()
    if step is not None:
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.momentum = 1.0  # running statistics are those of these images: nothing fades on its way
        with torch.no_grad():
            for branch in model.branches.values():
                branch.extractor.train()(step)
            model.generator_losses(step)
            model._remember_step(step)
    return model


def train(model: MemSTC, images: Tensor, steps: int, lr: float = 3e-3) -> list[float]:
    """As ``fit`` does, without its care for everything else; the totals of the generator."""
    model.train()
    totals = []
    for stage in model.stages():
        optimizers = [torch.optim.Adam(objective.parameters, lr=lr) for objective in stage.objectives]
        for _ in range(steps):
            for objective, optimizer in zip(stage.objectives, optimizers, strict=True):
                loss = objective.losses(images)["total"]
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if objective.name == "generator":
                    totals.append(float(loss.detach()))
            if stage.observe is not None:
                stage.observe(images)
    return totals


def layers(module: nn.Module) -> str:
    """The layers as the paper writes them."""
    words = []
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            assert (layer.kernel_size, layer.stride, layer.padding) == ((3, 3), (1, 1), (1, 1))
            words.append(f"C{layer.out_channels}")
        elif isinstance(layer, nn.MaxPool2d):
            words.append("Mp")
        elif isinstance(layer, nn.Upsample):
            words.append("Up")
    return " ".join(words)


def test_the_networks_are_those_of_the_paper() -> None:
    """Section IV-A.1; the last layer of a decoder and of F_att is without BatchNorm and ReLU."""
    widths = (64, 128, 256, 512)
    assert layers(make_encoder(3, widths)) == "C64 C64 Mp C128 C128 Mp C256 C256 Mp C512 C512 Mp C512 C512"
    assert layers(make_decoder(3, widths)) == "Up C512 C512 Up C256 C256 Up C128 C128 Up C64 C64 C3"
    assert layers(make_attention(3, widths)) == "C64 C64 Mp C128 C128 Up C64 C1"
    for network, plain in ((make_encoder(3, widths), 0), (make_decoder(3, widths), 1), (make_attention(3, widths), 1)):
        kinds = [type(layer) for layer in network]
        assert kinds.count(nn.Conv2d) - kinds.count(nn.BatchNorm2d) == plain
        assert kinds.count(nn.ReLU) == kinds.count(nn.BatchNorm2d)
        assert (kinds[-1] is nn.Conv2d) == bool(plain)
    with torch.device("meta"):
        features = make_encoder(3, widths)(torch.empty(1, 3, 224, 224))
        assert features.shape == (1, 512, 14, 14)
        assert make_decoder(3, widths)(features).shape == (1, 3, 224, 224)


def test_shapes_and_dtypes(images: Tensor) -> None:
    for config in (TINY, BOTH):
        scores = make_tiny(config, step=images).score(images.double())
        assert scores.image_score.shape == (4,)
        assert scores.anomaly_map.shape == (4, 1, 32, 32)
        assert scores.reconstruction.shape == (4, 1, 32, 32)
        assert set(scores.parts) == ({"image", "semantic"} if config is BOTH else {"image"})
        everything = (scores.image_score, scores.anomaly_map, scores.reconstruction, *scores.parts.values())
        assert {value.dtype for value in everything} == {torch.float32}
        assert not any(value.requires_grad for value in everything)


def by_hand(model: MemSTC, images: Tensor) -> dict[str, Tensor]:
    """Î and everything before it, as the equations say, from the networks' parts and a plain search (eval mode)."""
    found = {"texture": model.texture_encoder(images)}
    made = []
    for name, branch in model.branches.items():
        logits = branch.extractor.network(images)
        structure = logits.softmax(dim=1) if name == "semantic" else logits.sigmoid()
        feature = branch.encoder(structure)
        filled = int(branch.memory.filled)
        keys, values = branch.memory.keys[:filled].double(), branch.memory.values[:filled]
        rows = feature.permute(0, 2, 3, 1).reshape(-1, feature.shape[1]).double()
        nearest = (rows[:, None] - keys[None]).square().sum(dim=2).argmin(dim=1)
        read = values[nearest].reshape(len(images), 4, 4, -1).permute(0, 3, 1, 2)
        made.append(model.texture_decoder(read))
        found |= {name: structure, f"{name}_feature": feature, f"{name}_made": made[-1]}
    if len(made) == 2:
        weight = 1 / (1 + torch.exp(-model.attention(images)))
        made = [weight * made[0] + (1 - weight) * made[1]]
    return found | {"made": made[0]}


@pytest.mark.parametrize("config", [TINY, BOTH])
def test_every_loss_is_what_its_equation_says(config: MemSTCConfig, images: Tensor) -> None:
    weights = {
        "encoding_weights": (0.3, 0.6, 0.9), "reconstruction_weight": 1.1, "adversarial_weight": 0.2,
        "semantic_weight": 0.07, "edge_weight": 0.03,
    }  # fmt: skip
    model = make_tiny(config, step=images, **weights).eval()
    other = torch.rand(3, 1, 32, 32)
    losses = model.generator_losses(other)
    with torch.no_grad():
        hand = by_hand(model, other)
        expected = {"encoding": 0.3 * (other - model.texture_decoder(hand["texture"])).abs().mean()}
        for name, weight in (("semantic", 0.6), ("edges", 0.9)):
            if name in config.structures:
                branch = model.branches[name]
                expected["encoding"] += weight * (hand[name] - branch.decoder(hand[f"{name}_feature"])).abs().mean()
                after = branch.extractor.network(hand["made"])
                after = after.softmax(dim=1) if name == "semantic" else after.sigmoid()
                expected[name] = (hand[name] - after).abs().mean()
        expected["reconstruction"] = (other - hand["made"]).abs().mean()
        expected["adversarial"] = -model.critic(hand["made"]).sigmoid().log().mean()
        expected["total"] = expected["encoding"] + 1.1 * expected["reconstruction"] + 0.2 * expected["adversarial"]
        expected["total"] += 0.07 * expected.get("semantic", 0.0) + 0.03 * expected["edges"]
        real, made = model.critic(other).sigmoid(), model.critic(hand["made"]).sigmoid()
        critic = -real.log().mean() - (1 - made).log().mean()
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-4, atol=1e-6, msg=name)
    torch.testing.assert_close(model.critic_losses(other)["total"], critic, rtol=1e-4, atol=1e-6)


def test_the_published_weights_are_the_default() -> None:
    config = MemSTCConfig(image_size=32, channels=1)
    assert config.encoding_weights == (0.5, 0.5, 0.5)
    assert (config.reconstruction_weight, config.adversarial_weight) == (1.0, 0.1)
    assert (config.semantic_weight, config.edge_weight) == (0.05, 0.01)


def reached(model: MemSTC, loss: Tensor) -> set[str]:
    """The parts of the network whose every parameter this loss moves; no part may be moved in part."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    parts = {
        "Enc_t": model.texture_encoder,
        "Dec_t": model.texture_decoder,
        "D": model.critic,
        "F_att": model.attention,
    }
    for name, branch in model.branches.items():
        parts |= {f"F_{name}": branch.extractor, f"Enc_{name}": branch.encoder, f"Dec_{name}": branch.decoder}
        parts |= {f"join_{name}": branch.join}
    found = set()
    for name, part in parts.items():
        moved = [value.grad is not None and bool(value.grad.any()) for value in part.parameters()] if part else []
        assert all(moved) or not any(moved), name
        if any(moved):
            found.add(name)
    return found


@pytest.mark.parametrize("first", [False, True])
def test_who_learns_from_what(first: bool, images: Tensor) -> None:
    """What comes through Î stops at the memory: Dec_t and F_att alone learn from L_rec, L_adv and L_sr.

    The first batch of all, which reads itself, is no exception; Î_s and Î_e are the same then: W learns nothing.
    """
    model = make_tiny(BOTH, step=None if first else images)
    other = torch.rand(4, 1, 32, 32)

    def of(name: str) -> set[str]:
        return reached(model, model.generator_losses(other)[name])

    for name in ("reconstruction", "adversarial", "semantic", "edges"):
        assert of(name) == ({"Dec_t"} if first else {"Dec_t", "F_att"}), name
    assert of("encoding") == {"Enc_t", "Dec_t", "Enc_semantic", "Dec_semantic", "Enc_edges", "Dec_edges"}
    assert reached(model, model.critic_losses(other)["total"]) == {"D"}


def test_a_joined_value_is_brought_to_the_decoders_width_by_what_learns_with_it(images: Tensor) -> None:
    model = make_tiny(step=images, value="structure+texture")
    assert reached(model, model.generator_losses(images)["reconstruction"]) == {"Dec_t", "join_edges"}


def test_without_memory_the_encoders_learn_from_the_image(images: Tensor) -> None:
    model = make_tiny(memory=("concat",))
    losses = model.generator_losses(images)
    assert reached(model, losses["reconstruction"]) == {"Dec_t", "Enc_t", "Enc_edges", "join_edges"}
    assert model.branches["edges"].memory is None


def test_frozen_extractors_stay_as_they_are(images: Tensor) -> None:
    model = make_tiny(BOTH)
    before = {name: value.clone() for name, value in model.branches["semantic"].extractor.state_dict().items()}
    edges = {name: value.clone() for name, value in model.branches["edges"].extractor.state_dict().items()}
    train(model, images, 2)
    after = model.branches["semantic"].extractor.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    after = model.branches["edges"].extractor.state_dict()
    assert not all(torch.equal(value, after[name]) for name, value in edges.items())  # the first stage
    edges = {name: value.clone() for name, value in after.items()}
    model.generator_losses(images)["total"].backward()
    assert all(torch.equal(value, after[name]) for name, value in edges.items())


def test_a_step_reads_before_it_writes(images: Tensor) -> None:
    """Else every pixel would find itself, and Î would be what the texture auto-encoder gives."""
    model = make_tiny(step=images)
    memory, other = model.branches["edges"].memory, torch.rand(4, 1, 32, 32)
    assert int(memory.filled) == 4 * 16
    with torch.no_grad():
        encoded = model.eval()._encode(other)
        made = model._make(other, encoded)
        assert not torch.allclose(made, model.texture_decoder(encoded.texture), atol=1e-4)
        model.train().generator_losses(other)
        keys, values = model._pairs["edges"]
        model._remember_step(other)
    assert int(memory.filled) == 8 * 16
    assert torch.equal(memory.keys[64:128], keys)
    assert torch.equal(memory.values[64:128], values)
    assert not memory.keys.requires_grad


@pytest.mark.parametrize("key", ["structure", "structure+texture"])
@pytest.mark.parametrize("value", ["texture", "structure+texture"])
def test_a_pair_is_the_structure_and_the_texture_of_one_pixel(key: str, value: str, images: Tensor) -> None:
    model = make_tiny(step=images, key=key, value=value).eval()
    with torch.no_grad():
        encoded = model._encode(images)
        keys, values = model._pairs_of(encoded)["edges"]
    texture = encoded.texture.permute(0, 2, 3, 1)
    both = torch.cat((encoded.features["edges"].permute(0, 2, 3, 1), texture), dim=3)
    row = 2 * 16 + 1 * 4 + 3  # of image 2, the pixel in line 1 and column 3
    assert torch.equal(keys[row], both[2, 1, 3, : 8 if key == "structure" else 16])
    assert torch.equal(values[row], (texture if value == "texture" else both)[2, 1, 3])


def test_an_image_that_is_scored_is_seen_through_its_structure_alone(images: Tensor) -> None:
    """Tables VII and VIII are the exceptions: there the image's own texture is let in."""
    for changes in ({}, {"value": "structure+texture"}, {"memory": "concat"}, {"key": "structure+texture"}):
        model = make_tiny(step=images, **changes).eval()
        before = model.score(images).reconstruction
        for parameter in model.texture_encoder.parameters():
            parameter.data.normal_()
        changed = not torch.equal(model.score(images).reconstruction, before)
        assert changed == (changes.get("memory") == "concat" or "key" in changes), changes


def test_the_memory_holds_the_newest_pairs(images: Tensor) -> None:
    model = make_tiny(items=100)
    train(model, images, 2)
    assert int(model.branches["edges"].memory.filled) == 100
    assert int(model.branches["edges"].memory.cursor) == 28


def test_a_training_step_and_a_score_wait_for_no_device(images: Tensor) -> None:
    """But for the very first step, and for the Canny edges, which OpenCV finds on the CPU."""
    model = make_tiny(BOTH, step=images)
    with NothingWaits():
        for objective in model.stages()[-1].objectives:
            objective.losses(images)["total"].backward()
        model._remember_step(images)
        model.eval()._score(images)


def test_scoring_changes_nothing_in_the_model(images: Tensor) -> None:
    model = make_tiny(BOTH, step=images)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.score(torch.rand(3, 1, 32, 32))
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_scores_do_not_depend_on_the_batch(images: Tensor) -> None:
    model = make_tiny(BOTH, step=torch.rand(6, 1, 32, 32))
    together = model.score(images)
    for index in range(4):
        alone = model.score(images[index : index + 1])
        beside_white = model.score(torch.cat((images[index : index + 1], torch.ones(3, 1, 32, 32))))
        for other in (alone, beside_white):
            torch.testing.assert_close(other.image_score[0], together.image_score[index], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(other.anomaly_map[0], together.anomaly_map[index], rtol=1e-4, atol=1e-5)


def test_the_score_is_equation_16(images: Tensor) -> None:
    model = make_tiny(BOTH, step=images, gamma=0.3).eval()
    other = torch.rand(2, 1, 32, 32)
    scores = model.score(other)
    with torch.no_grad():
        hand = by_hand(model, other)
        after = model.branches["semantic"].extractor.network(hand["made"]).softmax(dim=1)
    image, semantic = (other - hand["made"]).abs().mean(dim=1), (hand["semantic"] - after).abs().mean(dim=1)
    torch.testing.assert_close(scores.reconstruction, hand["made"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scores.parts["image"], image.mean(dim=(1, 2)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scores.parts["semantic"], semantic.mean(dim=(1, 2)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scores.anomaly_map[:, 0], 0.7 * image + 0.3 * semantic, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scores.image_score, scores.anomaly_map.mean(dim=(1, 2, 3)))


@pytest.mark.parametrize("config", [TINY, BOTH])
def test_cycles_feed_the_reconstruction_back_and_compare_with_the_first_image(
    config: MemSTCConfig, images: Tensor
) -> None:
    once, twice = (make_tiny(config, step=images, cycles=cycles) for cycles in (1, 2))
    other = torch.rand(2, 1, 32, 32)
    made = once.score(other).reconstruction
    with torch.inference_mode():
        again = once.eval()._make(made, once._encode(made))
    scores = twice.score(other)
    torch.testing.assert_close(scores.reconstruction, again)
    torch.testing.assert_close(scores.parts["image"], (other - again).abs().mean(dim=(1, 2, 3)))
    assert not torch.allclose(again, made, atol=0.01)


def test_colour_is_averaged_over_the_channels() -> None:
    model, images = make_tiny(channels=3), torch.rand(2, 3, 32, 32)
    model.remember(images)
    scores = model.score(torch.rand(2, 3, 32, 32))
    assert scores.reconstruction.shape == (2, 3, 32, 32)
    assert scores.anomaly_map.shape == (2, 1, 32, 32)


def test_the_seed_fixes_initialisation_and_training(images: Tensor) -> None:
    first, second = make_tiny(BOTH), make_tiny(BOTH)
    assert train(first, images, 2) == train(second, images, 2)
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())


def stripes(count: int, seed: int) -> Tensor:
    """Two bars and a little noise."""
    noise = 0.02 * torch.randn(count, 1, 32, 32, generator=torch.Generator().manual_seed(seed))
    return (0.3 + 0.4 * (torch.arange(32) % 16 < 8).float() + noise).clamp(0, 1)


def test_training_lowers_the_loss_and_a_planted_defect_scores_highest() -> None:
    torch.manual_seed(0)
    model = MemSTC(TINY)
    totals = train(model, stripes(8, seed=0), 40, lr=0.02)
    assert totals[-1] < totals[1] / 2
    normal = stripes(8, seed=1)
    defective = normal.clone()
    defective[:, :, 10:18, 10:18] = 1.0
    good, bad = model.score(normal), model.score(defective)
    assert float(bad.image_score.min()) > float(good.image_score.max())
    assert float(bad.anomaly_map[:, :, 10:18, 10:18].mean()) > 2 * float(bad.anomaly_map.mean())


@pytest.mark.parametrize(
    "changes",
    [
        {"structures": ("semantic",)},
        {"memory": ("concat",)},
        {"memory": ("stcm", "concat")},
        {"memory": ("concat", "stcm")},
        {"key": "structure+texture"},
        {"value": "structure+texture"},
        {"key": "structure+texture", "value": "structure+texture"},
        {"fusion": "mean"},
        {"adversarial_weight": 0.0},
        {"semantic_weight": 0.0},
        {"edge_weight": 0.0},
        {"encoding_weights": (0.1, 0.5, 0.5)},
        {"reconstruction_weight": 2.0},
        {"items": 20},
        {"gamma": 0.0},
        {"cycles": 2},
    ],
    ids=str,
)
def test_every_option_acts(changes: dict[str, Any], images: Tensor) -> None:
    """Tables VI to XII and the weights: each trains, scores, and gives other scores than the published setting."""
    other = torch.rand(4, 1, 32, 32)
    model, published = make_tiny(BOTH, **changes), make_tiny(BOTH)
    for each in (model, published):
        train(each, images, 2)
    scores = model.score(other)
    assert scores.image_score.isfinite().all()
    assert not torch.equal(scores.image_score, published.score(other).image_score)
    losses = model.generator_losses(images)
    for weight, term in (
        ("adversarial_weight", "adversarial"),
        ("semantic_weight", "semantic"),
        ("edge_weight", "edges"),
    ):
        used = getattr(model.config, weight) > 0 and not (term == "edges" and "edges" not in model.config.structures)
        assert (term in losses) == used
    assert (model.critic is None) == (model.config.adversarial_weight == 0)


def test_a_memory_may_be_left_out_for_one_structure_alone() -> None:
    model = make_tiny(BOTH, memory=("stcm", "concat"))
    assert model.branches["semantic"].memory is not None
    assert model.branches["edges"].memory is None


def test_fusion_is_a_weighted_mean_of_both_reconstructions(images: Tensor) -> None:
    model = make_tiny(BOTH, step=images).eval()
    mean = make_tiny(BOTH, step=images, fusion="mean").eval()
    mean.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        model.attention[-1].weight.zero_()
        model.attention[-1].bias.zero_()  # W = 1/2 everywhere
    torch.testing.assert_close(model.score(images).reconstruction, mean.score(images).reconstruction)
    with torch.no_grad():
        model.attention[-1].bias.fill_(-100.0)  # W = 0: Î_e alone
        hand = by_hand(model, images)
    torch.testing.assert_close(model.score(images).reconstruction, hand["edges_made"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", list(MemSTC.presets()))
def test_every_preset_builds(name: str) -> None:
    config = MemSTC.presets()[name].config
    with torch.device("meta"):
        semantic = make_semantic(config.image_size, config.channels) if "semantic" in config.structures else None
        model = MemSTC(config, semantic=semantic)
    assert [stage.name for stage in model.stages()] == ["edges", "memory"]


def test_the_published_settings_are_those_of_the_paper() -> None:
    presets = MemSTC.presets()
    for name in ("paper", "paper-oct", "paper-industrial"):
        training, config = presets[name].training, presets[name].config
        assert (training.batch_size, training.epochs) == (8, 800)
        assert (training.learning_rate, training.betas) == (1e-3, (0.1, 0.9))
        assert (config.image_size, config.items, config.widths) == (224, 2048, (64, 128, 256, 512))
        assert (config.memory, config.key, config.value) == (("stcm",), "structure", "texture")
        assert (config.fusion, config.cycles, config.critic_strides) == ("attention", 1, 3)
    assert [presets[name].config.gamma for name in ("paper", "paper-oct", "paper-industrial")] == [0.4, 0.8, 0.0]
    assert presets["paper-industrial"].config.structures == ("edges",)
    with torch.device("meta"):
        model = MemSTC.paper()
    assert model.branches["edges"].memory.keys.shape == (2048, 512)
    assert model.critic.receptive_field == 70
    with pytest.raises(ValueError, match="setting: expected one of paper"):
        MemSTC.paper("imagenet")


@pytest.mark.parametrize("name", ["small", "digits"])
@pytest.mark.parametrize("channels", [1, 3])
def test_small_presets_score(name: str, channels: int) -> None:
    config = replace(MemSTC.presets()[name].config, channels=channels)
    model, images = MemSTC(config), torch.rand(2, channels, config.image_size, config.image_size)
    model.remember(images)
    assert model.score(images).anomaly_map.shape == (2, 1, config.image_size, config.image_size)


def test_an_image_that_is_remembered_is_read_back(images: Tensor) -> None:
    model = make_tiny().eval()
    model.remember(images)
    with torch.no_grad():
        expected = model.texture_decoder(model.texture_encoder(images))
    assert not model.training
    assert not model.branches["edges"].memory.training
    torch.testing.assert_close(model.score(images).reconstruction, expected, rtol=1e-4, atol=1e-5)


def test_an_untrained_memory_cannot_score(images: Tensor) -> None:
    with pytest.raises(RuntimeError, match=r"the memory is empty: fit the model, remember\(images\), or load a run"):
        make_tiny().score(images)


def test_the_semantic_structure_needs_labels_of_some_source() -> None:
    with pytest.raises(ValueError, match="semantic: labels of some source are needed"):
        MemSTC(BOTH)
    with pytest.raises(ValueError, match="semantic: a part is given that structures=edges has no use for"):
        MemSTC(TINY, semantic=make_semantic())
    edges = EdgeExtractor(EdgeConfig(image_size=32, channels=1, width=2))
    with pytest.raises(ValueError, match="edges: a part is given that structures=semantic has no use for"):
        MemSTC(replace(BOTH, structures="semantic"), semantic=make_semantic(), edges=edges)
    with pytest.raises(ValueError, match="semantic: the model takes 1 channels at 32 pixels, the part was made for 3"):
        MemSTC(BOTH, semantic=make_semantic(channels=3))
    with pytest.raises(TypeError, match="semantic: expected SemanticExtractor, got EdgeExtractor"):
        MemSTC(BOTH, semantic=edges)  # type: ignore[arg-type]


def test_given_edges_are_not_trained_again() -> None:
    edges = EdgeExtractor(EdgeConfig(image_size=32, channels=1, width=3))
    model = MemSTC(TINY, edges=edges)
    assert model.branches["edges"].extractor is edges
    assert [stage.name for stage in model.stages()] == ["memory"]
    held = {id(value) for objective in model.stages()[0].objectives for value in objective.parameters}
    assert not held & {id(value) for value in edges.parameters()}


def test_a_run_keeps_the_extractors_that_were_given(tmp_path: Path, images: Tensor) -> None:
    data = from_arrays(stripes(12, seed=0))
    settings = replace(MemSTC.presets()["digits"].training, epochs=1)
    model = make_tiny(BOTH)
    before = {name: value.clone() for name, value in model.branches["semantic"].extractor.state_dict().items()}
    run = fit(model, data, tmp_path, settings=settings, device="cpu", quiet=True)
    assert set(run.config["model"]["parts"]) == {"semantic"}
    assert isinstance(run.model, MemSTC)
    extractor = run.model.branches["semantic"].extractor
    assert extractor.config == make_semantic().config
    assert all(torch.equal(value, extractor.state_dict()[name]) for name, value in before.items())
    assert torch.equal(run.model.score(images).image_score, model.score(images).image_score)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 40}, r"image_size: expected a multiple of 16, at least 32 \(3 poolings; .*\), got 40"),
        ({"image_size": 16}, "image_size: expected a multiple of 16, at least 32"),
        ({"image_size": 48, "widths": (4,) * 5}, "image_size: expected a multiple of 32"),
        ({"image_size": "32"}, "image_size: expected an int of at least 1, got '32'"),
        ({"image_size": 0}, "image_size: expected an int of at least 1, got 0"),
        ({"channels": 2}, "channels: expected 1 or 3, got 2"),
        ({"structures": ("edges", "semantic")}, "structures: expected semantic, edges or semantic,edges"),
        ({"structures": ()}, "structures: expected a structure or several"),
        ({"widths": (4,)}, "widths: expected at least two"),
        ({"widths": (4, 0)}, "widths: expected at least two positive"),
        ({"widths": (4.0, 8.0)}, "widths: expected a width or several, got"),
        ({"edge_width": 0}, "edge_width: expected an int of at least 1"),
        ({"critic_width": 0}, "critic_width: expected an int of at least 1"),
        ({"critic_strides": 4}, "critic_strides: 4 leave nothing of 32 pixels"),
        ({"items": 0}, "items: expected an int of at least 1"),
        ({"items": True}, "items: expected an int of at least 1"),
        ({"memory": "none"}, "memory: expected one of stcm, concat, got 'none'"),
        ({"memory": ("stcm", "stcm")}, "memory: expected one, or one for each of edges"),
        ({"key": "texture"}, "key: expected one of structure, structure"),
        ({"value": "structure"}, "value: expected one of texture, structure"),
        ({"fusion": "sum"}, "fusion: expected one of attention, mean"),
        ({"encoding_weights": (0.5, 0.5)}, "encoding_weights: expected λ1, λ2 and λ3"),
        ({"encoding_weights": (0.5, 0.5, -1.0)}, r"encoding_weights\[2\]: expected a finite number"),
        ({"reconstruction_weight": float("nan")}, "reconstruction_weight: expected a finite number"),
        ({"adversarial_weight": "0.1"}, "adversarial_weight: expected a finite number"),
        ({"semantic_weight": -1}, "semantic_weight: expected a finite number"),
        ({"edge_weight": -1}, "edge_weight: expected a finite number"),
        ({"gamma": 0.5}, "gamma: expected 0 without the semantic structure, got 0.5"),
        ({"gamma": 2.0, "structures": "semantic"}, "gamma: expected 0 to 1, got 2.0"),
        ({"cycles": 0}, "cycles: expected an int of at least 1, got 0"),
    ],
)  # fmt: skip
def test_bad_configs_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **changes)


# On an index


@pytest.mark.parametrize("config", [TINY, replace(BOTH, memory=("stcm", "concat"), value="structure+texture")])
def test_an_index_takes_over_the_pairs_and_scores_stay(config: MemSTCConfig, images: Tensor, tmp_path: Path) -> None:
    model = make_tiny(config)
    for _ in range(3):  # more pairs than are held
        model.remember(torch.rand(3, 1, 32, 32))
    expected = model.score(images)
    names = [name for name in config.structures if config.memory_of(name) == "stcm"]
    indexes = {}
    for name in names:
        memory = model.branches[name].memory
        key_dim, value_dim = memory.keys.shape[1], memory.values.shape[1]
        indexes[name] = ExactIndex(
            key_dim, values_dim=value_dim, capacity=config.items, chunk_rows=64, path=tmp_path / name
        )
        with pytest.raises(ValueError, match=rf"index: expected \(dim, values_dim\) \({key_dim}, {value_dim}\)"):
            model.use_indexes({name: ExactIndex(key_dim, values_dim=value_dim + 1)})
    model.use_indexes(indexes)
    assert model.indexes == indexes
    assert [len(index) for index in indexes.values()] == [min(config.items, 9 * 16)] * len(names)
    scores = model.score(images)
    assert torch.equal(scores.image_score, expected.image_score)
    assert torch.equal(scores.reconstruction, expected.reconstruction)
    model.remember(images)
    assert [len(index) for index in indexes.values()] == [min(config.items, 13 * 16)] * len(names)


def test_a_run_on_indexes_comes_back_and_a_training_on_them_is_refused(images: Tensor, tmp_path: Path) -> None:
    data = from_arrays(torch.rand(6, 32, 32).numpy(), torch.rand(4, 32, 32).numpy(), [0, 0, 1, 1])
    settings = replace(MemSTC.presets()["digits"].training, epochs=1)
    run = fit(make_tiny(), data, tmp_path / "tensors", settings=settings, device="cpu", quiet=True)
    assert isinstance(run.model, MemSTC)
    expected = run.model.score(images)
    run.model.use_indexes({"edges": ExactIndex(8, values_dim=8, capacity=300)})
    told = {name: run.config[name] for name in ("preprocessing", "training", "threshold")}
    save_run(tmp_path / "indexed", run.model, **told)
    loaded = load_run(tmp_path / "indexed", "cpu").model
    assert torch.equal(loaded.score(images).image_score, expected.image_score)
    with pytest.raises(ValueError, match="index: the memory 'edges' of memstc changes with every step"):
        fit(loaded, data, tmp_path / "again", settings=settings, device="cpu", quiet=True)
    with pytest.raises(ValueError, match="index: memstc has no memory that a training could fill an index for"):
        fit(make_tiny(), data, tmp_path / "again", settings=settings, device="cpu", quiet=True, index="exact")
    with pytest.raises(ValueError, match="index: memstc has no memory 'semantic'"):
        make_tiny().use_indexes({"semantic": ExactIndex(8, values_dim=8)})
