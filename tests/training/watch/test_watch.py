"""What a person sees: speed, samples, TensorBoard, and where a loss that is no number began."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from random_model import SMALL, random_model, random_tokens
from torch import Tensor
from torch.nn import functional

from rwkv7 import RWKV7, ModelConfig, machine
from rwkv7.tokenizer import ByteTokenizer
from rwkv7.training import (
    TrainingDivergedError,
    TrainSettings,
    checkpoint,
    loop,
    resume_training,
    step,
    train_model,
)
from rwkv7.training.watch.diverged import first_not_finite
from rwkv7.training.watch.log import read_log
from rwkv7.training.watch.report import Report
from rwkv7.training.watch.samples import write_sample
from rwkv7.training.watch.speed import Utilisation, flops_per_token

CPU = "cpu"
CARD = torch.device("cuda")


def test_operations_of_a_token_counted_by_hand() -> None:
    C, L, V = 64, 2, 256
    model = RWKV7(ModelConfig.from_sizes(vocab_size=V, width=C, layers=L, head_size=32))
    # Six projections of 12 C² a layer; low-rank pairs w, a, g of rank 32 in both, v in one layer.
    matrices = L * 12 * C * C + (L * 3 + 1) * 2 * C * 32 + C * V
    states = 3 * 9 * L * C * 32
    assert flops_per_token(model) == 6 * matrices + states
    model.requires_grad_(False)
    assert flops_per_token(model) == 4 * matrices + states


def test_the_share_of_a_peak_is_shown_where_the_peak_is_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = {
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA H200": 989e12,
        "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA Something New": None,
    }
    for name, peak in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert machine.peak_flops(CARD, torch.bfloat16) == peak
    assert machine.peak_flops(CARD, torch.float32) is None
    assert machine.peak_flops(torch.device(CPU), torch.bfloat16) is None
    model = random_model(dtype=torch.float32)
    assert Utilisation(model, torch.bfloat16).at(1e6) is None
    monkeypatch.setattr("rwkv7.training.watch.speed.peak_flops", lambda *_: 1e12)
    share = Utilisation(model, torch.bfloat16).at(1000)
    assert share == pytest.approx(1000 * flops_per_token(model) / 1e12)


def compute(model: RWKV7, scale: float = 1.0) -> Tensor:
    tokens = random_tokens(SMALL, 2, 6)
    logits, _ = model(tokens[:, :-1])
    loss = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()) * scale
    loss.backward()
    return loss.detach()


class Poisoned(torch.autograd.Function):
    """Nothing going forwards, NaN going back."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> Tensor:
        return grads[0] * math.nan


def test_the_first_tensor_that_is_not_finite_is_named() -> None:
    model = random_model()

    def look(scale: float = 1.0) -> str | None:
        return first_not_finite(model, model, lambda: compute(model, scale))

    assert look() is None
    assert look(math.inf) == "the loss, of outputs that are all finite"
    handle = model.blocks[1].ffn.key.register_forward_hook(lambda *given: given[2] / 0)
    assert look() == "the output of blocks.1.ffn.key (forward pass)"
    handle.remove()
    handle = model.blocks[1].att.output.register_forward_hook(
        lambda *given: Poisoned.apply(given[2])
    )
    expected = "the gradient of blocks.1.att.output.weight (backward pass, outputs finite)"
    assert look() == expected
    handle.remove()
    with torch.no_grad():
        model.blocks[0].att.w0[3] = math.nan
    assert look() == "the parameter blocks.0.att.w0, before the step"
    assert not any(m._forward_hooks for m in model.modules())


def test_a_run_that_diverges_names_step_batch_and_tensor_and_keeps_its_weights(
    tmp_path: Path, text: Path, settings: TrainSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, kept = tmp_path / "run", {}
    settings = dataclasses.replace(settings, save_every=2)
    real = loop.Run._train_step

    def poisoned(self: loop.Run) -> object:
        if self.step == 5:
            kept.update({n: p.detach().clone() for n, p in self.model.named_parameters()})
            hook = self.model.blocks[0].ffn.register_forward_hook(lambda _, __, out: out * math.inf)
            try:
                return real(self)
            finally:
                hook.remove()
                assert all(torch.equal(p, kept[n]) for n, p in self.model.named_parameters())
        return real(self)

    monkeypatch.setattr(loop.Run, "_train_step", poisoned)
    with pytest.raises(TrainingDivergedError) as caught:
        train_model(settings, [text], run, device=CPU)
    message = str(caught.value)
    assert "stopped at step 6: " in message
    assert "First not finite: the output of blocks.0.ffn (forward pass)." in message
    assert "The batch: samples 10 to 11, the windows at the tokens " in message
    assert "The last good checkpoint, of step 4, is kept" in message
    assert kept
    found = checkpoint.newest_checkpoint(run)
    assert found is not None and found.step == 4
    monkeypatch.setattr(loop.Run, "_train_step", real)
    assert resume_training(run, device=CPU).finished


def test_a_step_whose_loss_is_no_number_changes_no_weight(
    tmp_path: Path, text: Path, settings: TrainSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, runs, kept = step.batch_gradients, [], []
    begin = loop.Run.__init__
    monkeypatch.setattr(
        loop.Run, "__init__", lambda self, *given: (begin(self, *given), runs.append(self))[0]
    )

    def poisoned(*given: object, **options: object) -> Tensor:
        kept.append([p.detach().clone() for p in runs[0].model.parameters()])
        return real(*given, **options) * (math.nan if len(kept) == 3 else 1)

    monkeypatch.setattr(step, "batch_gradients", poisoned)
    with pytest.raises(TrainingDivergedError, match="the loss is nan .* nothing when the step was"):
        train_model(settings, [text], tmp_path / "run", device=CPU)
    assert not torch.equal(kept[1][0], kept[2][0])
    for before, now in zip(kept[2], runs[0].model.parameters(), strict=True):
        assert torch.equal(before, now)


def test_samples_come_on_the_way_and_change_nothing(
    tmp_path: Path, text: Path, settings: TrainSettings
) -> None:
    class Heard(Report):
        def __init__(self) -> None:
            self.samples: list[tuple[int, str]] = []

        def sample(self, step: int, text: str) -> None:
            self.samples.append((step, text))

    sampled = dataclasses.replace(settings, sample_every=3, sample_prompt="the ")
    heard, run, plain = Heard(), tmp_path / "run", tmp_path / "plain"
    train_model(sampled, [text], run, device=CPU, report=heard, on_step=lambda r: r.step == 5)
    resume_training(run, device=CPU, report=heard)
    train_model(settings, [text], plain, device=CPU)
    assert [step for step, _ in heard.samples] == [3, 6]
    written = (run / "samples.txt").read_text(encoding="utf-8")
    for number, sample in heard.samples:
        assert sample.startswith("the ") and len(sample.encode(errors="replace")) > 60
        assert f"step {number}\n{sample}\n" in written
    assert [x["sample"] for x in read_log(run / "log.jsonl") if "sample" in x] == [
        sample for _, sample in heard.samples
    ]
    losses = [[x["loss"] for x in read_log(r / "log.jsonl") if "loss" in x] for r in (run, plain)]
    assert losses[0] == losses[1]


def test_a_sample_begins_with_the_initial_state() -> None:
    config = dataclasses.replace(SMALL, vocab_size=256)
    model = random_model(config, torch.float32).train()
    tokenizer = ByteTokenizer()
    state = model(random_tokens(config, 1, 20))[1]
    one, same, other = (
        write_sample(model, tokenizer, "a", seed=1, initial=given, tokens=20)
        for given in (None, lambda _: None, lambda _: state)
    )
    assert one == same != other and model.training


def test_tensorboard(tmp_path: Path, text: Path, settings: TrainSettings) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    asked = dataclasses.replace(settings, tensorboard=True, sample_every=4)
    train_model(asked, [text], run, device=CPU, on_step=lambda record: record.step == 5)
    resume_training(run, device=CPU)
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    found = {e.step: e.value for e in events.Scalars("training/loss")}
    logged = {x["step"]: x["loss"] for x in read_log(run / "log.jsonl") if "loss" in x}
    assert found == pytest.approx(logged)
    assert [e.step for e in events.Scalars("held_out/bits_per_byte")] == [8]
    assert "speed/tokens_per_second" in events.Tags()["scalars"]
    assert "speed/mfu" not in events.Tags()["scalars"]
