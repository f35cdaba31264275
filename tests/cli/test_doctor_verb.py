"""`rwkv7 doctor`: every backend is named, with what it does here or why it does nothing."""

from __future__ import annotations

import pytest
import torch

from rwkv7 import RWKV7, ModelConfig, machine, save_model
from rwkv7.cli import main
from rwkv7.engine import memory_budget
from rwkv7.wkv7.registry import backend_names, get_backend


def report(capsys, *options) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["doctor", *options])
    assert not ended.value.code
    return capsys.readouterr().out


def test_it_names_everything(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    out = report(capsys)
    for word in (*backend_names(), torch.__version__, "bfloat16", "pyrwkv-tokenizer", "triton"):
        assert word in out


def test_a_refusal_is_given_with_its_reason(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    backend = get_backend(backend_names()[-1])

    def refuses(call):
        return "it is Sunday" if call.v.dtype == torch.float16 else None

    monkeypatch.setattr(backend, "refuses", refuses)
    lines = report(capsys).splitlines()
    assert sum("it is Sunday" in line for line in lines) == 1


def test_the_memory_of_an_engine_is_told(capsys, tmp_path):
    config = ModelConfig.from_sizes(vocab_size=256, width=64, layers=2, head_size=32)
    save_model(RWKV7(config, torch.bfloat16), tmp_path / "m.safetensors")
    out = report(capsys, "--model", str(tmp_path / "m.safetensors"), "--slots", "1000")
    budget = memory_budget(config, 1000, torch.bfloat16)
    for size in (budget.weights, budget.states, budget.state, budget.total):
        assert f"{size / 2**20:,.1f} MiB" in out
    assert "1000 slots" in out
    assert "bfloat16" in out


@pytest.mark.parametrize("option", ["--slots", "--max-prefill-tokens"])
def test_a_size_of_an_engine_needs_its_model(capsys, option):
    with pytest.raises(SystemExit) as ended:
        main(["doctor", option, "4"])
    assert ended.value.code == 2
    assert capsys.readouterr() == ("", f"error: {option}: expected --model beside it, found none\n")


def test_devices_by_name():
    assert machine.device_called("cpu") == torch.device("cpu")
    assert machine.device_called(None) == machine.best_device()
    with pytest.raises(ValueError, match="device: 'nothing' cannot be used here"):
        machine.device_called("nothing")


def test_the_description_says_what_a_figure_depends_on():
    found = machine.describe()
    assert found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert found["cores"] >= 1
    assert found["processor"]
    assert machine.package_version("no-such-package-at-all") is None
