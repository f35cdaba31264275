"""What is done to each number on its own: the squared ReLU."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def sigmoid(x: tl.tensor):
    """1 / (1 + exp(-x)), with full relative precision where it is small."""
    return 1.0 / (1.0 + tl.exp2(x * -LOG2E))


@triton.jit
def _block(rows: tl.tensor, C: tl.constexpr, BLOCK: tl.constexpr):
    """(this program's numbers among rows·C, which of them there are); C tells of alignment."""
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return n, n < tl.cast(rows, tl.int64) * C


@triton.jit(do_not_specialize=["rows"])
def squared_relu(
    x_ptr: tl.tensor, y_ptr: tl.tensor, rows: tl.tensor, C: tl.constexpr, BLOCK: tl.constexpr
):
    """y = max(x, 0)²."""
    n, inside = _block(rows, C, BLOCK)
    x = tl.load(x_ptr + n, inside, other=0.0).to(tl.float32)
    positive = tl.where(x < 0, 0.0, x)  # NaN stays NaN
    tl.store(y_ptr + n, (positive * positive).to(y_ptr.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["rows"])
def squared_relu_back(
    x_ptr: tl.tensor,
    dy_ptr: tl.tensor,
    dx_ptr: tl.tensor,
    rows: tl.tensor,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dx = 2 max(x, 0) dy."""
    n, inside = _block(rows, C, BLOCK)
    x = tl.load(x_ptr + n, inside, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + n, inside, other=0.0).to(tl.float32)
    positive = tl.where(x < 0, 0.0, x)
    tl.store(dx_ptr + n, (2.0 * positive * dy).to(dx_ptr.dtype.element_ty), inside)
