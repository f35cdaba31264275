"""The ruler itself: what counts as an error, and what counts as vanishing."""

from __future__ import annotations

import math

import pytest
import torch

from rwkv7.wkv7.tolerance import BOUNDS, Measure, compare, relative_error


def test_relative_error_is_relative_to_the_reference():
    reference = torch.tensor([3.0, 4.0])
    assert relative_error(reference + torch.tensor([0.0, 0.5]), reference) == pytest.approx(0.1)
    assert relative_error(100 * reference, 100 * reference) == 0.0


def test_zero_and_empty_references():
    zero = torch.zeros(3)
    assert relative_error(zero, zero) == 0.0
    assert relative_error(torch.zeros(0), torch.zeros(0)) == 0.0
    assert relative_error(torch.full((3,), 1e-30), zero) == math.inf
    assert relative_error(torch.tensor([0.0, 0.0, 0.5]), zero, floor=2.0) == 0.25


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_result_that_is_not_finite_never_passes(bad):
    error = relative_error(torch.tensor([1.0, bad]), torch.tensor([1.0, 1.0]))
    assert not Measure(error, 1e30).ok


def test_shapes_must_be_equal():
    with pytest.raises(ValueError, match=r"shape \[2, 1\], found \[2\]"):
        relative_error(torch.ones(2), torch.ones(2, 1))


def test_bounds_are_the_published_ones():
    assert BOUNDS[torch.float64].of("y") == 1e-12
    assert BOUNDS[torch.float32].of("dstate") == 1e-5
    bf16 = BOUNDS[torch.bfloat16]
    assert (bf16.of("y"), bf16.of("dw"), bf16.of("state")) == (2.0e-3, 3.0e-3, 6e-4)
    assert (BOUNDS[torch.float16].of("state"), BOUNDS[torch.float16].of("dr")) == (4e-4, 9e-4)


def test_a_vanishing_gradient_is_held_to_eps_of_the_largest():
    reference = {"dv": torch.full((4,), 10.0), "dw": torch.zeros(4)}
    eps, largest = torch.finfo(torch.float32).eps, 20.0

    def dw_passes(size: float) -> bool:
        found = {"dv": reference["dv"], "dw": torch.tensor([size, 0.0, 0.0, 0.0])}
        return compare(found, reference, torch.float32)["dw"].ok

    assert dw_passes(0.99 * eps * largest)
    assert not dw_passes(1.01 * eps * largest)


def test_a_gradient_of_ordinary_size_gets_no_allowance():
    reference = {"dv": torch.full((4,), 10.0), "dw": torch.full((4,), 1.0)}
    found = {"dv": reference["dv"], "dw": reference["dw"] * (1 + 3e-5)}
    measure = compare(found, reference, torch.float32)["dw"]
    assert not measure.ok
    assert measure.error == pytest.approx(3e-5, rel=0.01)


def test_outputs_get_no_allowance_from_gradients():
    reference = {"y": torch.zeros(4), "dv": torch.full((4,), 1e6)}
    found = {"y": torch.full((4,), 1e-12), "dv": reference["dv"]}
    assert not compare(found, reference, torch.float32)["y"].ok
