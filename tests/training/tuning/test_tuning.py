"""Runs that go on from a model: all of it, its initial states alone, or adapters alone."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from random_model import SMALL, error, random_model, random_tokens
from safetensors.torch import load_file
from torch.nn import functional

from rwkv7 import load_model, save_model
from rwkv7.config import ModelConfig
from rwkv7.state import load_tuned
from rwkv7.training import TrainSettings, checkpoint, resume_training, tune_model
from rwkv7.training.data import open_data
from rwkv7.training.settings import tuning_settings
from rwkv7.training.sources import make_source
from rwkv7.training.tuning import make_tuning
from rwkv7.training.tuning.states import StateTuning
from rwkv7.training.watch.log import read_log

CPU = "cpu"
BYTES = ModelConfig.from_sizes(vocab_size=256, width=16, layers=2, head_size=8)
SHORT: dict[str, Any] = {
    "steps": 6,
    "window": 12,
    "batch": 3,
    "warmup": 2,
    "held_out": 100,
    "save_every": 2,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An official checkpoint as they are published: a .pth in bf16."""
    path = tmp_path_factory.mktemp("base") / "base.pth"
    save_model(random_model(BYTES, torch.bfloat16), path)
    return path


def trained(run: Path) -> dict[str, torch.Tensor]:
    folder = max((run / "checkpoints").iterdir())
    return {
        f"{path.parent.name}/{name}": tensor
        for path in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_log(run / "log.jsonl") if "loss" in line]


@pytest.mark.parametrize("tune", ["full", "state", "lora"])
def test_a_run_resumed_ends_as_one_that_was_not(
    tmp_path: Path, text: Path, base: Path, tune: str
) -> None:
    if tune == "lora":
        pytest.importorskip("peft")
    given = {**SHORT, "tune": tune, "lr": 1e-2, **({"lora_rank": 2} if tune == "lora" else {})}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert tune_model(base, given, [text], whole, device=CPU).finished
    tune_model(base, given, [text], cut, device=CPU, on_step=lambda record: record.step == 3)
    moved = base.rename(base.with_name("moved.pth"))
    try:
        if tune != "full":
            with pytest.raises(ValueError, match="say with --from where it is now"):
                resume_training(cut, device=CPU)
        result = resume_training(cut, device=CPU, base=None if tune == "full" else moved)
    finally:
        moved.rename(base)
    assert result.finished and result.evaluation is not None
    one, other = trained(whole), trained(cut)
    assert one.keys() == other.keys()
    assert all(torch.equal(x, other[name]) for name, x in one.items())
    assert losses(whole) == losses(cut)


def test_the_whole_model_goes_on_and_back_to_an_official_file(
    tmp_path: Path, text: Path, base: Path
) -> None:
    run, saved = tmp_path / "run", tmp_path / "tuned.pth"
    result = tune_model(base, {**SHORT, "lr": 1e-3}, [text], run, device=CPU, save=saved)
    settings = checkpoint.newest_checkpoint(run).settings
    assert (settings.layers, settings.width, settings.head_size) == (2, 16, 8)
    assert (settings.tokenizer, settings.lr, settings.lr_final) == ("byte", 1e-3, 1e-5)
    before, after = load_model(base, device=CPU), load_model(saved, device=CPU)
    assert after.dtype == torch.bfloat16
    master = load_model(run, device=CPU)
    for (name, x), y, full in zip(
        before.named_parameters(), after.parameters(), master.parameters(), strict=True
    ):
        assert torch.equal(y, full.bfloat16()), name
        assert name == "emb.weight" or not torch.equal(x.float(), full), name
    assert result.evaluation is not None and math.isfinite(result.evaluation.carried)
    # The first loss is that of the model that was given.
    batch = make_source(open_data(run / "data"), settings).batch(0)
    with torch.no_grad():
        logits, _ = before.float()(batch.inputs)
    first = functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten()).item()
    assert losses(run)[0] == pytest.approx(first, rel=1e-5)


def test_what_does_not_go_with_the_model_is_refused_before_anything_is_written(
    tmp_path: Path, text: Path, base: Path
) -> None:
    run = tmp_path / "run"
    for given, message in (
        ({"layers": 3}, "layers: the model to go on from has 2, found 3; leave it out"),
        ({"width": 64, "head_size": 8}, "width: the model .* has 16, found 64"),
        ({"tokenizer": "world"}, "tokenizer: 'world' has 65536 tokens, the model .* 256"),
        ({"tune": "prefix"}, "tune: expected one of full, state, lora"),
        ({"lr_final": 1.0}, "lr_final: expected from 0 to lr"),
        ({"learning_rate": 1.0}, "settings: unknown names learning_rate"),
    ):
        with pytest.raises(ValueError, match=message):
            tune_model(base, {**SHORT, **given}, [text], run, device=CPU)
    with pytest.raises(ValueError, match=r"save: expected a name in \.pth or \.safetensors"):
        tune_model(base, SHORT, [text], run, device=CPU, save=tmp_path / "model.bin")
    with pytest.raises(FileNotFoundError, match="from: there is no file or folder"):
        tune_model(tmp_path / "none.pth", SHORT, [text], run, device=CPU)
    assert not run.exists()
    # Sizes that are the model's, and settings of their own, are as good as none.
    assert tuning_settings({"layers": 2, "tune": "state"}, BYTES).lr == 1.0
    low = tuning_settings({"lr": 1e-6}, BYTES)
    assert (low.lr, low.lr_final) == (1e-6, 1e-6)


def test_the_gradient_of_the_initial_states_is_the_slope_of_the_loss() -> None:
    model = random_model()
    tuning = StateTuning(model)
    tokens, targets = random_tokens(SMALL, 2, 9), random_tokens(SMALL, 2, 9, seed=5)
    generator = torch.Generator().manual_seed(0)
    directions = []
    with torch.no_grad():
        for x in tuning.trained.parameters():
            x.normal_(generator=generator)
            directions.append(torch.randn(x.shape, generator=generator, dtype=x.dtype))

    def loss() -> torch.Tensor:
        logits, _ = model(tokens, tuning.initial(2))
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    loss().backward()
    parameters = list(tuning.trained.parameters())
    assert len(parameters) == SMALL.layers
    assert all(p.grad is None for p in model.parameters())
    for parameter, direction in zip(parameters, directions, strict=True):
        slope = (parameter.grad * direction).sum()
        step, values = 1e-5, []
        for sign in (1, -2, 1):  # ahead, behind, and back
            with torch.no_grad():
                parameter += sign * step * direction
                values.append(loss())
        assert error(slope, (values[0] - values[1]) / (2 * step)) < 1e-7


def test_only_the_states_change_and_their_file_begins_a_text(
    tmp_path: Path, text: Path, base: Path
) -> None:
    run = tmp_path / "run"
    given = {**SHORT, "tune": "state", "steps": 30, "eval_every": 10}
    result = tune_model(base, given, [text], run, device=CPU, save=tmp_path / "mine.pth")
    assert losses(run)[-1] < losses(run)[0] - 0.1
    model = load_model(base, device=CPU)
    names = {f"blocks.{i}.att.time_state" for i in range(2)}
    found = {
        path.name: torch.load(path, weights_only=True) if path.suffix == ".pth" else load_file(path)
        for path in (run / "state.pth", run / "state.safetensors", tmp_path / "mine.pth")
    }
    for tensors in found.values():
        assert tensors.keys() == names
        for name in names:
            assert tensors[name].shape == (2, 8, 8) and tensors[name].dtype == torch.float32
            assert torch.equal(tensors[name], found["state.pth"][name]) and tensors[name].any()
    # A checkpoint holds the states and their moments, not the model.
    assert {name.split("/")[1].split(".")[0] for name in trained(run)} == {"blocks", "layers"}
    # What training saw is what a text that begins with the file sees.
    state = load_tuned(run / "state.pth", model.config)
    tokens = torch.tensor([list(text.read_bytes()[:200])])
    logits = [model.float()(tokens[:, :-1], given)[0][0] for given in (state, None)]
    tuned, plain = (functional.cross_entropy(x, tokens[0, 1:]).item() for x in logits)
    assert tuned < plain - 0.1
    assert result.evaluation is not None


def test_frozen_weights_of_a_bf16_run_are_kept_in_bf16(
    tmp_path: Path, text: Path, base: Path
) -> None:
    given = {**SHORT, "tune": "state", "dtype": "bf16", "steps": 2}
    assert tune_model(base, given, [text], tmp_path / "run", device=CPU).finished
    settings = tuning_settings(given, BYTES)
    tuning = make_tuning(settings, random_model(BYTES, torch.bfloat16), None)
    assert {p.dtype for p in tuning.model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in tuning.trained.parameters()} == {torch.float32}


def test_an_adapter_is_peft_s_own_and_merges_into_an_official_checkpoint(
    tmp_path: Path, text: Path, base: Path
) -> None:
    peft = pytest.importorskip("peft")
    run, saved = tmp_path / "run", tmp_path / "merged.pth"
    given = {**SHORT, "tune": "lora", "lora_rank": 2, "lr": 3e-2, "steps": 20}
    tune_model(base, given, [text], run, device=CPU, save=saved)
    assert losses(run)[-1] < losses(run)[0]
    plain, tokens = load_model(base, device=CPU).float(), random_tokens(BYTES, 1, 7)
    expected = plain(tokens)[0]
    merged = load_model(run / "merged.safetensors", device=CPU)
    assert merged.dtype == torch.bfloat16
    written = load_model(saved, device=CPU)
    for (name, x), y in zip(merged.named_parameters(), written.named_parameters(), strict=True):
        assert torch.equal(x, y[1]), name
    # peft, reading its own file beside the model, gives what the merged model gives, within bf16.
    beside = peft.PeftModel.from_pretrained(plain, str(run / "adapter"))
    logits = beside(tokens)[0]
    assert error(expected, logits) > 0.02
    assert error(merged.float()(tokens)[0], logits) < 0.01
    # Six matrices a layer, two factors each, and nothing else is trained.
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 6 * 2
    exact = beside.merge_and_unload()
    assert error(exact(tokens)[0], logits) < 1e-5


def test_adapters_that_do_not_fit_are_refused(tmp_path: Path, text: Path, base: Path) -> None:
    pytest.importorskip("peft")
    from rwkv7.training.tuning.adapters import merge_adapter

    with pytest.raises(ValueError, match="expected a folder that peft wrote"):
        merge_adapter(base, tmp_path, tmp_path / "merged.pth")
    run, other = tmp_path / "run", tmp_path / "other.pth"
    tune_model(base, {**SHORT, "tune": "lora", "steps": 1}, [text], run, device=CPU)
    save_model(random_model(dataclasses.replace(BYTES, width=32)), other)
    with pytest.raises(ValueError, match=r"no adapter for the model of .*other\.pth"):
        merge_adapter(other, run / "adapter", tmp_path / "merged.pth")
    assert not (tmp_path / "merged.pth").exists()
    # The same sizes and other weights: a run does not go on with them.
    save_model(random_model(BYTES, seed=9), other)
    with pytest.raises(ValueError, match="holds other weights than those"):
        resume_training(run, device=CPU, base=other)


def test_a_new_model_is_not_tuned(tmp_path: Path, text: Path, settings: TrainSettings) -> None:
    from rwkv7.training import train_model

    with pytest.raises(ValueError, match="'state' is for a model that exists"):
        train_model(dataclasses.replace(settings, tune="state"), [text], tmp_path / "run")
