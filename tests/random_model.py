"""Small models in which every parameter does something.

The official initialisation will not do for tests: output and ffn.value are zero there, so that
every layer is the identity.
"""

import torch

from rwkv7 import RWKV7, ModelConfig, ModelState
from rwkv7.state import LayerState

SMALL = ModelConfig(
    vocab_size=29,
    width=24,
    layers=3,
    head_size=8,
    decay_rank=5,
    iclr_rank=6,
    value_rank=3,
    gate_rank=7,
)


def random_model(config=SMALL, dtype=torch.float64, seed=0):
    """A model whose every number is random and matters."""
    model = RWKV7(config, torch.float64)
    generator = torch.Generator().manual_seed(seed)

    def normal(x, scale, centre=0.0):
        x.normal_(generator=generator).mul_(scale).add_(centre)

    with torch.no_grad():
        for name, x in model.named_parameters():
            last = name.rsplit(".", 1)[-1]
            if last == "w0":
                x.uniform_(-6, 0.5, generator=generator)
            elif last.startswith("x_"):
                x.uniform_(0, 1, generator=generator)
            elif "ln" in name:
                normal(x, 0.3, 1.0 if last == "weight" else 0.0)
            elif last in ("k_k", "k_a", "a0", "v0"):
                normal(x, 0.3, 0.8)
            else:
                normal(x, 1.0 if name == "emb.weight" else x.shape[-1] ** -0.5)
    return model.to(dtype)


def random_state(config, batch, dtype=torch.float64, seed=1):
    """A state no text has led to."""
    generator = torch.Generator().manual_seed(seed)
    state = ModelState.zeros(config, batch, dtype)
    return ModelState(
        tuple(
            LayerState(
                *(torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in layer)
            )
            for layer in state.layers
        )
    ).to(dtype=dtype)


def random_tokens(config, *shape, seed=2):
    """Ids of any shape."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, shape, generator=generator)


def error(x, reference):
    """‖x - ref‖ / ‖ref‖ in fp64."""
    x, reference = x.detach().double(), reference.detach().double()
    return float((x - reference).norm() / reference.norm())


def rows(state):
    """Every tensor of a state, for comparisons."""
    return [x for layer in state.layers for x in layer]
