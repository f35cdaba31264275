"""The processes that the tests of this folder run in."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from training.parallel.ranks import Ranks


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Three processes; a test asks for as many as it needs."""
    processes = Ranks(tmp_path_factory.mktemp("ranks"), 3)
    yield processes
    processes.stop()
