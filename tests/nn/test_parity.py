"""The model against the plain transcription, and against the `rwkv` package from PyPI."""

import sys

import pytest
import torch
import transcription
from random_model import SMALL, error, random_model, random_state, random_tokens, rows

from rwkv7 import ModelConfig, ModelState, save_model
from rwkv7.state import LayerState

PEER = ModelConfig(
    vocab_size=256,
    width=128,
    layers=2,
    head_size=64,
    decay_rank=32,
    iclr_rank=32,
    value_rank=32,
    gate_rank=32,
)


def transcribed(model, tokens, state=None):
    """Logits [B, T, V] and state of the transcription, and its leaves by name."""
    leaves = {n: x.detach().clone().requires_grad_() for n, x in model.named_parameters()}
    logits, states = [], []
    for row, ids in enumerate(tokens.tolist()):
        given = None
        if state is not None:
            given = [(s[row], S[row], c[row]) for S, s, c in state.layers]
        out, after = transcription.forward(leaves, ids, given)
        logits.append(out)
        states.append([LayerState(S[None], s[None], c[None]) for s, S, c in after])
    whole = ModelState.cat([ModelState(tuple(layers)) for layers in states])
    return torch.stack(logits), whole, leaves


@pytest.mark.parametrize("given", [False, True])
def test_equals_the_transcription(given):
    model = random_model()
    tokens = random_tokens(SMALL, 2, 6)
    state = random_state(SMALL, 2) if given else None
    logits, after = model(tokens, state)
    expected, expected_after, leaves = transcribed(model, tokens, state)
    assert error(logits, expected) < 1e-10
    for x, y in zip(rows(after), rows(expected_after), strict=True):
        assert error(x, y) < 1e-10

    weights = torch.randn(logits.shape, dtype=torch.float64)
    extra = [torch.randn_like(x) for x in rows(after)]
    for out, end in ((logits, after), (expected, expected_after)):
        loss = (out * weights).sum()
        for x, y in zip(rows(end), extra, strict=True):
            loss = loss + (x * y).sum()
        loss.backward()
    for name, parameter in model.named_parameters():
        assert error(parameter.grad, leaves[name].grad) < 1e-8, name


def test_the_comparison_sees_a_transposed_state():
    model = random_model()
    tokens = random_tokens(SMALL, 1, 4)
    state = random_state(SMALL, 1)
    turned = ModelState(
        tuple(layer._replace(wkv=layer.wkv.transpose(-1, -2)) for layer in state.layers)
    )
    assert error(model(tokens, turned)[0], transcribed(model, tokens, state)[0]) > 1e-2


pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")


@pytest.fixture(params=["0", "1"], ids=["eager", "jit"])
def peer(request, monkeypatch, tmp_path):
    """(our model, the package's model) from one checkpoint."""
    pytest.importorskip("rwkv")
    monkeypatch.setenv("RWKV_V7_ON", "1")
    monkeypatch.setenv("RWKV_CUDA_ON", "0")
    monkeypatch.setenv("RWKV_JIT_ON", request.param)
    # The package reads these variables when it is imported, and sets global switches of torch.
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32
    forget_package()
    module = pytest.importorskip("rwkv.model")
    model = random_model(PEER, torch.float32)
    save_model(model, tmp_path / "tiny.pth")
    yield model, module.RWKV(model=str(tmp_path / "tiny"), strategy="cpu fp32")
    forget_package()
    cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = before


def forget_package():
    """So that the next import reads its environment again."""
    for name in [n for n in sys.modules if n.split(".")[0] == "rwkv"]:
        del sys.modules[name]


def as_list(state):
    """A state of one sequence as the package keeps it; copies, since it changes them in place."""
    return [x[0].clone() for S, s, c in state.layers for x in (s, S, c)]


def assert_same(logits, state, expected, expected_state):
    assert error(logits, expected) < 1e-5
    for x, y in zip(as_list(state), expected_state, strict=True):
        assert error(x, y) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("given", [False, True])
def test_equals_the_package_over_a_sequence(peer, given):
    model, package = peer
    tokens = random_tokens(PEER, 1, 21)
    state = random_state(PEER, 1, torch.float32) if given else None
    start = None if state is None else as_list(state)
    logits, after = model(tokens, state)
    expected, end = package.forward(tokens[0].tolist(), start, full_output=True)
    assert_same(logits[0], after, expected, end)
    # The next sequence begins where this one ended.
    logits, after = model(tokens.flip(1), after, last_only=True)
    expected, end = package.forward(tokens[0].flip(0).tolist(), end)
    assert_same(logits[0, 0], after, expected, end)


@torch.no_grad()
@pytest.mark.parametrize("given", [False, True])
def test_equals_the_package_token_by_token(peer, given):
    model, package = peer
    state = random_state(PEER, 1, torch.float32) if given else None
    end = None if state is None else as_list(state)
    for token in random_tokens(PEER, 12).tolist():
        logits, state = model(torch.tensor([[token]]), state)
        expected, end = package.forward([token], end)
        assert_same(logits[0, 0], state, expected, end)
