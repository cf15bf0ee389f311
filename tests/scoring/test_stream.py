from __future__ import annotations

import itertools
import math
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from memad_fast.scoring import Result, Run, RunError, Scorer, Timing, find_images, stream


def _names(paths: Iterator[Path], root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in paths]


def _fill(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8)).save(root / name)


def test_a_folder_is_searched_through_in_a_fixed_order(tmp_path: Path) -> None:
    _fill(tmp_path, "b/2.PNG", "b/10.png", "a.jpg", "c/d/x.tif")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / ".hidden.png").write_bytes(b"left out")
    (tmp_path / ".git").mkdir()
    _fill(tmp_path, ".git/x.png")
    expected = ["a.jpg", "b/10.png", "b/2.PNG", "c/d/x.tif"]
    assert _names(find_images([tmp_path]), tmp_path) == expected


def test_a_link_back_up_is_not_followed_forever_and_a_link_aside_is(tmp_path: Path) -> None:
    _fill(tmp_path, "line/1.png", "store/2.png")
    os.symlink(tmp_path / "line", tmp_path / "line" / "again")
    os.symlink(tmp_path / "store", tmp_path / "line" / "store")
    assert _names(find_images([tmp_path / "line"]), tmp_path) == ["line/1.png", "line/store/2.png"]


def test_a_pattern_names_what_it_matches(tmp_path: Path) -> None:
    _fill(tmp_path, "a/1.png", "b/c/2.png", "b/3.jpg")
    assert _names(find_images([f"{tmp_path}/**/*.png"]), tmp_path) == ["a/1.png", "b/c/2.png"]
    with pytest.raises(FileNotFoundError, match="no file matches"):
        list(find_images([f"{tmp_path}/*.bmp"]))


def test_a_file_whose_name_looks_like_a_pattern_is_a_file(tmp_path: Path) -> None:
    _fill(tmp_path, "part[1].png")
    assert _names(find_images([tmp_path / "part[1].png"]), tmp_path) == ["part[1].png"]


def test_a_missing_input_is_told_before_anything_is_scored(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere.*no such file or folder"):
        find_images([tmp_path, tmp_path / "nowhere"])


def test_one_folder_can_be_left_out(tmp_path: Path) -> None:
    _fill(tmp_path, "1.png", "out/heatmaps/1.png")
    assert _names(find_images([tmp_path], leave_out=tmp_path / "out" / "heatmaps"), tmp_path) == ["1.png"]


def test_results_come_in_order_whatever_the_batch_size_and_bits_agree(toy_run: Run, parts: Path) -> None:
    paths = list(find_images([parts]))
    streams = [list(Scorer(toy_run, batch_size=size, workers=3).stream(paths)) for size in (1, 4, 64)]
    assert [[result.path for result in results] for results in streams] == [[str(path) for path in paths]] * 3
    for results in streams[1:]:
        assert [result.score for result in results] == pytest.approx([result.score for result in streams[0]], rel=1e-6)


def test_an_array_is_scored_like_the_file_it_was_saved_to(toy_run: Run, tmp_path: Path) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (20, 12), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    scorer = Scorer(toy_run)
    file, array = scorer.score(tmp_path / "x.png"), scorer.score(pixels)
    assert file.score == array.score
    assert file.size == array.size == (12, 20)
    assert file.is_anomaly == (file.score > toy_run.threshold)
    assert file.image is not None
    assert file.image.shape == (1, 8, 8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_text("hello"), "not a readable image"),
        (lambda path: path.write_bytes(b""), "not a readable image"),
        (lambda path: path.mkdir(), "not a readable image"),
        (lambda path: None, "no such file"),
        (lambda path: _truncated(path), "truncated"),
        (lambda path: Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(path, "TIFF"), "finite"),
    ],
)
def test_an_image_that_cannot_be_read_gives_its_error_and_no_score(
    toy_run: Run, tmp_path: Path, make: Callable[[Path], None], message: str
) -> None:
    path = tmp_path / "bad.png"
    make(path)
    result = Scorer(toy_run).score(path)
    assert math.isnan(result.score)
    assert message in result.error
    assert not result.is_anomaly
    assert "\n" not in result.error


def _truncated(path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:1500])


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "F"])
def test_every_kind_of_image_is_scored(toy_run: Run, tmp_path: Path, mode: str) -> None:
    image = Image.new("L", (31, 17), 128)
    if mode == "I;16":
        image = Image.fromarray(np.full((17, 31), 32896, dtype=np.uint16))
    elif mode == "F":
        image = Image.fromarray(np.full((17, 31), 0.5, dtype=np.float32))
    else:
        image = image.convert(mode)
    path = tmp_path / "image.tif"
    image.save(path)
    result = Scorer(toy_run).score(path)
    assert not result.error
    assert result.size == (31, 17)


def test_a_score_that_is_not_finite_is_an_error_and_not_a_good_part(
    toy_run: Run, parts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = toy_run.model._score

    def first_is_nan(images: torch.Tensor) -> object:
        scores = score(images)
        scores.image_score[0] = torch.nan
        return scores

    monkeypatch.setattr(toy_run.model, "_score", first_is_nan)
    results = list(Scorer(toy_run, batch_size=64).stream(find_images([parts])))
    assert "score nan" in results[0].error
    assert not any(result.error for result in results[1:])


def test_an_endless_stream_is_read_ahead_by_a_few_batches_only(toy_run: Run) -> None:
    taken = itertools.count()
    last = 0

    def camera() -> Iterator[np.ndarray]:
        nonlocal last
        while True:
            last = next(taken)
            yield np.zeros((8, 8), dtype=np.uint8)

    results = Scorer(toy_run, batch_size=4, workers=2).stream(camera())
    for position, result in enumerate(itertools.islice(results, 40)):
        assert result.path == str(position)
        assert last - position <= 4 * (1 + stream._BATCHES_AHEAD)
    before = threading.active_count()
    results.close()
    assert threading.active_count() < before


def test_decoding_runs_while_the_network_computes(toy_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The network waits until the image after its batch is decoded: without overlap it would wait for ever."""
    decoded: dict[int, threading.Event] = {index: threading.Event() for index in range(6)}
    read = stream.to_tensor
    score = toy_run.model._score
    batches = itertools.count()

    def note(pixels: np.ndarray, *args: object, **kwargs: object) -> torch.Tensor:
        decoded[int(pixels[0, 0])].set()
        return read(pixels, *args, **kwargs)  # type: ignore[arg-type]

    def wait(images: torch.Tensor) -> object:
        following = 2 * (next(batches) + 1)
        assert following not in decoded or decoded[following].wait(timeout=30)
        return score(images)

    monkeypatch.setattr(stream, "to_tensor", note)
    monkeypatch.setattr(toy_run.model, "_score", wait)
    images = [np.full((8, 8), index, dtype=np.uint8) for index in range(6)]
    assert len(list(Scorer(toy_run, batch_size=2).stream(images))) == 6


def test_times_are_taken(toy_run: Run, parts: Path) -> None:
    timing = Timing()
    results = list(Scorer(toy_run, batch_size=4).stream(find_images([parts]), timing))
    assert timing.network > 0
    assert timing.decode > 0
    assert all(result.milliseconds > 0 for result in results)


def test_arguments_out_of_range_are_named(toy_run: Run, tmp_path: Path) -> None:
    for arguments, name in (
        ({"batch_size": 0}, "batch_size"),
        ({"workers": 0}, "workers"),
        ({"threshold": math.nan}, "thr"),
    ):
        with pytest.raises(ValueError, match=name):
            Scorer(toy_run, **arguments)  # type: ignore[arg-type]
    with pytest.raises(RunError, match="no such run folder"):
        Scorer(tmp_path / "nowhere")


def test_a_threshold_of_ones_own_replaces_the_runs(toy_run: Run) -> None:
    blank = np.zeros((8, 8), dtype=np.uint8)
    score = Scorer(toy_run).score(blank).score
    assert Scorer(toy_run, threshold=score - 1e-3).score(blank).is_anomaly
    assert not Scorer(toy_run, threshold=score).score(blank).is_anomaly


def test_a_result_says_what_it_is_of() -> None:
    result = Result("a.png", 2.0, 1.0, 0.5)
    assert result.is_anomaly
    assert "a.png" in repr(result)
