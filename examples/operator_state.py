"""The operator alone: a sequence cut in two, the state handed over, and gradients through it.

    python examples/operator_state.py

A cut changes nothing, in the results or in the gradients, and the state is differentiable from
both sides: how the last tokens depend on the first ones passes through it.
"""

import torch

from rwkv7 import explain, wkv7

B, T, H, N, CUT = 2, 64, 4, 64, 23


def inputs() -> dict[str, torch.Tensor]:
    """r, w, k, v, a, b as a model would feed them: a = -k̂ and b = k̂ times a learning rate."""
    torch.manual_seed(0)
    shape = (B, T, H, N)
    r, w, k, v = (torch.randn(shape) for _ in range(4))
    unit_key = torch.nn.functional.normalize(torch.randn(shape), dim=-1)
    rate = torch.rand(shape)
    named = {"r": r, "w": w, "k": k, "v": v, "a": -unit_key, "b": unit_key * rate}
    return {name: x.requires_grad_() for name, x in named.items()}


def error(x: torch.Tensor, reference: torch.Tensor) -> float:
    """‖x - reference‖ / ‖reference‖."""
    return ((x - reference).norm() / reference.norm()).item()


def main() -> None:
    """Run the same sequence whole and in two calls, and compare."""
    x = inputs()
    state = torch.randn(B, H, N, N, requires_grad=True)  # [B, H, V, K], always
    print(explain(**x, state=state), "\n")

    y, final = wkv7(**x, state=state)
    first = {name: tensor[:, :CUT] for name, tensor in x.items()}
    second = {name: tensor[:, CUT:] for name, tensor in x.items()}
    y1, carried = wkv7(**first, state=state)
    y2, final_cut = wkv7(**second, state=carried)
    y_cut = torch.cat([y1, y2], dim=1)
    print(f"cut after {CUT} of {T} tokens: y differs by {error(y_cut, y):.1e}, ", end="")
    print(f"the final state by {error(final_cut, final):.1e}")

    wanted = [*x.values(), state]
    whole = torch.autograd.grad(y.square().sum() + final.sum(), wanted)
    cut = torch.autograd.grad(y_cut.square().sum() + final_cut.sum(), wanted)
    for name, g, g_cut in zip([*x, "state"], whole, cut, strict=True):
        print(f"  gradient of {name:5}  differs by {error(g_cut, g):.1e}")

    forgotten, _ = wkv7(**second)
    print(f"with the state forgotten at the cut, y differs by {error(forgotten, y[:, CUT:]):.1e}")


if __name__ == "__main__":
    main()
