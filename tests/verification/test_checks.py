"""The experiment must find what is there: right backends pass, four kinds of wrong ones do not."""

from __future__ import annotations

import functools
import math

import pytest
import torch

from rwkv7.compat.fla import chunk_rwkv7
from rwkv7.state import ModelState
from rwkv7.verification import Sizes, backend_checks, peer_checks
from rwkv7.verification.checks import Refusal, operator_check
from rwkv7.verification.peers import _by_fla
from rwkv7.verification.problem import STATES, Problem
from rwkv7.wkv7 import registry, wkv7
from rwkv7.wkv7.tolerance import BOUNDS, RESULTS

CPU = torch.device("cpu")
SMALL = Sizes(B=2, T=20, H=2, K=16, V=16)


def rows_of(operator, kind="random", dtype=torch.float32, gradients=True):
    problem = Problem(SMALL, dtype)
    return operator_check("under test", problem, kind, CPU, operator, gradients).run()


@pytest.mark.parametrize("dtype", list(BOUNDS), ids=str)
@pytest.mark.parametrize("kind", STATES)
def test_the_recurrence_passes(kind, dtype):
    (row,) = rows_of(wkv7, kind, dtype)
    assert row.ok, row
    missing = {"dstate"} if kind == "none" else set()
    assert set(row.measures) == set(RESULTS) - missing


def transposed(*arguments):
    return wkv7(*arguments[:-1], arguments[-1].mT)


def swapped(r, w, k, v, a, b, state):
    return wkv7(r, w, k, v, b, a, state)


def late(r, w, k, v, a, b, state):
    return wkv7(r, w.roll(1, 1), k, v, a, b, state)


def deaf(r, w, k, v, a, b, state):
    return wkv7(r, w.detach() + 0 * w, k, v, a, b, state)


def broken(r, w, k, v, a, b, state):
    y, final = wkv7(r, w, k, v, a, b, state)
    return y * float("nan"), final


@pytest.mark.parametrize("operator", [transposed, swapped, late, deaf, broken])
def test_a_broken_operator_fails(operator):
    (row,) = rows_of(operator)
    assert not row.ok


def test_an_operator_that_raises_has_failed():
    def raising(*_):
        raise RuntimeError("no such\n kernel")

    (row,) = rows_of(raising)
    assert not row.ok
    assert row.crash == "RuntimeError: no such kernel"


def test_a_dropped_gradient_is_named():
    (row,) = rows_of(deaf)
    assert [name for name, measure in row.measures.items() if not measure.ok] == ["dw"]


def test_every_backend_state_and_dtype_is_checked():
    checks, refusals = backend_checks(SMALL, [CPU])
    rows = [row for check in checks for row in check.run()]
    found = {(row.subject, row.dtype, row.state) for row in rows}
    for name in ("reference", "wkv7_step_"):
        for dtype in BOUNDS:
            assert {(name, dtype, kind) for kind in STATES} <= found
    assert {row.subject for row in rows} | {refusal.subject for refusal in refusals} == {
        *registry.backend_names(),
        "wkv7_step_",
        "state transposed",
    }
    assert all(row.ok for row in rows)


def test_the_transposed_state_is_seen_in_y_and_in_the_final_state():
    checks, _ = backend_checks(Sizes(), [CPU])
    (row,) = next(check for check in checks if check.subject == "state transposed").run()
    assert row.mistake
    assert row.ok
    assert row.measures["y"].error > 0.01
    assert row.measures["state"].error > 1e-3


def test_a_backend_that_cannot_run_says_why(monkeypatch):
    backend = registry.get_backend("reference")
    monkeypatch.setattr(backend, "refuses", lambda call: "not today")
    monkeypatch.setattr("rwkv7.verification.checks.backend_names", lambda: ("reference",))
    checks, refusals = backend_checks(SMALL, [CPU])
    assert refusals == [Refusal("reference", "not today")]
    assert "reference" not in {check.subject for check in checks}


def test_unknown_and_missing_peers(monkeypatch):
    with pytest.raises(ValueError, match="against: expected fla or rwkv, found 'llama'"):
        peer_checks(["llama"], SMALL, [CPU])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"fla is not installed; pip install 'rwkv7\[peers\]'"):
        peer_checks(["fla"], SMALL, [CPU])


def test_fla_without_a_gpu_says_so(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    checks, (refusal,) = peer_checks(["fla"], SMALL, [CPU])
    assert checks == []
    assert refusal.subject == "fla"
    assert "GPU" in refusal.reason


@pytest.mark.parametrize("kind", STATES)
def test_fla_is_given_its_own_conventions(kind):
    # The stand-in has their signature, their log decay and their layout, and runs anywhere.
    chunk = functools.partial(chunk_rwkv7, scale=1.0, output_final_state=True)
    (row,) = rows_of(functools.partial(_by_fla, chunk), kind, torch.bfloat16)
    assert row.ok, row


def test_the_rwkv_package_agrees_with_the_model():
    pytest.importorskip("rwkv")
    (check,), refusals = peer_checks(["rwkv"], SMALL, [CPU])
    assert refusals == []
    rows = check.run()
    assert len(rows) == 2 * 2 * len(STATES)
    for row in rows:
        assert row.ok, row
        assert 0 < row.measures["logits"].error < math.inf


def test_the_rwkv_package_is_really_compared(monkeypatch):
    pytest.importorskip("rwkv")
    from rwkv7.verification import model

    plain = model._run_package

    def transposed_states(network, tokens, states):
        layers = states["random"].layers
        turned = ModelState(tuple(x._replace(wkv=x.wkv.mT.contiguous()) for x in layers))
        return plain(network, tokens, {**states, "random": turned})

    monkeypatch.setattr(model, "_run_package", transposed_states)
    bad = [row for row in model.model_check().run() if not row.ok]
    assert {row.state for row in bad} == {"random"}
    assert all(row.subject.startswith("rwkv ") for row in bad)
