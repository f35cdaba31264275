"""Cross entropy with L2Wrap: a row of logits is read twice, and its gradient written over it."""

import triton
import triton.language as tl

from .elements import LOG2E


@triton.jit
def loss_to_gradient(
    logits_ptr: tl.tensor,
    targets_ptr: tl.tensor,
    losses_ptr: tl.tensor,
    l2_wrap: tl.tensor,
    IGNORED: tl.constexpr,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Row program_id(0): its loss, and softmax - one-hot + l2_wrap · max at the first maximum.

    Where the target is IGNORED both are zero, whatever the logits.
    """
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    logits_ptr += row * V
    lanes = tl.arange(0, BLOCK)
    if target == IGNORED:
        for start in range(0, V, BLOCK):
            zeros = tl.zeros([BLOCK], logits_ptr.dtype.element_ty)
            tl.store(logits_ptr + start + lanes, zeros, start + lanes < V)
        tl.store(losses_ptr + row, 0.0)
    else:
        # Of each lane: the largest, where it first was, the sum of exponentials under it, and the
        # target's logit.
        largest = tl.full([BLOCK], float("-inf"), tl.float32)
        where = tl.zeros([BLOCK], tl.int32) + V
        total = tl.zeros([BLOCK], tl.float32)
        wanted = tl.zeros([BLOCK], tl.float32)
        for start in range(0, V, BLOCK):
            n = start + lanes
            x = tl.load(logits_ptr + n, n < V, other=float("-inf")).to(tl.float32)
            higher = x > largest
            above = tl.where(higher, x, largest)
            # A difference of infinities is not to be taken; NaN stays NaN.
            total *= tl.where(higher, tl.exp2((largest - above) * LOG2E), 1.0)
            total += tl.where(x == float("-inf"), 0.0, tl.exp2((x - above) * LOG2E))
            where = tl.where(higher, n, where)
            largest = above
            wanted += tl.where(n == target, x, 0.0)
        top = tl.max(largest, 0)
        at = tl.min(tl.where(largest == top, where, V), 0)
        under = tl.where(largest == float("-inf"), 0.0, tl.exp2((largest - top) * LOG2E))
        sums = tl.sum(total * under, 0)
        tl.store(losses_ptr + row, tl.log(sums) + (top - tl.sum(wanted, 0)))
        for start in range(0, V, BLOCK):
            n = start + lanes
            x = tl.load(logits_ptr + n, n < V, other=0.0).to(tl.float32)
            gradient = tl.exp2((x - top) * LOG2E) / sums - tl.where(n == target, 1.0, 0.0)
            gradient += tl.where(n == at, l2_wrap * top, 0.0)
            tl.store(logits_ptr + n, gradient.to(logits_ptr.dtype.element_ty), n < V)
