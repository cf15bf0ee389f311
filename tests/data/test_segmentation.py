"""Labelled sets: what is found in a folder, what a label map says, and what is wrong with one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from memad_fast.data import AdaptationExamples, DataError, ImageError, open_labelled, open_plain


def draw(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def labelled_folder(folder: Path, sizes: tuple[tuple[int, int], ...] = ((40, 50), (64, 30))) -> Path:
    """Images whose left half is class 255, brighter than the right half."""
    for index, (height, width) in enumerate(sizes):
        marked = np.zeros((height, width), np.uint8)
        marked[:, : width // 2] = 255
        draw(folder / "image" / f"{index:02}.png", (marked // 2 + 10 * index).astype(np.uint8))
        draw(folder / "vessel" / f"{index:02}.png", marked)
    return folder


class TestOpening:
    def test_images_of_several_sizes_with_their_classes(self, tmp_path: Path) -> None:
        data = open_labelled(labelled_folder(tmp_path), image_size=32)
        assert (len(data), data.channels) == (2, 1)
        for item in (data[0], data[1]):
            assert item.image.shape == (1, 32, 32)
            assert item.labels.dtype == torch.int64
            assert item.labels[:, :16].eq(1).all()
            assert item.labels[:, 16:].eq(0).all()
            assert item.counted.all()
        assert data[1].name.endswith("01.png")

    def test_only_the_field_of_view_counts(self, tmp_path: Path) -> None:
        folder = labelled_folder(tmp_path)
        inside = np.zeros((40, 50), np.uint8)
        inside[10:30] = 255
        draw(folder / "fov" / "00.png", inside)
        data = open_labelled(folder, image_size=32)
        assert data[0].counted.float().mean() == 0.5
        assert data[1].counted.all()

    def test_values_say_which_integers_are_which_classes(self, tmp_path: Path) -> None:
        stored = np.repeat(np.array([[7, 0, 3, 7]], np.uint8), 4, axis=0)
        draw(tmp_path / "image" / "a.png", stored)
        draw(tmp_path / "layers" / "a.png", stored)
        data = open_labelled(tmp_path, image_size=4, values=(3, 7, 0))
        assert data[0].labels[0].tolist() == [1, 2, 0, 1]

    def test_label_maps_of_one_bit_a_palette_or_equal_colours(self, tmp_path: Path) -> None:
        marked = np.zeros((8, 8), np.uint8)
        marked[2:5] = 255
        draw(tmp_path / "image" / "a.png", marked)
        (tmp_path / "labels").mkdir()
        for image in (
            Image.fromarray(marked).convert("1"),
            Image.fromarray(np.stack([marked] * 3, axis=2)),
            Image.merge("LA", (Image.fromarray(marked), Image.new("L", (8, 8), 128))),
        ):
            image.save(tmp_path / "labels" / "a.png")
            labels = open_labelled(tmp_path, image_size=8)[0].labels
            assert labels.sum(dim=1).tolist() == [0, 0, 8, 8, 8, 0, 0, 0], image.mode
        palette = Image.fromarray(marked // 255)
        palette.putpalette([200, 0, 0, 0, 200, 0])
        palette.save(tmp_path / "labels" / "a.png")
        assert open_labelled(tmp_path, image_size=8, values=(0, 1))[0].labels.sum() == 24

    def test_class_shares_are_those_of_the_pixels(self, tmp_path: Path) -> None:
        stored = np.zeros((4, 10), np.uint8)
        stored[:, :3] = 1
        draw(tmp_path / "image" / "a.png", stored)
        draw(tmp_path / "labels" / "a.png", stored)
        shares = open_labelled(tmp_path, image_size=32, values=(0, 1, 2)).class_shares()
        assert shares == pytest.approx([0.7, 0.3, 0.0], abs=2e-3)
        assert min(shares) > 0

    def test_one_annotator_of_several_is_chosen(self, tmp_path: Path) -> None:
        folder = labelled_folder(tmp_path)
        for index, size in enumerate(((40, 50), (64, 30))):
            draw(folder / "second" / f"{index:02}.png", np.full(size, 255, np.uint8))
        with pytest.raises(DataError, match="one folder of label maps beside 'image', found second, vessel: say with"):
            open_labelled(folder, image_size=32)
        assert open_labelled(folder, image_size=32, labels="second")[0].labels.eq(1).all()


class TestWhatIsWrong:
    def test_a_missing_label_map_names_the_image(self, tmp_path: Path) -> None:
        folder = labelled_folder(tmp_path)
        (folder / "vessel" / "01.png").unlink()
        with pytest.raises(DataError, match=r"01\.png: has no label map; looked for .*vessel/01\.png"):
            open_labelled(folder, image_size=32)
        (folder / "vessel" / "00.png").unlink()
        with pytest.raises(DataError, match=r"00\.png: has no label map \(nor have 1 others\)"):
            open_labelled(folder, image_size=32)

    def test_no_label_maps_at_all(self, tmp_path: Path) -> None:
        draw(tmp_path / "image" / "a.png", np.zeros((8, 8), np.uint8))
        with pytest.raises(DataError, match="one folder of label maps beside 'image', found none"):
            open_labelled(tmp_path, image_size=32)

    def test_a_label_map_of_another_size_names_both(self, tmp_path: Path) -> None:
        folder = labelled_folder(tmp_path)
        draw(folder / "vessel" / "01.png", np.zeros((64, 31), np.uint8))
        with pytest.raises(ImageError, match=r"vessel/01\.png: a label map of 64x31 .*image/01\.png of 64x30"):
            open_labelled(folder, image_size=32)[1]

    def test_an_unknown_value_is_told(self, tmp_path: Path) -> None:
        folder = labelled_folder(tmp_path)
        draw(folder / "vessel" / "01.png", np.arange(64 * 30).reshape(64, 30).astype(np.uint8))
        with pytest.raises(ImageError, match=r"01\.png: holds the value 1, 2, 3, 4, 5, …, expected 0, 255"):
            AdaptationExamples(open_labelled(folder, image_size=32), None)

    def test_colours_are_no_classes(self, tmp_path: Path) -> None:
        folder = labelled_folder(tmp_path)
        draw(folder / "vessel" / "00.png", np.random.default_rng(0).integers(0, 9, (40, 50, 3), dtype=np.uint8))
        with pytest.raises(ImageError, match=r"00\.png: expected a label map, one integer a pixel, .* mode RGB"):
            open_labelled(folder, image_size=32)[0]

    def test_a_torn_image_is_named_before_the_training(self, tmp_path: Path) -> None:
        folder = labelled_folder(tmp_path / "source")
        target = tmp_path / "target"
        draw(target / "x.png", np.random.default_rng(0).integers(0, 256, (40, 40), dtype=np.uint8))
        (target / "x.png").write_bytes((target / "x.png").read_bytes()[:200])
        with pytest.raises(ImageError, match=r"x\.png: not a readable image"):
            AdaptationExamples(open_labelled(folder, image_size=32), open_plain(target, image_size=32, channels=1))

    @pytest.mark.parametrize("made", ["", "image"])
    def test_no_images(self, tmp_path: Path, made: str) -> None:
        (tmp_path / "set" / made).mkdir(parents=True)
        with pytest.raises(DataError, match="no images" if made else "has no folder 'image'"):
            open_labelled(tmp_path / "set", image_size=32)
        with pytest.raises(DataError, match="no images"):
            open_plain(tmp_path / "set", image_size=32, channels=1)

    def test_no_folder(self, tmp_path: Path) -> None:
        for open_it in (open_labelled, open_plain):
            with pytest.raises(DataError, match=r"nowhere.*no such folder"):
                open_it(tmp_path / "nowhere", image_size=32, channels=1)


class TestTarget:
    @pytest.mark.parametrize("place", ["image", "train/good", "."])
    def test_images_are_where_the_layouts_have_them(self, tmp_path: Path, place: str) -> None:
        draw(tmp_path / place / "a.png", np.zeros((8, 8), np.uint8))
        if place != ".":
            draw(tmp_path / "test" / "b.png", np.zeros((8, 8), np.uint8))
        assert [Path(name).name for name in open_plain(tmp_path, image_size=8, channels=1).names] == ["a.png"]


class TestExamples:
    def test_images_and_labels_are_cropped_and_flipped_together(self, tmp_path: Path) -> None:
        source = open_labelled(labelled_folder(tmp_path), image_size=32)
        examples = AdaptationExamples(source, None, crop=0.5, flips="both")
        torch.manual_seed(0)
        widths = set()
        for _ in range(20):
            batch = examples.__getitems__([0])
            assert batch.targets is None
            bright = batch.images[0, 0] > 0.25
            assert torch.equal(bright, batch.labels[0] == 1)  # image 0 is exactly its mask, at half brightness
            widths.add(int(bright[0].sum()))
        assert len(widths) > 5

    def test_whole_images_unless_asked_otherwise(self, tmp_path: Path) -> None:
        source = open_labelled(labelled_folder(tmp_path), image_size=32)
        batch = AdaptationExamples(source, None).__getitems__([1, 0])
        for row, index in enumerate((1, 0)):
            torch.testing.assert_close(batch.images[row], source[index].image)
            assert torch.equal(batch.labels[row], source[index].labels)

    def test_a_batch_depends_on_the_global_generator_alone(self, tmp_path: Path) -> None:
        source = open_labelled(labelled_folder(tmp_path / "source"), image_size=32)
        target = open_plain(labelled_folder(tmp_path / "target", ((20, 20),) * 5), image_size=32, channels=1)
        examples = AdaptationExamples(source, target, crop=0.3, flips="both")
        assert examples.names == source.names + target.names
        torch.manual_seed(3)
        first = examples.__getitems__([0, 1])
        examples.__getitems__([1])
        torch.manual_seed(3)
        second = examples.__getitems__([0, 1])
        assert first.targets.shape == (2, 1, 32, 32)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert not torch.equal(first.images, examples.__getitems__([0, 1]).images)

    def test_one_image_is_enough(self, tmp_path: Path) -> None:
        source = open_labelled(labelled_folder(tmp_path, ((17, 5),)), image_size=32)
        target = open_plain(tmp_path, image_size=32, channels=1)
        assert AdaptationExamples(source, target, crop=0.01).__getitems__([0]).images.shape == (1, 1, 32, 32)

    def test_files_are_decoded_again_where_memory_is_short(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        kept = AdaptationExamples(open_labelled(labelled_folder(tmp_path), image_size=32), None)
        monkeypatch.setattr("memad_fast.data.segmentation.CACHE_BYTES", 3000)
        short = AdaptationExamples(open_labelled(tmp_path, image_size=32), None)
        assert len(short.source._kept) == 1
        for a, b in zip(kept.__getitems__([0, 1])[:2], short.__getitems__([0, 1])[:2], strict=True):
            assert torch.equal(a, b)
