"""The demo in small: a short story told in full, and what it leaves behind."""

import dataclasses
import json

import pytest
import typer

from rwkv7 import load_model
from rwkv7.cli import demo as verb
from rwkv7.cli.demo import PROMPT, Story, tell
from rwkv7.demo_text import load_text
from rwkv7.generate import Session
from rwkv7.training import TrainingDivergedError, TrainSettings

HELD_OUT = 2048


@pytest.fixture
def story():
    settings = TrainSettings(
        steps=2, layers=1, width=64, batch=2, window=32, held_out=HELD_OUT, save_every=1
    )
    return Story(settings=settings, text=load_text()[:40_000], characters=30)


@pytest.fixture(autouse=True)
def verified(monkeypatch):
    """`rwkv7 verify` has tests of its own, and takes seconds."""
    monkeypatch.setattr(verb, "_verify", lambda out: None)


def test_a_model_that_learned_nothing_ends_with_a_one_and_says_why(story, tmp_path, capsys):
    with pytest.raises(typer.Exit) as ended:
        tell(story, tmp_path / "out", "cpu")
    assert ended.value.exit_code == 1
    printed = capsys.readouterr().out
    assert "The same, byte for byte, as the uninterrupted text." in printed
    assert "The model needs more bits than" in printed


def test_what_the_demo_leaves_can_be_used(story, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(typer.Exit):
        tell(story, out, "cpu")
    figures = json.loads((out / "bits_per_byte.json").read_text())
    assert figures["held_out_bytes"] == HELD_OUT
    assert len(figures["bits_per_byte"]) == 5
    assert (out / "sample.txt").read_bytes().startswith(PROMPT.encode())
    assert len((out / "sample.txt").read_bytes()) == len(PROMPT) + story.characters
    model = load_model(out / "model", device="cpu").eval()
    assert Session.load(out / "session.safetensors", model).token is not None
    assert (out / "text.txt").read_bytes() == story.text


def test_a_state_that_is_lost_is_noticed(story, tmp_path, capsys, monkeypatch):
    load = Session.load

    def forgetful(path, model):
        session = load(path, model)
        session.state = None
        return session

    monkeypatch.setattr(Session, "load", forgetful)
    with pytest.raises(typer.Exit):
        # A model that learned so little hardly feels its state: it takes a few lines to hear it.
        tell(dataclasses.replace(story, characters=300), tmp_path / "out", "cpu")
    assert "NOT the same as the uninterrupted text." in capsys.readouterr().out


def test_a_model_that_beats_the_baselines_ends_well(story, tmp_path, capsys, monkeypatch):
    weak = {"byte bigram": 99.0, "gzip -9": 99.0, "xz -9": 99.0}
    monkeypatch.setattr("rwkv7.baselines.bits_per_byte", lambda train, held_out: weak)
    tell(story, tmp_path / "out", "cpu")
    assert "fewer bits than all three" in capsys.readouterr().out


def test_a_folder_with_something_in_it_is_refused(story, tmp_path):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(ValueError, match="--out: expected a new or empty folder"):
        tell(story, tmp_path, "cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_second_demo_takes_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("rwkv7-demo", "rwkv7-demo-2", "rwkv7-demo-3"):
        folder = verb._free_folder()
        assert folder.name == name
        folder.mkdir()


def test_a_training_that_diverges_ends_in_one_line(story, tmp_path, capsys, monkeypatch):
    def diverge(*_, **__):
        raise TrainingDivergedError("stopped at step 3: the loss is nan")

    monkeypatch.setattr("rwkv7.training.train_model", diverge)
    with pytest.raises(typer.Exit) as ended:
        tell(story, tmp_path / "out", "cpu")
    assert ended.value.exit_code == 1
    assert capsys.readouterr().err == "error: stopped at step 3: the loss is nan\n"
