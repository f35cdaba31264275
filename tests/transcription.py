"""RWKV-7's forward pass written out token by token and head by head from its description.

The oracle for the whole model: it knows only a dictionary of official names and shares no code
with the library. Plain torch arithmetic in fp64, so that autograd gives the oracle's gradients.
"""

import math

import torch


def forward(p, tokens, state=None):
    """(logits [T, V], state) for one sequence of ids; `state` is [(shift, [H, V, K], shift), …]."""
    H, N = p["blocks.0.att.r_k"].shape
    C, L = H * N, 1 + max(int(name.split(".")[1]) for name in p if name.startswith("blocks."))
    zero = torch.zeros(C, dtype=torch.float64)
    if state is None:
        state = [(zero, torch.zeros(H, N, N, dtype=torch.float64), zero) for _ in range(L)]
    logits = []
    for token in tokens:
        x = layer_norm(p["emb.weight"][token], p, "blocks.0.ln0")
        after, v_first = [], None
        for i in range(L):
            time_shift, wkv, channel_shift = state[i]
            inner = layer_norm(x, p, f"blocks.{i}.ln1")
            att = {k.split(".att.")[1]: q for k, q in p.items() if k.startswith(f"blocks.{i}.att.")}
            out, wkv, v_first = time_mix(att, inner, time_shift, wkv, v_first, H, N)
            x = x + out
            hidden = layer_norm(x, p, f"blocks.{i}.ln2")
            mixed = hidden + (channel_shift - hidden) * p[f"blocks.{i}.ffn.x_k"]
            key = p[f"blocks.{i}.ffn.key.weight"] @ mixed
            x = x + p[f"blocks.{i}.ffn.value.weight"] @ torch.where(key > 0, key * key, 0.0)
            after.append((inner, wkv, hidden))
        state = after
        logits.append(p["head.weight"] @ layer_norm(x, p, "ln_out"))
    return torch.stack(logits), state


def time_mix(q, x, before, state, v_first, H, N):
    """One token through one layer's time mix: (output [C], state [H, V, K], layer 0's value)."""
    delta = before - x
    r = q["receptance.weight"] @ (x + delta * q["x_r"])
    k = q["key.weight"] @ (x + delta * q["x_k"])
    xv = x + delta * q["x_v"]
    v = q["value.weight"] @ xv
    logit = q["w0"] + torch.tanh((x + delta * q["x_w"]) @ q["w1"]) @ q["w2"]
    decay = torch.exp(-math.exp(-0.5) / (1 + torch.exp(-logit)))
    if v_first is None:
        v_first = v
    else:
        v = v + (v_first - v) * sigmoid(q["v0"] + (xv @ q["v1"]) @ q["v2"])
    a = sigmoid(q["a0"] + ((x + delta * q["x_a"]) @ q["a1"]) @ q["a2"])
    g = sigmoid((x + delta * q["x_g"]) @ q["g1"]) @ q["g2"]
    direction = k * q["k_k"]
    k = k * (1 + (a - 1) * q["k_a"])
    outputs, states = [], []
    for h in range(H):
        at = slice(h * N, (h + 1) * N)
        length = torch.sqrt((direction[at] ** 2).sum())
        unit = direction[at] / torch.clamp(length, min=1e-12)
        S = state[h] * decay[at][None, :]
        S = S - torch.outer(state[h] @ unit, unit * a[at]) + torch.outer(v[at], k[at])
        y = S @ r[at]
        spread = ((y - y.mean()) ** 2).mean()
        y = (y - y.mean()) / torch.sqrt(spread + 1e-5 * N)
        y = y * q["ln_x.weight"][at] + q["ln_x.bias"][at]
        outputs.append(y + (r[at] * k[at] * q["r_k"][h]).sum() * v[at])
        states.append(S)
    return q["output.weight"] @ (torch.cat(outputs) * g), torch.stack(states), v_first


def layer_norm(x, p, name):
    """Over the last axis, biased variance, eps 1e-5."""
    centred = x - x.mean(-1, keepdim=True)
    scale = torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-5)
    return centred / scale * p[f"{name}.weight"] + p[f"{name}.bias"]


def sigmoid(x):
    """1 / (1 + e^-x)."""
    return 1 / (1 + torch.exp(-x))
