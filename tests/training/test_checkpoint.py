"""A checkpoint is whole or absent, whatever happens while it is written."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rwkv7.config import ModelConfig
from rwkv7.nn import RWKV7
from rwkv7.training import TrainSettings, checkpoint
from rwkv7.training.checkpoint import (
    load_checkpoint,
    newest_checkpoint,
    newest_trouble,
    save_checkpoint,
)
from rwkv7.training.optim import make_optimizer
from rwkv7.training.tuning import Tuning, whole

CPU = torch.device("cpu")
Trained = tuple[Tuning, torch.optim.AdamW]


@pytest.fixture
def trained(settings: TrainSettings) -> Trained:
    """A model and an optimizer after two steps on random gradients."""
    model = RWKV7(ModelConfig.from_sizes(vocab_size=256, width=16, layers=2, head_size=8))
    optimizer = make_optimizer(model, settings)
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    return Tuning(model), optimizer


def test_everything_comes_back(tmp_path: Path, trained: Trained, settings: TrainSettings) -> None:
    tuning, optimizer = trained
    path = save_checkpoint(tmp_path, tuning, optimizer, settings, 2)
    assert path == tmp_path / "checkpoints" / "step-00000002"
    found = newest_checkpoint(tmp_path)
    assert found is not None and (found.path, found.step) == (path, 2)
    assert found.settings == settings
    loaded, restored = load_checkpoint(found, CPU)
    assert_same(trained, (loaded, restored))
    # The next step, too, is the same.
    both = (x.model.parameters() for x in (tuning, loaded))
    for one, other in zip(*both, strict=True):
        one.grad = torch.ones_like(one)
        other.grad = torch.ones_like(other)
    optimizer.step()
    restored.step()
    assert_same(trained, (loaded, restored))


def test_the_newest_two_are_kept_and_a_damaged_one_does_not_count(
    tmp_path: Path, trained: Trained, settings: TrainSettings
) -> None:
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, *trained, settings, step)
    folder = tmp_path / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["step-00000002", "step-00000003"]
    with (folder / "step-00000003" / "optimizer.safetensors").open("rb+") as file:
        file.truncate(100)
    found = newest_checkpoint(tmp_path)
    assert found is not None and found.step == 2
    (folder / "step-00000002" / "training.json").write_text("{")
    assert newest_checkpoint(tmp_path) is None
    assert newest_checkpoint(tmp_path / "nowhere") is None


def test_what_keeps_the_newest_from_being_used_is_told(
    tmp_path: Path, trained: Trained, settings: TrainSettings
) -> None:
    assert newest_trouble(tmp_path) is None
    path = save_checkpoint(tmp_path, *trained, settings, 1)
    assert newest_trouble(tmp_path) is None
    written = json.loads((path / "training.json").read_text())

    def trouble(**changed: Any) -> str:
        kept = {name: value for name, value in {**written, **changed}.items() if value is not None}
        (path / "training.json").write_text(json.dumps(kept))
        assert newest_checkpoint(tmp_path) is None
        found = newest_trouble(tmp_path)
        assert found is not None and found.startswith("step-00000001 cannot be used: ")
        return found

    older = "its settings are not those of this version of rwkv7"
    unknown = trouble(settings={**written["settings"], "momentum": 0.9})
    assert f"{older} (settings: unknown names momentum)" in unknown
    assert f"{older} (order: expected one of" in trouble(
        settings={**written["settings"], "order": "random"}
    )
    assert "its format is 2, expected 1" in trouble(format=2)
    assert "does not say 'machine'" in trouble(machine=None)
    sizes = written["bytes"]
    changed = {**sizes, "model.safetensors": sizes["model.safetensors"] + 1}
    assert "model.safetensors has" in trouble(bytes=changed)
    (path / "optimizer.safetensors").unlink()
    assert "optimizer.safetensors: No such file or directory" in trouble()


@pytest.mark.parametrize("failing", ["save_model", "save_file", "_flush"])
def test_a_full_disk_leaves_the_old_one_whole(
    tmp_path: Path,
    trained: Trained,
    settings: TrainSettings,
    monkeypatch: pytest.MonkeyPatch,
    failing: str,
) -> None:
    save_checkpoint(tmp_path, *trained, settings, 1)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(whole if failing == "save_model" else checkpoint, failing, full)
    with pytest.raises(OSError, match=r"step-00000002: .*No space left on device.* are whole"):
        save_checkpoint(tmp_path, *trained, settings, 2)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert_same(trained, load_checkpoint(found, CPU))


def test_a_kill_while_saving_leaves_the_old_one_whole(
    tmp_path: Path,
    trained: Trained,
    settings: TrainSettings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save_checkpoint(tmp_path, *trained, settings, 1)
    with monkeypatch.context() as patch:
        # Without the clean-up, as after a kill just before the renaming.
        patch.setattr(checkpoint.shutil, "rmtree", lambda *_, **__: None)
        patch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(tmp_path, *trained, settings, 2)
    assert (tmp_path / "checkpoints" / ".step-00000002.partial" / "training.json").exists()
    found = newest_checkpoint(tmp_path)
    assert found is not None and found.step == 1
    save_checkpoint(tmp_path, *trained, settings, 3)
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000001", "step-00000003"]


def test_moments_of_another_model_are_refused(
    tmp_path: Path, trained: Trained, settings: TrainSettings
) -> None:
    save_checkpoint(tmp_path, *trained, settings, 1)
    wide = RWKV7(ModelConfig.from_sizes(vocab_size=256, width=32, layers=2, head_size=8))
    found = newest_checkpoint(tmp_path)
    assert found is not None
    whole.save_model(wide, found.path / "model.safetensors")
    with pytest.raises(ValueError, match="expected the shape"):
        load_checkpoint(found, CPU)


def assert_same(one: Trained, other: Trained) -> None:
    for (name, a), (_, b) in zip(
        one[0].trained.named_parameters(), other[0].trained.named_parameters(), strict=True
    ):
        assert torch.equal(a, b), name
    first, second = (checkpoint._moments(optimizer) for _, optimizer in (one, other))
    assert first.keys() == second.keys()
    for name, moment in first.items():
        assert torch.equal(moment, second[name]), name


@pytest.mark.parametrize(
    "change",
    [
        lambda training: [],
        lambda training: None,
        lambda training: {**training, "bytes": []},
        lambda training: {**training, "bytes": {}},
        lambda training: {**training, "settings": [1]},
        lambda training: {**training, "settings": {"width": "16"}},
        lambda training: {**training, "machine": 3},
    ],
)
def test_a_training_json_of_another_shape_does_not_count(
    tmp_path: Path, trained: Trained, settings: TrainSettings, change: Callable[[Any], Any]
) -> None:
    for step in (1, 2):
        path = save_checkpoint(tmp_path, *trained, settings, step) / "training.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    found = newest_checkpoint(tmp_path)
    assert found is not None and found.step == 1
    path.write_text("[" * 100_000)
    assert newest_checkpoint(tmp_path) == found


@pytest.mark.parametrize("moment", checkpoint.MOMENTS)
def test_a_missing_moment_is_named(
    tmp_path: Path, trained: Trained, settings: TrainSettings, moment: str
) -> None:
    path = save_checkpoint(tmp_path, *trained, settings, 1) / checkpoint.OPTIMIZER
    found = newest_checkpoint(tmp_path)
    assert found is not None
    moments = load_file(path)
    del moments[f"head.weight.{moment}"]
    save_file(moments, path)
    with pytest.raises(ValueError, match=rf"head\.weight\.{moment} is missing"):
        load_checkpoint(found, CPU)
    save_file({**moments, f"head.weight.{moment}": torch.zeros(1), "odd": torch.ones(1)}, path)
    with pytest.raises(ValueError, match=r"unknown tensors odd|expected the shape"):
        load_checkpoint(found, CPU)
