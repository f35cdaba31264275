"""What is made again in a backward pass is what would have been kept."""

import torch

from rwkv7.nn.again import again, recomputing


def cube(x):
    return (x * x * x,)


def run(x, w, chosen, wrap):
    with wrap():
        (y,) = again(cube, x)
        (z,) = again(cube, y)
        return (z @ w).sum() + (y.view(-1, 2).flip(0) * chosen).sum()


def test_gradients_are_the_same_and_each_recipe_runs_once():
    import contextlib

    torch.manual_seed(0)
    x, w, chosen = (torch.randn(4, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    chosen = chosen.detach().view(-1, 2)
    found = [
        torch.autograd.grad(run(x, w, chosen, wrap), (x, w))
        for wrap in (contextlib.nullcontext, recomputing)
    ]
    assert all(map(torch.equal, *found))


def test_what_goes_through_it_is_not_kept_and_is_made_once():
    calls, alive = [], []

    def wide(x):
        calls.append(x.shape)
        y = x.expand(1000, -1).contiguous()
        alive.append(torch.multiprocessing.reductions.StorageWeakRef(y.untyped_storage()))
        return (y,)

    x, w = (torch.randn(8, requires_grad=True) for _ in range(2))
    with recomputing():
        (y,) = again(wide, x)
        loss = (y * w).sum() + (y.view(8, 1000).sum(1) * (y[:8, 0] * w)).sum()
        y_once = (y * 2 * w).sum()
        del y
    assert len(calls) == 1
    (loss + y_once).backward()
    assert len(calls) == 2
    plain = x.detach().requires_grad_(), w.detach().requires_grad_()
    y = plain[0].expand(1000, -1).contiguous()
    expected = (y * plain[1]).sum() + (y.view(8, 1000).sum(1) * (y[:8, 0] * plain[1])).sum()
    (expected + (y * 2 * plain[1]).sum()).backward()
    assert torch.equal(w.grad, plain[1].grad)


def test_an_address_that_is_used_again_is_not_mistaken():
    x = torch.randn(1000, requires_grad=True)
    with recomputing():
        (y,) = again(lambda x: (x.detach() * 0 + 7.0,), x)
        address = y.data_ptr()
        del y
        for _ in range(50):  # an allocator gives the place away again sooner or later
            z = x.exp()
            if z.data_ptr() == address:
                break
        loss = z.square().sum()
    (gradient,) = torch.autograd.grad(loss, x)
    assert torch.allclose(gradient, 2 * (2 * x).exp())
