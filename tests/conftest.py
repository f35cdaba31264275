"""What holds for every test: those marked gpu are skipped where there is none."""

import importlib

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's kernels run on the CPU inside these tests only; see `triton_interpreter`."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    inside = importlib.import_module("triton.runtime.interpreter")
    patch = inside._patch_lang_tensor

    def patched(tensor, scope):
        patch(tensor, scope)
        # Triton 3.6 takes int() of an array of one element, which numpy 2.4 refuses.
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    monkeypatch.setattr(inside, "_patch_lang_tensor", patched)
