"""A small model that says something: mostly "aé€𝄞b\n" again and again, one byte a token.

Its embedding and head alone make each byte call for the next; the layers between, random and not
tiny, bend the odds by what came before, so that a state that is lost or changed is heard.
"""

from __future__ import annotations

import torch

from rwkv7 import nn
from rwkv7.config import ModelConfig

REFRAIN = "aé€𝄞b\n".encode()


def talking_model(seed: int = 0, layers: int = 2) -> nn.RWKV7:
    config = ModelConfig.from_sizes(vocab_size=256, width=64, layers=layers, head_size=32)
    model = nn.RWKV7(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.1, generator=generator)
        model.emb.weight.normal_(0, 1, generator=generator)
        unit = torch.nn.functional.layer_norm(model.emb.weight, (config.width,))
        for this, following in zip(REFRAIN, REFRAIN[1:] + REFRAIN[:1], strict=True):
            model.head.weight[following] += 0.17 * unit[this]
    return model.eval()
