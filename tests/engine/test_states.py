"""States as things: marks, forks, sessions, saved conversations, and whose they are."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from talking_model import REFRAIN, talking_model

from rwkv7 import ModelState
from rwkv7.engine import Engine, Request, StateStore
from rwkv7.generate import Session, generate
from rwkv7.sampling import Sampler
from rwkv7.tokenizer import ByteTokenizer

PROMPT = list(b"so: ")
DECODE = ByteTokenizer().decode_bytes


@pytest.fixture(scope="module")
def model():
    return talking_model()


def request(**changes):
    settings = {"max_tokens": 20, "sampler": Sampler(1.0, top_p=0.9, seed=3)}
    return Request(PROMPT, **{**settings, **changes})


def session_after(model, count):
    session = Session(Sampler(1.0, top_p=0.9, seed=3))
    session.feed(model, PROMPT)
    list(session.run(model, count))
    return session


def test_rewound_to_a_mark_a_text_comes_again(model):
    engine = Engine(model, slots=2)
    whole = engine.submit(request()).result().tokens
    handle = engine.submit(request())
    stream = handle.stream()
    before = [token for _ in range(7) for token in next(stream).tokens]
    mark = handle.mark()
    rest = tuple(token for event in stream for token in event.tokens)
    assert (*before, *rest) == whole
    again = engine.submit(Request((), max_tokens=13, state=mark)).result().tokens
    assert again == rest
    assert engine.submit(Request((), max_tokens=13, state=mark)).result().tokens == rest
    with pytest.raises(ValueError, match="sample: 0 has ended"):
        handle.mark()


def test_a_fork_goes_its_own_way(model):
    engine = Engine(model, slots=3)
    whole = engine.submit(request()).result().tokens
    handle = engine.submit(request())
    for _ in range(6):
        engine.step()
    same = handle.fork()
    other = handle.fork(sampler=Sampler(1.0, seed=99))
    assert handle.result().tokens == whole
    assert same.result().tokens == whole[-len(same.result().tokens) :]
    assert other.result().tokens != same.result().tokens
    assert len(other.result().tokens) == len(same.result().tokens) < 20


def test_a_fork_inside_a_character_gives_whole_ones(model):
    engine = Engine(model, slots=2, decode=DECODE)
    whole = engine.submit(request(sampler=Sampler(0), max_tokens=26)).result().text
    for cut in range(1, 26, 4):
        handle = engine.submit(request(sampler=Sampler(0), max_tokens=26))
        stream = handle.stream()
        given = "".join(next(stream).text for _ in range(cut))
        fork = handle.fork()
        assert given + fork.result().text == whole
        handle.cancel()


def test_a_conversation_goes_on_in_a_session_that_is_kept(model):
    engine = Engine(model, slots=2)
    first = engine.submit(request(keep=True, max_tokens=5)).result()
    assert first.session.token == first.tokens[-1]
    sampler = Sampler(0)
    second = engine.submit(
        Request(list(b"and"), max_tokens=9, sampler=sampler, state=first.session)
    )
    history = [*PROMPT, *first.tokens, *b"and"]
    assert second.result().tokens == tuple(generate(model, history, None, Sampler(0), 9))


def test_a_state_is_gone_on_from_and_left_alone(model):
    with torch.no_grad():
        _, state = model(torch.tensor([PROMPT]))
    before = state.clone()
    engine = Engine(model, slots=2)
    handle = engine.submit(Request(list(REFRAIN), max_tokens=9, sampler=Sampler(0), state=state))
    for layer in state.layers:
        layer.wkv.add_(1)  # what is done to it later is the caller's affair
    found = handle.result()
    for layer in state.layers:
        layer.wkv.sub_(1)
    assert found.tokens == tuple(generate(model, list(REFRAIN), before, Sampler(0), 9))
    for x, y in zip(state.layers, before.layers, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-6)


def test_states_of_other_models_are_refused(model):
    engine = Engine(model, slots=2)
    stranger = talking_model(seed=1)
    foreign = Engine(stranger, slots=1).submit(request(keep=True)).result().session
    with pytest.raises(ValueError, match="belongs to other weights"):
        engine.submit(Request([1], state=foreign))
    with pytest.raises(ValueError, match="expected one sequence, found 2"):
        engine.submit(Request([1], state=ModelState.zeros(model.config, 2)))
    deeper = talking_model(layers=3)
    with pytest.raises(ValueError, match="state: expected 2 layers, found 3"):
        engine.submit(Request([1], state=ModelState.zeros(deeper.config)))
    with pytest.raises(TypeError, match="state.to"):
        engine.submit(Request([1], state=ModelState.zeros(model.config, 1, torch.bfloat16)))
    broken = ModelState.zeros(model.config)
    broken.layers[1].wkv[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="state: expected numbers, found NaN"):
        engine.submit(Request([1], state=broken))


def test_saved_conversations_go_on_as_they_were(model, tmp_path):
    store = StateStore(tmp_path / "new", model)
    names = ["a", "A", "user/1: größe?", ".."]
    for count, name in enumerate(names):
        store.save(name, session_after(model, count))
    assert sorted(store) == sorted(names)
    assert len(store) == 4
    for count, name in enumerate(names):
        expected = session_after(model, count)
        assert list(store.load(name).run(model, 5)) == list(expected.run(model, 5))
    store.delete("a")
    assert "a" not in store
    assert "A" in store
    for missing in (store.load, store.delete):
        with pytest.raises(KeyError):
            missing("a")
    for bad in ("", "x" * 201):
        with pytest.raises(ValueError, match="name: expected 1 to 200 bytes"):
            store.save(bad, session_after(model, 0))
    with pytest.raises(TypeError, match="name: expected a text, found 5"):
        store.load(5)
    with pytest.raises(ValueError, match="belongs to other weights"):
        StateStore(tmp_path / "new", talking_model(seed=1)).load("A")


def test_a_full_disk_loses_nothing(model, tmp_path, monkeypatch):
    store = StateStore(tmp_path, model)
    store.save("a", session_after(model, 2))

    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("rwkv7.generate.save_file", full)
        for name in ("a", "b"):
            with pytest.raises(OSError, match="No space left"):
                store.save(name, session_after(model, 5))
    assert list(store) == ["a"]
    assert len(list(tmp_path.iterdir())) == 1
    assert store.load("a").sampler.draws == 2


def test_what_a_killed_process_left_half_written_is_removed(model, tmp_path):
    ours = [tmp_path / f".session-a.safetensors.{x}4567abcd.tmp" for x in ("old", "new")]
    its = [tmp_path / f".tmp{x}" for x in ("9RXiu5", "9RXiu6")]  # as safetensors calls its own
    kept = [tmp_path / x for x in (".tmp", ".tmp-mine", "session-b.safetensors")]
    for path in (*ours, *its, *kept):
        path.write_bytes(b"half")
    for path in (ours[0], its[0], *kept):
        os.utime(path, (0, 0))
    StateStore(tmp_path, model)
    assert set(tmp_path.iterdir()) == {ours[1], its[1], *kept}


WRITER = """
import sys
sys.path.insert(0, "tests")
from talking_model import talking_model
from rwkv7.engine import StateStore
from rwkv7.generate import Session
from rwkv7.sampling import Sampler
model = talking_model(layers=1)
store, session = StateStore(sys.argv[1], model), Session(Sampler(1.0, seed=1))
session.feed(model, [1, 2])
print("ready", flush=True)
for turn in range(100000):
    store.save(f"conversation {turn % 5}", session)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL here")
def test_killed_at_any_moment_every_conversation_is_whole_or_absent(tmp_path):
    model = talking_model(layers=1)
    for attempt in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)],
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
        )
        assert process.stdout is not None
        with process.stdout:
            process.stdout.readline()
            time.sleep(0.05 + 0.037 * attempt)
            process.kill()
        process.wait()
        store = StateStore(tmp_path, model)
        names = list(store)
        assert names
        for name in names:
            assert store.load(name).token == 2
    left = [path for path in tmp_path.iterdir() if path.suffix == ".tmp"]
    for path in left:
        os.utime(path, (0, 0))
    StateStore(tmp_path, model)
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".tmp"]
