"""Which weights a state was made with: a digest that a file of another model does not have."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import torch

from .nn import RWKV7


def fingerprint(model: RWKV7) -> str:
    """A digest of some numbers of every parameter, 32 hexadecimal digits, the same on every device.

    Rounded to bfloat16, so that a model read in another dtype is mostly still known as itself.
    """
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(model.config)).encode())
    for name, parameter in model.named_parameters():
        x = parameter.detach().flatten()
        some = x[:: max(1, x.numel() // 64)][:64].to(torch.bfloat16).view(torch.int16)
        digest.update(name.encode() + some.cpu().numpy().astype("<i2").tobytes())
    return digest.hexdigest()[:32]
