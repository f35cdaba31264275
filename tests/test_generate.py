"""Sessions: cut anywhere, a text goes on as if it had not been; broken and foreign ones do not."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from safetensors.torch import save_file
from talking_model import REFRAIN, talking_model

from rwkv7 import generate as module
from rwkv7.generate import Session, generate
from rwkv7.inspection import describe
from rwkv7.sampling import Sampler
from rwkv7.state import ModelState, save_tuned

LENGTH = 26  # two refrains and a bit: cuts fall between and inside characters of 2, 3 and 4 bytes
PROMPT = list("so: aé".encode())


@pytest.fixture(scope="module")
def model():
    return talking_model()


def sampler(temperature):
    return Sampler(temperature, top_k=40, top_p=0.95, seed=11)


def uncut(model, temperature, length=LENGTH):
    return list(generate(model, PROMPT, None, sampler(temperature), length))


def resumed(session, model, path):
    session.save(path, model)
    return Session.load(path, model)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_cut_anywhere_the_text_is_the_same(model, tmp_path, temperature):
    expected = uncut(model, temperature)
    for cut in range(LENGTH + 1):
        session = Session(sampler(temperature))
        session.feed(model, PROMPT)
        found = list(session.run(model, cut))
        session = resumed(session, model, tmp_path / "s")
        found += session.run(model, LENGTH - cut)
        assert found == expected, f"cut at {cut}"


def test_the_text_is_one_that_a_lost_state_or_sampler_would_change(model):
    expected = uncut(model, 1.0)
    whole = Session(sampler(1.0))
    whole.feed(model, PROMPT)
    found = list(whole.run(model, 13))
    forgetful = Session(sampler(1.0), None, whole.token)
    forgetful.sampler.draws = whole.sampler.draws
    assert found + list(forgetful.run(model, 13)) != expected
    reseeded = Session(Sampler(1.0, 40, 0.95, seed=12), whole.state, whole.token)
    assert found + list(reseeded.run(model, 13)) != expected


def test_cut_after_every_token(model, tmp_path):
    session = Session(sampler(1.0))
    session.feed(model, PROMPT)
    found = []
    for _ in range(LENGTH):
        session = resumed(session, model, tmp_path / "s")
        found += session.run(model, 1)
    assert found == uncut(model, 1.0)


def test_a_prompt_is_appended_to_a_session(model, tmp_path):
    session = Session(sampler(0.0))
    session.feed(model, PROMPT)
    drawn = list(session.run(model, 5))
    session = resumed(session, model, tmp_path / "s")
    session.feed(model, list(b" and"))
    _, state = model(torch.tensor([PROMPT + drawn + list(b" an")]))
    for found, expected in zip(session.state.layers, state.layers, strict=True):
        assert torch.allclose(found.wkv, expected.wkv, rtol=1e-4, atol=1e-5)
    assert session.token == ord("d")


def test_a_long_prompt_read_in_pieces_is_the_same_prompt(model, monkeypatch):
    prompt = list(REFRAIN * 5)
    whole = list(generate(model, prompt, None, Sampler(0), 12))
    monkeypatch.setattr(module, "_PREFILL", 7)
    assert list(generate(model, prompt, None, Sampler(0), 12)) == whole


def test_a_state_given_is_gone_on_from_and_not_changed(model):
    with torch.no_grad():
        _, state = model(torch.tensor([PROMPT[:4]]))
    before = state.clone()
    found = list(generate(model, PROMPT[4:], state, sampler(1.0), LENGTH))
    assert found == uncut(model, 1.0)
    for a, b in zip(state.layers, before.layers, strict=True):
        assert all(map(torch.equal, a, b))


def test_a_stop_id_ends_the_text_until_a_prompt_comes(model, tmp_path):
    stop = (ord("\n"),)
    session = Session(Sampler(0))
    session.feed(model, PROMPT)
    found = list(session.run(model, 99, stop))
    assert found[-1] in stop
    assert len(found) < 99
    session = resumed(session, model, tmp_path / "s")
    assert list(session.run(model, 99, stop)) == []
    session.feed(model, [])
    assert list(session.run(model, 99, stop)) == []
    session.feed(model, [ord("a")])
    assert len(list(session.run(model, 3, stop))) == 3


def test_pending_bytes_and_draws_are_kept(model, tmp_path):
    session = Session(sampler(1.0), pending=b"\xe2\x82")
    session.feed(model, PROMPT)
    list(itertools.islice(session.run(model, 9), 4))
    session = resumed(session, model, tmp_path / "s")
    assert session.pending == b"\xe2\x82"
    assert session.sampler.state_dict() == sampler(1.0).state_dict() | {"draws": 4}


def test_an_empty_session_is_saved_too(model, tmp_path):
    session = resumed(Session(sampler(1.0)), model, tmp_path / "s")
    session.feed(model, PROMPT)
    assert list(session.run(model, LENGTH)) == uncut(model, 1.0)


def test_no_gradients_are_kept(model):
    session = Session(sampler(1.0))
    session.feed(model, PROMPT)
    list(session.run(model, 2))
    assert not session.state.layers[0].wkv.requires_grad
    assert torch.is_grad_enabled()


def test_what_is_refused(model):
    with pytest.raises(ValueError, match="ids from 0 to 255, found 256"):
        list(generate(model, [1, 256]))
    with pytest.raises(ValueError, match="expected a prompt"):
        list(generate(model, []))


@pytest.fixture
def saved(model, tmp_path):
    session = Session(sampler(1.0))
    session.feed(model, PROMPT)
    list(session.run(model, 3))
    path = tmp_path / "session"
    session.save(path, model)
    return path


def test_a_session_of_other_sizes_is_refused_in_words(saved):
    with pytest.raises(ValueError, match=r"another model: it has layers 2 \(the model's: 3\)"):
        Session.load(saved, talking_model(layers=3))


def test_a_session_of_other_weights_is_refused(saved):
    with pytest.raises(ValueError, match="other weights of the same sizes"):
        Session.load(saved, talking_model(seed=1))


def test_another_dtype_of_the_same_weights_is_taken(saved, model):
    session = Session.load(saved, talking_model().to(torch.float64))
    assert session.state.layers[0].wkv.dtype == torch.float64
    half = talking_model().to(torch.bfloat16)
    session = Session.load(saved, half)
    assert session.state.layers[0].time_shift.dtype == torch.bfloat16
    assert len(list(session.run(half, 2))) == 2


@pytest.mark.parametrize("size", [0, 5, 100, 3000])
def test_a_truncated_session_is_refused(saved, model, size):
    saved.write_bytes(saved.read_bytes()[:size])
    with pytest.raises(ValueError, match="session: not a session, or a truncated one"):
        Session.load(saved, model)


@pytest.mark.parametrize("name", ["session", "session.pth", "session.v2"])
def test_the_name_of_a_session_is_free(saved, model, name):
    session = Session.load(saved.rename(saved.with_name(name)), model)
    assert len(list(session.run(model, 2))) == 2
    assert describe(saved.with_name(name)).kind == "session"


def test_a_state_alone_is_a_past_without_a_token(model, tmp_path):
    with torch.no_grad():
        _, state = model(torch.tensor([PROMPT[:4]]))
    state.save(tmp_path / "state.safetensors", model.config)
    session = Session.load(tmp_path / "state.safetensors", model)
    session.sampler = sampler(1.0)
    session.feed(model, PROMPT[4:])
    assert list(session.run(model, LENGTH)) == uncut(model, 1.0)


def test_a_state_of_two_texts_is_refused(model, tmp_path):
    state = ModelState.zeros(model.config, 2)
    state.save(tmp_path / "state.safetensors", model.config)
    with pytest.raises(ValueError, match="for 1 sequences of this model"):
        Session.load(tmp_path / "state.safetensors", model)


def test_a_missing_file_is_an_oserror(model, tmp_path):
    with pytest.raises(FileNotFoundError):
        Session.load(tmp_path / "nothing", model)


def rewritten(path, change):
    """The session at `path` with `change(tensors, metadata, about)` applied."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    about = json.loads(metadata["session"])
    del metadata["digest"]  # as of a writer that means what it writes
    change(tensors, metadata, about)
    if metadata["session"] not in UNREADABLE:
        metadata["session"] = json.dumps(about)
    save_file(tensors, path, metadata)


UNREADABLE = ("{", "[" * 100_000, "NaN", "[]")
BROKEN = {
    "kind": lambda t, m, a: m.update(kind="something else"),
    "layout 'B, H, V, K'": lambda t, m, a: m.update(layout="B, H, K, V"),
    "its own part cannot be read": lambda t, m, a: m.update(session="{"),
    "a session of version 2": lambda t, m, a: a.update(version=2),
    "its token cannot be read": lambda t, m, a: a.update(token="7"),
    "ids from 0 to 255, found 300": lambda t, m, a: a.update(token=300),
    "its pending bytes": lambda t, m, a: a.update(pending="zz"),
    "sampler: top_p": lambda t, m, a: a["sampler"].update(top_p="x"),
    "top_p: expected a number from 0": lambda t, m, a: a["sampler"].update(top_p=7.0),
    "its sampler cannot be read": lambda t, m, a: a.update(sampler=[1]),
    "lacks layers.1.wkv": lambda t, m, a: t.pop("layers.1.wkv"),
    "not a number": lambda t, m, a: t["layers.0.wkv"].fill_(float("nan")),
    r"wkv: expected \[1, 2, 32, 32\]": lambda t, m, a: t.update({"layers.0.wkv": torch.ones(3)}),
    "time_shift: expected": lambda t, m, a: t.update(
        {name: torch.ones(1, 3) for name in t if name.endswith("shift")}
    ),
}


@pytest.mark.parametrize("words", BROKEN)
def test_a_broken_session_says_what_is_wrong(saved, model, words):
    rewritten(saved, BROKEN[words])
    with pytest.raises(ValueError, match=f"session: .*{words}"):
        Session.load(saved, model)


@pytest.mark.parametrize("content", UNREADABLE, ids=["cut", "deep", "NaN", "list"])
def test_a_session_that_is_no_object_says_so(saved, model, content):
    rewritten(saved, lambda t, m, a: m.update(session=content))
    with pytest.raises(ValueError, match="its own part cannot be read"):
        Session.load(saved, model)


def test_nothing_in_a_session_is_executed(model, tmp_path):
    ran = tmp_path / "ran"

    class Bomb:
        def __reduce__(self):
            return ran.write_text, ("it ran",)

    path = tmp_path / "session"
    torch.save({"layers.0.wkv": Bomb()}, path)
    ran.unlink(missing_ok=True)
    with pytest.raises(ValueError, match="not a session"):
        Session.load(path, model)
    assert not ran.exists()


def test_a_failed_save_leaves_the_old_session_whole(saved, model, monkeypatch):
    before = saved.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        Session(sampler(1.0)).save(saved, model)
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == ["session"]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_tuned_state_begins_a_text(model, tmp_path, suffix):
    state = ModelState.zeros(model.config, 1, model.dtype)
    for layer in state.layers:
        layer.wkv.normal_(generator=torch.Generator().manual_seed(3))
    path = tmp_path / f"tuned{suffix}"
    save_tuned(state, path)
    session = Session.load(path, model)
    assert session.token is None
    for layer, wanted in zip(session.state.layers, state.layers, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(layer, wanted, strict=True))
    session.feed(model, [1, 2])
    whole = list(generate(model, [1, 2], state, Sampler(seed=session.sampler.seed), 8))
    assert list(session.run(model, 8)) == whole
    torch.save({"blocks.0.att.time_state": torch.zeros(1, 2, 2)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth: .*is missing|expected \[H, V, K\]"):
        Session.load(tmp_path / "other.pth", model)
