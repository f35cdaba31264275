"""What the kernels that go in steps of 16 tokens share: decayed operands, scores, the inverse.

One warp prepares a step, and what came out of a product is the next one's left factor, or its
transpose the right one, without leaving the warp's registers.
"""

import triton
import triton.language as tl

from .tiles import hat_dot, log2_decay, split_hat


@triton.jit
def turned(x: tl.tensor):
    """xᵀ. Triton sends a transpose that a product follows through shared memory, unless something
    stands between the two: here a view as integers."""
    if x.dtype == tl.float16:
        x = tl.trans(x.to(tl.int16, bitcast=True)).to(tl.float16, bitcast=True)
    else:
        x = tl.trans(x)
    return x


@triton.jit
def dot_turned(
    x: tl.tensor,
    x_low: tl.tensor,
    y: tl.tensor,
    y_low: tl.tensor,
    acc: tl.tensor,
    HOW: tl.constexpr,
):
    """acc + x·yᵀ of two operands from `split_hat`, which came out of products."""
    return hat_dot(x, x_low, turned(y), turned(y_low), acc, HOW)


@triton.jit
def _running_sums(decay: tl.tensor, SKIP: tl.constexpr, HOW: tl.constexpr):
    """The sum of decays [16, K] up to each token, or before it with SKIP = 1, counted from the
    middle of the step and negative before it."""
    t = tl.arange(0, 16)
    ones = tl.where(t[:, None] >= t[None, :] + SKIP, 1.0, 0.0)
    ones -= tl.where((t < 8)[None, :], 1.0, 0.0)
    sums = tl.zeros(decay.shape, tl.float32)
    high, low = split_hat(decay, "ieee" if HOW == "ieee" else "halves")
    if HOW == "ieee":
        sums = tl.dot(ones, decay, acc=sums, input_precision="ieee")
    else:
        ones = ones.to(tl.float16)
        sums = tl.dot(ones, high, acc=sums)
        sums = tl.dot(ones, low, acc=sums)
    return sums


@triton.jit
def load_inputs(
    r_ptr: tl.tensor,
    w_ptr: tl.tensor,
    k_ptr: tl.tensor,
    a_ptr: tl.tensor,
    b_ptr: tl.tensor,
    first: tl.tensor,
    at: tl.tensor,
    inside: tl.tensor,
):
    """(r, w, k, a, b) [16, K] of a step; the scalar `first` has the 64-bit part of addresses."""
    # Other loads the compiler moves to where they are read, and a warp then waits for memory
    # several times.
    w = tl.load(w_ptr + first + at, inside, other=0.0, volatile=True)
    a = tl.load(a_ptr + first + at, inside, other=0.0, volatile=True)
    b = tl.load(b_ptr + first + at, inside, other=0.0, volatile=True)
    k = tl.load(k_ptr + first + at, inside, other=0.0, volatile=True)
    r = tl.load(r_ptr + first + at, inside, other=0.0, volatile=True)
    return r, w, k, a, b


@triton.jit
def step_operands(
    r: tl.tensor,
    w: tl.tensor,
    k: tl.tensor,
    a: tl.tensor,
    b: tl.tensor,
    inside: tl.tensor,
    LOGIT: tl.constexpr,
    HOW: tl.constexpr,
):
    """Of the tiles [16, K] of a step, with decay 1 where not `inside`: (α, β, κ, ρ) in fp32, with
    exponents from the step's middle, and the logarithms of the decay to the middle and of all.

    At RWKV-7's strongest decay the operands span seven bits either way.
    """
    decay = tl.where(inside, log2_decay(w, LOGIT), 0.0)
    middle = tl.sum(tl.where((tl.arange(0, 16) < 8)[:, None], decay, 0.0), 0)
    whole = tl.sum(decay, 0)
    g = _running_sums(decay, 0, HOW)
    up = tl.exp2(g)
    down = tl.exp2(-g)
    alpha = a.to(tl.float32) * tl.exp2(_running_sums(decay, 1, HOW))
    beta = b.to(tl.float32) * down
    kappa = k.to(tl.float32) * down
    rho = r.to(tl.float32) * up
    return alpha, beta, kappa, rho, middle, whole


@triton.jit
def step_inverse(A: tl.tensor, At: tl.tensor, HOW: tl.constexpr):
    """((I - A)⁻¹, its transpose) of a strictly lower triangular A [16, 16] and its transpose At.

    Blocks of 1, 2, 4 and 8 rows in turn: two inverted ones are joined by X·A·X. Powers of A are
    never formed: they grow like binomials on a repeated key.
    """
    t = tl.arange(0, 16)
    one = tl.where(t[:, None] == t[None, :], 1.0, 0.0)
    joins = (t[:, None] // 2 == t[None, :] // 2) & (t[:, None] != t[None, :])
    X = one + tl.where(joins, A, 0.0)
    Xt = one + tl.where(joins, At, 0.0)
    none = tl.zeros([16, 16], tl.float32)
    for level in tl.static_range(1, 4):
        half = t // (1 << level)
        joins = (half[:, None] // 2 == half[None, :] // 2) & (half[:, None] != half[None, :])
        x, x_low = split_hat(X, HOW)
        xt, xt_low = split_hat(Xt, HOW)
        at, at_low = split_hat(tl.where(joins, At, 0.0), HOW)
        p, p_low = split_hat(dot_turned(x, x_low, at, at_low, none, HOW), HOW)
        X = dot_turned(p, p_low, xt, xt_low, X, HOW)
        Xt = dot_turned(xt, xt_low, p, p_low, Xt, HOW)
    return X, Xt
