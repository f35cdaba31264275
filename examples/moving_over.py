"""Moving over from flash-linear-attention or the official code: one import, one named layout.

    python examples/moving_over.py

The same step through all three interfaces, with a state that is not empty. The last line shows
what a forgotten transpose costs, with nothing raised: at 64 x 64 every shape fits.
"""

import torch
from torch.nn.functional import logsigmoid, normalize, softplus

from rwkv7 import state_from_fla, state_from_official, state_to_fla, wkv7

# Instead of:  from fla.ops.rwkv7 import chunk_rwkv7
from rwkv7.compat.fla import chunk_rwkv7

# Instead of the RWKV7_OP2 that RWKV-LM's demo builds for itself:
from rwkv7.compat.official import RWKV7_OP2

B, T, H, N = 1, 32, 2, 64


def error(x: torch.Tensor, reference: torch.Tensor) -> float:
    """‖x - reference‖ / ‖reference‖."""
    return ((x - reference).norm() / reference.norm()).item()


def main() -> None:
    """Compare the three interfaces, outputs and final states, from one random state."""
    torch.manual_seed(0)
    r, k, v, key = (torch.randn(B, T, H, N) for _ in range(4))
    logit = torch.randn(B, T, H, N) - 4  # mostly slow decays: the state is remembered
    unit_key = normalize(key, dim=-1)
    a, b = -unit_key, unit_key * torch.rand(B, T, H, N)
    state = torch.randn(B, H, N, N)  # ours: [B, H, V, K]

    y, final = wkv7(r, logit, k, v, a, b, state)
    print(f"{'rwkv7.wkv7':28} y and state are the reference")

    # Its w is the log decay; its state is [K, V].
    log_decay = -torch.exp(torch.tensor(-0.5)) * logsigmoid(logit).exp()
    fla_state = state_to_fla(state)
    y_fla, final_fla = chunk_rwkv7(
        r, log_decay, k, v, a, b, initial_state=fla_state, output_final_state=True
    )
    assert final_fla is not None
    show("compat.fla.chunk_rwkv7", y_fla, y, state_from_fla(final_fla), final)

    # Its w is -softplus(-logit) - 0.5, channels are flat, and its state is [V, K] like ours.
    w = -softplus(-logit) - 0.5
    flat = (x.flatten(-2) for x in (r, w, k, v, a, b))
    y_official, final_official = RWKV7_OP2(*flat, state)
    show(
        "compat.official.RWKV7_OP2",
        y_official.unflatten(-1, (H, N)),
        y,
        state_from_official(final_official),
        final,
    )

    y_wrong, final_wrong = wkv7(r, logit, k, v, a, b, fla_state)
    show("a transpose forgotten", y_wrong, y, final_wrong, final)


def show(
    name: str,
    y: torch.Tensor,
    y_reference: torch.Tensor,
    state: torch.Tensor,
    state_reference: torch.Tensor,
) -> None:
    """One line: how far y and the final state are from the reference."""
    print(f"{name:28} y differs by {error(y, y_reference):.1e}, ", end="")
    print(f"the final state by {error(state, state_reference):.1e}")


if __name__ == "__main__":
    main()
