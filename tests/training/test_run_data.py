"""Runs on a tokenized corpus: in either order, packed or not, killed and resumed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from rwkv7.tokenizer import get_tokenizer
from rwkv7.training import TrainSettings, resume_training, train_model
from rwkv7.training.batch import Batch
from rwkv7.training.data import build_corpus, find_text, open_data, prepare_data, write_corpus
from rwkv7.training.sources import PackedWindows, Windows
from rwkv7.training.watch.log import StepRecord

BYTE = get_tokenizer("byte")


class Killed(BaseException):
    """Ends a run as a kill does: nothing is saved on the way out."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """A corpus of the documents of a JSON-lines file, one for each sentence of 40 letters."""
    folder, letters = tmp_path_factory.mktemp("corpus"), text.read_text()
    lines = [f'{{"text": "{letters[i : i + 40]}"}}\n' for i in range(0, 6000, 40)]
    (folder / "a.jsonl").write_text("".join(lines))
    build_corpus(find_text([folder / "a.jsonl"]), folder / "c", BYTE)
    return folder / "c"


@pytest.mark.parametrize("order", ["shuffled", "official"])
@pytest.mark.parametrize("pack", [False, True])
def test_a_killed_and_resumed_run_trains_on_every_sample_once(
    tmp_path: Path,
    corpus: Path,
    settings: TrainSettings,
    monkeypatch: pytest.MonkeyPatch,
    order: str,
    pack: bool,
) -> None:
    source = PackedWindows if pack else Windows
    read: dict[int, torch.Tensor] = {}
    starts: dict[int, list[int]] = {}
    real = source.batch

    def recorded(self: PackedWindows | Windows, step: int) -> Batch:
        batch = real(self, step)
        assert (batch.cu_seqlens is not None) == pack
        # The last reading of a step is the one that its weights come from.
        read[step] = batch.inputs.reshape(2, 195)
        starts[step] = [self.order.start(sample) for sample in (2 * step, 2 * step + 1)]
        assert 2 * (step + 1) <= self.order.per_epoch == 29
        return batch

    def kill_at(step: int) -> Callable[[StepRecord], None]:
        def kill(record: StepRecord) -> None:
            if record.step == step:
                raise Killed

        return kill

    monkeypatch.setattr(source, "batch", recorded)
    settings = dataclasses.replace(
        settings, order=order, pack=pack, window=195, held_out=50, steps=14, save_every=2
    )
    run = tmp_path / "run"
    with pytest.raises(Killed):
        train_model(settings, [corpus], run, device="cpu", on_step=kill_at(3))
    for step in (8, 13):
        with pytest.raises(Killed):
            resume_training(run, device="cpu", on_step=kill_at(step))
    assert resume_training(run, device="cpu").finished
    assert sorted(read) == list(range(14))
    assert len({start for pair in starts.values() for start in pair}) == 28
    tokens = open_data(run / "data").train
    for step, rows in read.items():
        for start, row in zip(starts[step], rows, strict=True):
            assert row.tolist() == tokens[start : start + 195].tolist()


def test_a_corpus_stays_where_it_is(tmp_path: Path, corpus: Path) -> None:
    data = prepare_data(find_text([corpus]), tmp_path / "data", BYTE)
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["data.json"]
    assert (len(data.train), len(data.held_out)) == (5400, 600)
    assert (data.info.train_bytes, data.info.held_out_bytes) == (5400, 600)
    whole = np.concatenate([data.train, data.held_out])
    assert whole.tobytes() == Path(f"{corpus}.bin").read_bytes()
    assert len(data.documents) == 135
    # A text beside it is held out, and all of the corpus is trained on.
    (tmp_path / "b.txt").write_bytes(b"held out")
    apart = find_text([tmp_path / "b.txt"])
    data = prepare_data(find_text([corpus]), tmp_path / "data", BYTE, None, apart)
    assert len(data.train) == 6000 and data.held_out.tobytes() == b"held out"


def test_a_corpus_that_does_not_fit_is_refused(tmp_path: Path, corpus: Path) -> None:
    ids = (np.array([1, 2, 300]), True)
    write_corpus(tmp_path / "w", [ids], np.dtype("<u2"))
    with pytest.raises(ValueError, match="expected ids from 0 to 255, found 300 at token 2"):
        prepare_data(find_text([tmp_path / "w"]), tmp_path / "data", BYTE)
    write_corpus(tmp_path / "e", [], np.dtype("<u2"))
    with pytest.raises(ValueError, match="expected tokens to train on, found none in"):
        prepare_data(find_text([tmp_path / "e"]), tmp_path / "data", BYTE)
    assert not (tmp_path / "data").exists()
    with pytest.raises(ValueError, match="is a tokenized corpus, which is read alone, found 2"):
        find_text([corpus, tmp_path])
    with pytest.raises(ValueError, match="held_out_file: expected text, found the corpus"):
        prepare_data(
            find_text([corpus]), tmp_path / "data", BYTE, held_out_text=find_text([corpus])
        )


def test_a_corpus_that_changed_is_another(tmp_path: Path) -> None:
    write_corpus(tmp_path / "c", [(np.arange(200), True)], np.dtype("u1"))
    prepare_data(find_text([tmp_path / "c"]), tmp_path / "data", BYTE)
    write_corpus(tmp_path / "c", [(np.arange(200)[::-1], True)], np.dtype("u1"))
    with pytest.raises(ValueError, match="no longer the corpus that the run was begun with"):
        open_data(tmp_path / "data")
    (tmp_path / "c.idx").unlink()
    with pytest.raises(ValueError, match="missing or damaged: .*c.idx"):
        open_data(tmp_path / "data")


@pytest.mark.parametrize(("kept", "lost"), [(".bin", ".idx"), (".idx", ".bin")])
def test_half_of_a_corpus_is_not_taken_for_text(
    tmp_path: Path, corpus: Path, kept: str, lost: str
) -> None:
    alone = tmp_path / f"alone{kept}"
    alone.write_bytes(corpus.with_suffix(kept).read_bytes())
    with pytest.raises(ValueError, match=f"alone{kept} is half of .* found no .*alone{lost}"):
        find_text([alone])
    with pytest.raises(ValueError, match="there is no file or folder"):
        find_text([tmp_path / f"none{kept}"])
