"""One checkpoint, converted, in flash-linear-attention's own model: the same logits and states."""

import pytest
import torch
from random_model import error, random_model, random_tokens

from rwkv7 import ModelConfig, load_model, save_model, state_from_fla
from rwkv7.verification.untuned import untuned

pytestmark = pytest.mark.gpu

CONFIG = ModelConfig(
    vocab_size=97, width=128, layers=3, head_size=64,
    decay_rank=32, iclr_rank=64, value_rank=48, gate_rank=96,
)  # fmt: skip
# Its products of float32 numbers are rounded to tf32's 11 bits; ours are not.
THEIRS, OURS = 5e-3, 1e-5


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """FLA's model from a folder that `save_model` wrote, and the folder."""
    module = pytest.importorskip("fla.models.rwkv7")
    path = tmp_path_factory.mktemp("fla") / "hf"
    save_model(random_model(CONFIG, torch.float32), path)
    model = module.RWKV7ForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model.to("cuda").eval(), path


def parts(state):
    """Their cache, a row of this library's tensors for each layer."""
    layers = [state[i] for i in range(CONFIG.layers)]
    wkv = [state_from_fla(x["recurrent_state"]) for x in layers]
    shifts = [[x[name].reshape(-1, CONFIG.width) for x in layers] for name in SHIFTS]
    return list(zip(wkv, *shifts, strict=True))


SHIFTS = ("conv_state", "ffn_state")


@torch.no_grad()
@pytest.mark.parametrize("length", [5, 100])  # their kernel of single tokens, and of chunks
def test_logits_and_states_and_how_they_go_on(theirs, length):
    other, path = theirs
    tokens = random_tokens(CONFIG, 2, length)
    exact, ours = load_model(path, dtype=torch.float64), load_model(path, device="cuda")
    with untuned("fla"):
        found = other(tokens.cuda(), use_cache=True)
        expected, state = exact(tokens)
        mine, own = ours(tokens.cuda())
        for _ in range(2):  # the second time from the state, one more token
            assert error(found.logits.cpu(), expected) < THEIRS
            assert error(mine.cpu(), expected) < OURS
            for layer, theirs_, own_ in zip(
                state.layers, parts(found.past_key_values), own.layers, strict=True
            ):
                for x, y, z in zip(layer, theirs_, own_, strict=True):
                    assert error(y.cpu(), x) < THEIRS
                    assert error(z.cpu(), x) < OURS
            token = random_tokens(CONFIG, 2, 1, seed=7)
            found = other(token.cuda(), past_key_values=found.past_key_values, use_cache=True)
            expected, state = exact(token, state)
            mine, own = ours(token.cuda(), own)


def test_what_their_model_saves_is_read(theirs, tmp_path):
    other, path = theirs
    other.save_pretrained(tmp_path / "theirs")
    ours, again = load_model(path), load_model(tmp_path / "theirs")
    assert ours.config == again.config
    assert all(
        torch.equal(x, y) for x, y in zip(ours.parameters(), again.parameters(), strict=True)
    )
