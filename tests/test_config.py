"""Sizes: what is refused, the trainer's rank rule, the published models."""

import json

import pytest

from rwkv7 import ModelConfig
from rwkv7.config import PRESETS

SIZES = {"vocab_size": 256, "width": 128, "layers": 2}
RANKS = {"decay_rank": 32, "iclr_rank": 32, "value_rank": 32, "gate_rank": 32}


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"width": 100}, ValueError, "multiple of head_size = 64, found 100"),
        ({"layers": 0}, ValueError, "layers: expected at least 1"),
        ({"gate_rank": -1}, ValueError, "gate_rank"),
        ({"vocab_size": 256.0}, TypeError, "vocab_size: expected an int, found 256.0"),
        ({"layers": True}, TypeError, "layers"),
    ],
)
def test_refuses_bad_sizes(change, error, says):
    with pytest.raises(error, match=says):
        ModelConfig(**{**SIZES, **RANKS, **change})


# Worked out by hand from train_temp's rule; 1024 and 4096 turn on rounding a half to even.
@pytest.mark.parametrize(
    ("width", "ranks"),
    [
        (128, (32, 32, 32, 64)),
        (768, (64, 64, 32, 128)),
        (1024, (64, 64, 64, 160)),
        (2048, (128, 128, 64, 224)),
        (2560, (128, 128, 96, 256)),
        (4096, (160, 160, 96, 320)),
    ],
)
def test_ranks_follow_the_official_trainer(width, ranks):
    config = ModelConfig.from_sizes(vocab_size=65536, width=width, layers=12)
    found = (config.decay_rank, config.iclr_rank, config.value_rank, config.gate_rank)
    assert found == ranks
    assert (config.heads, config.ffn_size) == (width // 64, 4 * width)


def test_presets_have_the_published_sizes():
    sizes = {name: (c.layers, c.width, c.gate_rank) for name, c in PRESETS.items()}
    assert sizes == {
        "0.1b": (12, 768, 128),
        "0.4b": (24, 1024, 128),
        "1.5b": (24, 2048, 256),
        "2.9b": (32, 2560, 320),
        "7.2b": (32, 4096, 480),
        "13.3b": (61, 4096, 384),
    }
    assert all(c.vocab_size == 65536 and c.head_size == 64 for c in PRESETS.values())
    assert ModelConfig.preset("0.1b") is PRESETS["0.1b"]
    with pytest.raises(ValueError, match=r"expected one of 0\.1b, .*found '3b'"):
        ModelConfig.preset("3b")


def test_survives_json():
    config = ModelConfig(**SIZES, **RANKS, head_size=32)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match="unknown depth"):
        ModelConfig.from_dict({**config.to_dict(), "depth": 3})
    with pytest.raises(ValueError, match="missing layers"):
        ModelConfig.from_dict({k: v for k, v in config.to_dict().items() if k != "layers"})
