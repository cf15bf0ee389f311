"""The run folder: what is saved comes back bit for bit, and nothing that is damaged is opened."""

from __future__ import annotations

import json
import math
import os
import pickletools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from memad_fast._atomic import write_bytes, write_json
from memad_fast._sealed import checksum
from memad_fast.data import preprocessing
from memad_fast.scoring import RunError, load_run, read_config, save_run
from memad_fast.scoring import run as run_module

Make = Callable[..., Any]


def save(folder: Path, model: nn.Module, value: float = 0.25, **options: Any) -> Path:
    save_run(
        folder,
        model,  # type: ignore[arg-type]
        threshold={"value": value, "map_level": 0.5},
        preprocessing=preprocessing(8, 1),
        training={"seed": 3},
        **options,
    )
    return folder


@pytest.fixture
def saved(make_toy: Make, tmp_path: Path) -> Path:
    return save(tmp_path / "run", make_toy())


def rewrite(path: Path, change: Callable[[dict[str, Any]], None], *, keep_checksum: bool = False) -> None:
    """Alter config.json as someone would who knows the format."""
    config = json.loads(path.read_text())
    change(config)
    if not keep_checksum:
        config["checksum"] = checksum(config)
    path.write_text(json.dumps(config))


def test_a_run_comes_back_bit_for_bit(make_toy: Make, tmp_path: Path) -> None:
    model = make_toy(noise=0.3)
    model.seen += 41
    run = load_run(save(tmp_path / "a" / "run", model, warnings=["mind the gap"], data={"name": "x"}), "cpu")
    for name, value in model.state_dict().items():
        assert torch.equal(value, run.model.state_dict()[name]), name
        assert value.dtype == run.model.state_dict()[name].dtype
    assert run.model.config == model.config
    assert not run.model.training
    assert (run.threshold, run.map_level, run.image_size, run.channels) == (0.25, 0.5, 8, 1)
    assert (run.model_name, run.warnings, run.device) == ("toy", ["mind the gap"], torch.device("cpu"))
    assert run.config["training"] == {"seed": 3}
    assert run.config["versions"]["torch"] == torch.__version__
    images = torch.rand(3, 1, 8, 8)
    assert torch.equal(run.model.score(images).image_score, model.score(images).image_score)


def test_a_threshold_comes_back_to_its_last_bit(make_toy: Make, tmp_path: Path) -> None:
    for value in (math.pi, 5e-324, 1.7976931348623157e308, 0.1 + 0.2):
        assert load_run(save(tmp_path / "run", make_toy(), value), "cpu").threshold == value


def test_a_run_can_be_copied_elsewhere(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "other")
    assert load_run(tmp_path / "other", "cpu").threshold == 0.25


def test_nothing_in_a_run_is_a_pickle(saved: Path) -> None:
    for path in saved.iterdir():
        with pytest.raises(ValueError):
            pickletools.dis(path.read_bytes(), out=open(os.devnull, "w"))  # noqa: SIM115
    assert sorted(path.name for path in saved.iterdir()) == ["config.json", "model.safetensors"]


def test_a_flipped_bit_anywhere_in_the_weights_is_found(saved: Path) -> None:
    path = saved / "model.safetensors"
    whole = path.read_bytes()
    for place in [0, 7, 8, 30, len(whole) // 3, len(whole) // 2, len(whole) - 1]:
        data = bytearray(whole)
        data[place] ^= 0x10
        path.write_bytes(data)
        with pytest.raises(RunError, match=r"model\.safetensors: its SHA-256 is not the one in config\.json"):
            load_run(saved, "cpu")
    path.write_bytes(whole)
    load_run(saved, "cpu")


@pytest.mark.parametrize("length", [0, 1, 8, 100, -1])
def test_torn_weights_are_refused(saved: Path, length: int) -> None:
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(RunError, match=r"model\.safetensors: expected \d+ bytes, got \d+: the file is truncated"):
        load_run(saved, "cpu")


def test_a_flipped_bit_anywhere_in_the_config_is_found(saved: Path) -> None:
    path = saved / "config.json"
    whole = path.read_bytes()
    meaning = json.loads(whole)
    for place in range(len(whole)):
        data = bytearray(whole)
        data[place] ^= 0x01
        try:
            if json.loads(data) == meaning:  # a space that became another white space says the same
                continue
        except ValueError:
            pass
        path.write_bytes(data)
        with pytest.raises(RunError, match=r"config\.json: "):
            load_run(saved, "cpu")


@pytest.mark.parametrize("length", [0, 1, 100, -3])
def test_a_torn_config_is_refused(saved: Path, length: int) -> None:
    path = saved / "config.json"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(RunError, match=r"config\.json: not valid JSON, truncated or altered"):
        load_run(saved, "cpu")


def test_an_edited_threshold_is_refused(saved: Path) -> None:
    rewrite(saved / "config.json", lambda config: config["threshold"].update(value=9.0), keep_checksum=True)
    with pytest.raises(RunError, match=r"config\.json: altered, its checksum does not match"):
        load_run(saved, "cpu")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_missing_file_is_named(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(RunError, match=f"{name}: no such file"):
        load_run(saved, "cpu")
    with pytest.raises(RunError, match="no such run folder"):
        load_run(saved / "elsewhere", "cpu")


def test_a_later_format_asks_for_an_upgrade(saved: Path) -> None:
    rewrite(saved / "config.json", lambda config: config.update(format_version=2))
    with pytest.raises(RunError, match=r"config\.json: format version 2 was written by a later .*upgrade"):
        load_run(saved, "cpu")


@pytest.mark.parametrize(
    "content", ["{}", "[]", "3", '{"format": NaN}', '{"format": "something else"}', '{"format": "memad_fast run"}']
)
def test_another_json_file_is_no_run(saved: Path, content: str) -> None:
    (saved / "config.json").write_text(content)
    with pytest.raises(RunError, match=r"config\.json: "):
        read_config(saved)


def test_a_config_that_lacks_what_a_run_needs_is_refused(saved: Path) -> None:
    for key in ("model", "preprocessing", "threshold", "files"):
        whole = (saved / "config.json").read_text()
        rewrite(saved / "config.json", lambda config, key=key: config.pop(key))
        with pytest.raises(RunError, match=rf"config\.json: .*{key}"):
            load_run(saved, "cpu")
        (saved / "config.json").write_text(whole)


def test_another_models_weights_are_refused(saved: Path, make_toy: Make, tmp_path: Path) -> None:
    for other in (make_toy(channels=3), make_toy()):
        nn.init.ones_(other.decode.bias)
        save(tmp_path / "other", other)
        shutil.copy(tmp_path / "other" / "model.safetensors", saved)
        with pytest.raises(RunError, match=r"model\.safetensors: .*another model's"):
            load_run(saved, "cpu")


def test_weights_that_do_not_fit_the_architecture_are_refused(saved: Path) -> None:
    rewrite(saved / "config.json", lambda config: config["model"]["config"].update(channels=3))
    with pytest.raises(RunError, match=r"model\.safetensors: does not hold the weights of model 'toy'"):
        load_run(saved, "cpu")


def test_an_unknown_model_or_config_is_named(saved: Path) -> None:
    whole = (saved / "config.json").read_text()
    rewrite(saved / "config.json", lambda config: config["model"].update(name="resnet"))
    with pytest.raises(RunError, match=r"model 'resnet' is unknown; known are .*toy"):
        load_run(saved, "cpu")
    (saved / "config.json").write_text(whole)
    rewrite(saved / "config.json", lambda config: config["model"]["config"].update(depth=3))
    with pytest.raises(RunError, match="model 'toy' cannot be built from its config"):
        load_run(saved, "cpu")


def test_a_missing_device_is_named(saved: Path) -> None:
    for device in ("cuda:99", "toaster"):
        with pytest.raises(RunError, match=f"device: {device} is not available here"):
            load_run(saved, device)


def test_what_has_no_json_form_is_refused_before_anything_is_written(make_toy: Make, tmp_path: Path) -> None:
    for value in (math.nan, math.inf):
        with pytest.raises(RunError, match="no JSON form"):
            save(tmp_path / "run", make_toy(), value)
    assert not (tmp_path / "run").exists()


def test_a_crash_while_replacing_never_mixes_two_runs(
    saved: Path, make_toy: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = make_toy()
    nn.init.ones_(other.decode.bias)

    def crash(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "write_json", crash)
    with pytest.raises(KeyboardInterrupt):
        save(saved, other, 0.75)
    with pytest.raises(RunError, match=r"model\.safetensors: its SHA-256"):
        load_run(saved, "cpu")


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.json"
    write_json(path, {"old": 1})

    def full(handle: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_bytes(path, b"new")
    assert json.loads(path.read_text()) == {"old": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.json"]


def test_tied_weights_are_saved(make_toy: Make, tmp_path: Path) -> None:
    model = make_toy()
    model.again = model.decode
    run_module.pack_tensors(model.state_dict(), {})
    with pytest.raises(RunError, match="tensors only, got dict"):
        run_module.pack_tensors({"_extra_state": {}}, {})
