"""One step of a run against the recipe written out in fp64, and the ways of computing it.

The oracle is tests/transcription.py for the model, and the loss, L2Wrap, clipping and AdamW as
their formulas say.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transcription
from random_model import error, random_model
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from rwkv7 import RWKV7, ModelConfig
from rwkv7.benchmark.clock import peak_mib
from rwkv7.nn import RECOMPUTE
from rwkv7.tokenizer import get_tokenizer
from rwkv7.training import TrainSettings, loop, resume_training, train_model
from rwkv7.training.batch import Batch
from rwkv7.training.carry import batch_gradients
from rwkv7.training.checkpoint import newest_checkpoint
from rwkv7.training.data import find_text, prepare_data
from rwkv7.training.loss import L2_WRAP
from rwkv7.training.optim import learning_rate, make_optimizer
from rwkv7.training.together.processes import Crew
from rwkv7.training.together.team import Team
from rwkv7.training.tuning import Tuning

CONFIG = ModelConfig(
    vocab_size=256,
    width=16,
    layers=2,
    head_size=8,
    decay_rank=4,
    iclr_rank=4,
    value_rank=3,
    gate_rank=5,
)
SMALL = {"window": 5, "weight_decay": 0.1, "warmup": 0, "lr": 1e-2}


def transcribed(model: RWKV7, inputs: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and every gradient, in fp64, of the rows as independent sequences."""
    leaves = {n: x.detach().double().requires_grad_() for n, x in model.named_parameters()}
    losses, pulls = [], []
    for ids, wanted in zip(inputs.tolist(), targets.tolist(), strict=True):
        logits, _ = transcription.forward(leaves, ids)
        for row, target in zip(logits, wanted, strict=True):
            losses.append(torch.log(torch.exp(row).sum()) - row[target])
            pulls.append(row.max() ** 2 * L2_WRAP / 2)
    loss = torch.stack(losses).mean()
    (loss + torch.stack(pulls).mean()).backward()
    return loss.detach(), {n: x.grad for n, x in leaves.items() if x.grad is not None}


def one_step(
    model: RWKV7, settings: TrainSettings, text: Path, folder: Path
) -> tuple[loop.Run, Tensor, Tensor, float]:
    """A run one step on, and the inputs, targets and loss of the step."""
    data = prepare_data(find_text([text]), folder / "data", get_tokenizer("byte"))
    tuning, cpu = Tuning(model), torch.device("cpu")
    optimizer = make_optimizer(tuning.trained, settings)
    team = Team(Crew(), settings, cpu, tuning, optimizer)
    run = loop.Run(folder, settings, data, tuning, team)
    batch = run.source.batch(0)
    return run, batch.inputs, batch.targets, run._train_step().loss


@pytest.mark.parametrize(("start", "clip"), [("random", 0.7), ("official", math.inf)])
def test_a_step_is_the_recipe(
    start: str, clip: float, settings: TrainSettings, text: Path, tmp_path: Path
) -> None:
    small = dataclasses.replace(settings, clip=clip, **SMALL)
    torch.manual_seed(0)
    official = RWKV7(CONFIG, dtype=torch.float64)
    model = random_model(CONFIG) if start == "random" else official
    before = {name: x.detach().clone() for name, x in model.named_parameters()}
    _, inputs, targets, found = one_step(model, small, text, tmp_path)
    for name, x in model.named_parameters():
        x.grad_now, x.data_now = x.grad.clone(), x.detach().clone()
        x.data.copy_(before[name])
    loss, gradients = transcribed(model, inputs, targets)
    assert found == pytest.approx(loss.item(), rel=1e-10)
    norm = torch.sqrt(sum((g**2).sum() for g in gradients.values()))
    clip = min(1.0, clip / norm.item())
    assert (clip < 1) is (start == "random")  # both sides of clipping are seen
    rate = learning_rate(small, 0)
    for name, x in model.named_parameters():
        g = gradients[name] * clip
        if not g.any():  # such as those behind the zeros that the official start has
            assert start == "official" and not x.grad_now.any(), name
        else:
            assert error(x.grad_now, g) < 1e-6, name  # clipping divides by the norm + 1e-6
            assert error(x.grad_now / x.grad_now.norm(), g / g.norm()) < 1e-10, name
        scale = rate * (2 if name.endswith("att.w0") else 1)
        decay = small.weight_decay if x.ndim == 2 and name.endswith(".weight") else 0
        wanted = before[name] * (1 - scale * decay) - scale * g / (g.abs() + 1e-18)
        clear = g.abs() > 1e-14  # where rounding does not decide the sign of the gradient
        assert error(x.data_now[clear], wanted[clear]) < 1e-10 or not clear.any(), name


def test_mixed_precision_keeps_weights_and_moments_in_fp32(
    settings: TrainSettings, text: Path, tmp_path: Path
) -> None:
    model = random_model(CONFIG, torch.float32)
    before = {name: x.detach().clone() for name, x in model.named_parameters()}
    small = dataclasses.replace(settings, dtype="bf16", clip=math.inf, **SMALL)
    run, inputs, targets, found = one_step(model, small, text, tmp_path)
    after = {name: x.grad.clone() for name, x in model.named_parameters()}
    moments = [x for state in run.optimizer.state.values() for x in state.values()]
    assert len(moments) == 3 * len(before)
    assert {x.dtype for x in (*model.parameters(), *after.values(), *moments)} == {torch.float32}
    for name, x in model.named_parameters():
        # Steps smaller than bf16 could hold arrive in the weights.
        assert not torch.equal(x, before[name]) and not torch.equal(x, x.bfloat16().float()), name
        x.data.copy_(before[name])
    loss, gradients = transcribed(model, inputs, targets)
    assert found == pytest.approx(loss.item(), rel=1e-2)
    # Products were in 16 bits; beyond what that costs by torch's own means nothing is lost.
    with torch.autocast("cpu", torch.bfloat16):
        logits, _ = model(inputs)
        plain = functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
    plain.backward()
    plainly = {name: x.grad - after[name] for name, x in model.named_parameters()}
    joined = [
        torch.cat([g[name].flatten() for name in sorted(g)]) for g in (after, plainly, gradients)
    ]
    assert 1e-3 < error(joined[0], joined[2]) < 1.1 * error(joined[1], joined[2])


def test_what_is_computed_again_gives_the_same_bits_in_less_memory() -> None:
    model = random_model(dataclasses.replace(CONFIG, layers=6), torch.float32)
    ids = torch.randint(256, (2, 65), generator=torch.Generator().manual_seed(0))
    batch = Batch(inputs=ids[:, :-1], targets=ids[:, 1:])
    gradients, most = [], []
    for model.recompute in RECOMPUTE:
        for mode in ("off", "exact"):
            model.zero_grad()
            batch_gradients(model, batch, mode=mode, window=40)
            gradients.append([x.grad.clone() for x in model.parameters()])
        run: Callable[[], object] = lambda: batch_gradients(model, batch)  # noqa: E731
        most.append(peak_mib(run, torch.device("cpu")))
    for plain, again in ((0, 2), (1, 3), (0, 4), (1, 5)):
        assert all(map(torch.equal, gradients[plain], gradients[again]))
    nothing, cheap, layers = most
    assert layers < 0.5 * nothing and cheap < 0.9 * nothing


@pytest.mark.parametrize("carry", ["truncated", "exact"])
def test_a_run_that_carries_is_resumed_bit_for_bit(
    tmp_path: Path, text: Path, settings: TrainSettings, carry: str
) -> None:
    settings = dataclasses.replace(
        settings, carry=carry, sequence=30, window=8, accumulate=2, steps=4, save_every=2
    )
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train_model(settings, [text], whole, device="cpu")
    train_model(settings, [text], stopped, device="cpu", on_step=lambda record: record.step == 3)
    # What only saves memory may be changed on the way.
    result = resume_training(stopped, {"recompute": "layers"}, device="cpu")
    assert result.finished
    assert_same_weights(whole, stopped)


def test_a_run_in_parts_or_in_exact_windows_is_the_run_in_one_piece(
    tmp_path: Path, text: Path, settings: TrainSettings
) -> None:
    settings = dataclasses.replace(settings, batch=3, steps=1)
    ways = {
        "plain": {},
        "parts": {"accumulate": 2},
        "exact": {"carry": "exact", "sequence": settings.window, "window": 5},
        "packed": {"pack": True},
        "packed parts": {"pack": True, "accumulate": 2},
        "packed exact": {"pack": True, "carry": "exact", "sequence": settings.window, "window": 5},
        "truncated": {"carry": "truncated", "sequence": settings.window, "window": 5},
    }
    losses, norms = {}, {}
    for name, changes in ways.items():
        records = []
        train_model(
            dataclasses.replace(settings, **changes),
            [text],
            tmp_path / name,
            device="cpu",
            on_step=lambda record, records=records: records.append(record),
        )
        losses[name], norms[name] = records[0].loss, records[0].grad_norm
        assert records[0].tokens == 3 * 12
    for name in ways.keys() - {"truncated"}:
        assert losses[name] == pytest.approx(losses["plain"], rel=1e-6)
        assert norms[name] == pytest.approx(norms["plain"], rel=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"carry": "all"}, "carry: expected one of off, truncated, exact, found 'all'"),
        ({"sequence": 100}, 'sequence: expected nothing with carry "off", found 100'),
        (
            {"carry": "exact"},
            'sequence: expected a number of tokens with carry "exact", found None',
        ),
        ({"accumulate": 0}, "accumulate: expected 1 to the batch's 16, found 0"),
        ({"chat": True, "order": "official"}, "order: expected shuffled with chat, found"),
        ({"on_bad": "go"}, "on_bad: expected one of stop, skip, found 'go'"),
        ({"accumulate": 17}, "accumulate: expected 1 to the batch's 16, found 17"),
        (
            {"accumulate": 2, "pack": True, "carry": "truncated", "sequence": 9},
            "accumulate: expected 1 for packed, truncated text, found 2",
        ),
    ],
)
def test_settings_of_a_step_that_make_no_sense(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainSettings(**change)


def assert_same_weights(one: Path, other: Path) -> None:
    folders = [newest_checkpoint(run) for run in (one, other)]
    first, second = (
        {p.name: load_file(p) for p in found.path.glob("*.safetensors")}
        for found in folders
        if found is not None
    )
    for name, tensors in first.items():
        for key, tensor in tensors.items():
            assert torch.equal(tensor, second[name][key]), f"{name}: {key}"
