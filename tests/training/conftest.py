"""A text of a few kilobytes and settings with which a step takes milliseconds."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from rwkv7.training import TrainSettings


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sentence = "the fruit of a tree that bears seed after its kind was good and it was so"
    words = sentence.split()
    chosen = random.Random(0).choices(words, k=2000)
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(chosen), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def settings() -> TrainSettings:
    return TrainSettings(
        steps=8,
        layers=2,
        width=16,
        head_size=8,
        window=12,
        batch=2,
        lr=3e-3,
        lr_final=1e-3,
        warmup=2,
        held_out=200,
        save_every=100,
        eval_every=100,
    )
