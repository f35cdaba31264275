"""What `describe` says of every kind of file that the library or its users have."""

import json

import pytest
import torch
from random_model import SMALL, random_model, random_state
from safetensors.torch import load_file, save_file

from rwkv7 import ModelState, save_model
from rwkv7.generate import Session
from rwkv7.inspection import describe, in_words
from rwkv7.sampling import Sampler
from rwkv7.state import save_tuned


@pytest.fixture
def model():
    return random_model(dtype=torch.float32)


def test_checkpoints_in_every_form(tmp_path, model):
    count = sum(x.numel() for x in model.parameters())
    for name in ("m.pth", "m.safetensors", "hf"):
        save_model(model, tmp_path / name)
        found = describe(tmp_path / name)
        assert found.kind.startswith("RWKV-7 checkpoint") and found.problem is None
        assert ("flash-linear-attention" in found.kind) == (name == "hf")
        facts = json.loads(found.to_json())["facts"]
        assert {key: facts[key] for key in SMALL.to_dict()} == SMALL.to_dict()
        unused = 0 if name == "hf" else 24 + 2 * 24 * 3
        assert (facts["parameters"], facts["heads"]) == (count + unused, 3)
        assert facts["dtypes"] == {"float32": facts["tensors"]}
        assert facts["bytes"] == 4 * facts["parameters"]
        assert facts["state_bytes_per_sequence"] == 3 * 4 * (3 * 8 * 8 + 2 * 24)
        assert facts["tokenizer"] == "unknown"


def test_a_run(tmp_path, model):
    for step in (5, 10):
        folder = tmp_path / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        save_model(model, folder / "model.safetensors", {"tokenizer": "byte", "step": str(step)})
    found = describe(tmp_path)
    assert found.kind == "run's checkpoint" and "step-00000010" in found.path
    assert found.facts["tokenizer"] == "byte"
    assert found.facts["checkpoints"] == ["step-00000005", "step-00000010"]


def test_states_and_sessions(tmp_path, model):
    state = random_state(SMALL, 2, torch.float32)
    state.save(tmp_path / "s.safetensors", SMALL)
    found = describe(tmp_path / "s.safetensors")
    assert (found.kind, found.problem, found.facts["sequences"]) == ("state", None, 2)
    assert found.facts["head_size"] == 8

    session = Session(Sampler(0.5, seed=3), state.select([0]), 7)
    session.save(tmp_path / "t.safetensors", model)
    found = describe(tmp_path / "t.safetensors")
    assert (found.kind, found.problem) == ("session", None)
    assert found.facts["session"]["token"] == 7
    assert found.facts["session"]["sampler"]["temperature"] == 0.5

    state.layers[1].wkv[0, 0, 0, 0] = float("nan")
    state.save(tmp_path / "s.safetensors", SMALL)
    assert describe(tmp_path / "s.safetensors").problem == "NaN or infinity in layers.1.wkv"


def test_tuned_states_and_adapters(tmp_path):
    save_tuned(ModelState.zeros(SMALL), tmp_path / "tuned.pth")
    found = describe(tmp_path / "tuned.pth")
    assert (found.kind, found.problem) == ("tuned state", None)
    assert [found.facts[key] for key in ("layers", "heads", "head_size")] == [3, 3, 8]

    adapter = tmp_path / "adapter"
    adapter.mkdir()
    name = "base_model.model.blocks.0.att.key"
    pair = {f"{name}.lora_A.weight": torch.ones(2, 24), f"{name}.lora_B.weight": torch.ones(24, 2)}
    save_file(pair, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2}')
    for path in (adapter, adapter / "adapter_model.safetensors"):
        found = describe(path)
        assert (found.kind, found.problem) == ("LoRA adapter", None)
        assert (found.facts["r"], found.facts["adapted"]) == (2, 1)
    (adapter / "adapter_model.safetensors").rename(tmp_path / "renamed.safetensors")
    assert describe(tmp_path / "renamed.safetensors").kind == "LoRA adapter"


def test_problems_in_words(tmp_path, model):
    save_model(model, tmp_path / "m.safetensors")
    tensors = load_file(tmp_path / "m.safetensors")
    torch.save({"blocks.0.att.time_maa_x": torch.zeros(3)}, tmp_path / "v6.pth")
    found = describe(tmp_path / "v6.pth")
    assert found.kind == "RWKV-6 checkpoint" and "it would need" in found.problem

    tensors["head.weight"][2, 3] = float("inf")
    save_file(tensors, tmp_path / "inf.safetensors")
    assert describe(tmp_path / "inf.safetensors").problem == "NaN or infinity in head.weight"

    del tensors["ln_out.bias"]
    save_file(tensors, tmp_path / "less.safetensors")
    found = describe(tmp_path / "less.safetensors")
    assert (found.kind, found.problem) == ("damaged RWKV-7 checkpoint", "ln_out.bias: missing")

    save_file({"a": torch.ones(2)}, tmp_path / "other.safetensors")
    found = describe(tmp_path / "other.safetensors")
    assert found.kind == "tensors of another kind" and found.problem.endswith("its tensors: a")

    (tmp_path / "text.pth").write_text("Call me Ishmael.")
    found = describe(tmp_path / "text.pth")
    assert found.kind == "unreadable" and found.problem.startswith("cannot be read as a PyTorch")
    with pytest.raises(FileNotFoundError):
        describe(tmp_path / "none")


def test_in_words():
    assert in_words(901_734_400, "bytes") == "860 MiB"
    assert in_words(3, "bytes") == "3 B"
    assert in_words(1234567) == "1,234,567"
    assert in_words({"a": None, "b": [1, True]}) == "a unknown, b 1, yes"
