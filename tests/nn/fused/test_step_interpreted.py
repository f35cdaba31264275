"""The fused decode step under Triton's interpreter: a model's steps with it and without."""

import pytest
import torch
from random_model import SMALL, error, random_model, random_state, random_tokens, rows
from triton_interpreter import load

from rwkv7 import ModelConfig
from rwkv7.nn.fused import Stream, use_fused
from rwkv7.nn.token_shift import slots_of
from rwkv7.wkv7 import checks, unchecked

load("rwkv7.nn.fused.kernels", "step", "single", "rows", "elements")
pytestmark = pytest.mark.usefixtures("interpreter")

LARGER = ModelConfig(
    vocab_size=7, width=128, layers=2, head_size=64,
    decay_rank=4, iclr_rank=4, value_rank=4, gate_rank=4,
)  # fmt: skip


def steps(config, dtype, slots, *, fused, model=None):
    """(logits of two steps, the pool after them)."""
    model = model or random_model(config, dtype=dtype)
    pool = random_state(config, 5, dtype)
    logits = []
    with use_fused(fused), unchecked():
        for t in range(2):
            tokens = random_tokens(config, len(slots), seed=t)
            logits.append(model.step_(tokens, pool, torch.tensor(slots)))
    return torch.stack(logits), pool


@pytest.mark.parametrize(
    ("config", "slots"),
    [(SMALL, [2, 0, 3]), (SMALL, [2, -1, 3, -1]), (LARGER, [1, 0]), (SMALL, [3]), (LARGER, [1])],
    ids=["N8", "skipped", "N64", "one", "one, N64"],
)
def test_steps_of_a_model(config, slots):
    found, pool = steps(config, torch.float32, slots, fused=True)
    expected, plain = steps(config, torch.float64, slots, fused=False)
    used = [slot for slot in slots if slot >= 0]
    chosen = [i for i, slot in enumerate(slots) if slot >= 0]
    assert error(found[:, chosen], expected[:, chosen]) < 1e-5
    for x, e in zip(rows(pool.select(used)), rows(plain.select(used)), strict=True):
        assert error(x, e) < 1e-5
    others = sorted(set(range(5)) - set(used))
    before = random_state(config, 5, torch.float32)
    for x, e in zip(rows(pool.select(others)), rows(before.select(others)), strict=True):
        assert torch.equal(x, e)


def test_a_skipped_row_may_be_anything():
    with use_fused(True), unchecked():
        model, pool = random_model(dtype=torch.float32), random_state(SMALL, 2, torch.float32)
        before = pool.clone()
        for layer in pool.layers:
            layer.wkv[1] = layer.time_shift[1] = torch.nan
        alone = model.step_(torch.tensor([3]), before, torch.tensor([0]))
        both = model.step_(torch.tensor([3, 5]), pool, torch.tensor([0, -1]))
    assert error(both[:1], alone) < 1e-6
    for x, e in zip(rows(pool.select([0])), rows(before.select([0])), strict=True):
        assert error(x, e) < 1e-6


def test_it_steps_aside_for_checks(monkeypatch):
    def refused(*_):
        raise AssertionError

    for name in ("step._time_mix_step_", "step._mix_in_pool_", "single.norm_mix", "rows.norm_mix"):
        monkeypatch.setattr(f"rwkv7.nn.fused.{name}", refused)
    with use_fused(True), checks():
        model, pool = random_model(dtype=torch.float32), random_state(SMALL, 2, torch.float32)
        model.step_(torch.tensor([3]), pool, torch.tensor([0]))
        with pytest.raises(ValueError, match="slots: a row may be named once"):
            model.step_(torch.tensor([3, 4]), pool, torch.tensor([0, 0]))
    for count in (1, 2):
        with use_fused(True), unchecked(), pytest.raises(AssertionError):
            model.step_(torch.arange(count), pool, torch.arange(count))


@pytest.mark.parametrize(("config", "along"), [(SMALL, 8), (LARGER, 64)], ids=["N8", "N64"])
def test_one_row_in_pieces(config, along, monkeypatch):
    sizes = {"_ROWS": 16, "_ALONG": along, "_COLUMNS": 2, "_DOWN": along, "_CHANNELS": 16}
    for name, size in sizes.items():
        monkeypatch.setattr(f"rwkv7.nn.fused.single.{name}", size)
    found, pool = steps(config, torch.float32, [3], fused=True)
    expected, plain = steps(config, torch.float64, [3], fused=False)
    assert error(found, expected) < 1e-5
    for x, e in zip(rows(pool.select([3])), rows(plain.select([3])), strict=True):
        assert error(x, e) < 1e-5


@pytest.mark.parametrize("slots", [[3], [2, 0]], ids=["one", "rows"])
def test_rows_of_a_model_with_more_than_weights(slots):
    """A hook stands for an adapter: what it adds is not passed by."""
    model = random_model(dtype=torch.float32)
    model.blocks[1].ffn.key.register_forward_hook(lambda module, given, y: y + 1)
    model.blocks[2].att.output.register_forward_hook(lambda module, given, y: y + 1)
    found, _ = steps(SMALL, torch.float32, slots, fused=True, model=model)
    expected, _ = steps(SMALL, torch.float32, slots, fused=False, model=model)
    assert error(found, expected) < 1e-5


def test_compiled_and_checked_by_torch():
    model = random_model(dtype=torch.float32)
    model.compile_step("aot_eager")
    found, pool = steps(SMALL, torch.float32, [2, 0], fused=True, model=model)
    expected, after = steps(SMALL, torch.float32, [2, 0], fused=True)
    assert error(found, expected) < 1e-6
    for x, e in zip(rows(pool.select([0, 2])), rows(after.select([0, 2])), strict=True):
        assert error(x, e) < 1e-6


@pytest.mark.parametrize("layer", [0, 1])
def test_opcheck(layer, monkeypatch):
    operator = torch.ops.rwkv7.time_mix_step_.default

    def checked(*arguments):
        torch.library.opcheck(operator, arguments)
        return operator(*arguments)

    monkeypatch.setattr("rwkv7.nn.fused.step._time_mix_step_", checked)
    block = random_model(dtype=torch.float32).blocks[layer]
    state, x = random_state(SMALL, 3, torch.float32).layers[0], torch.randn(2, 1, SMALL.width)
    slots = slots_of(torch.tensor([2, 0]), torch.zeros(2), 3)
    with use_fused(True), unchecked(), torch.no_grad():
        block.step_(Stream(x), x if layer else None, state, slots)
