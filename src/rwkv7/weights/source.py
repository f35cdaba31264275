"""From a path to a checkpoint's tensors under official names, whichever files and names it has.

A file or a folder, one file or shards, official or FLA's names, prefixes that trainers leave: all
ends here. Whether the tensors make a model is left to `official`.
"""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkv7.config import ModelConfig
from rwkv7.files import WRAPPERS, TensorFile, json_object, open_tensors

from . import fla
from .official import config_from_tensors

# What a run of `rwkv7 train` leaves that tuned adapters.
MERGED = "merged.safetensors"
# The files of a model in a Hugging Face folder, and of one that `rwkv7 train` wrote, best first.
_SINGLE = ("model.safetensors", "pytorch_model.bin")
_INDEX = tuple(f"{name}.index.json" for name in _SINGLE)
_ANCHOR = re.compile(rf"({WRAPPERS})emb\.weight")
_FLA_ANCHOR = re.compile(rf"({WRAPPERS}){re.escape(fla.EMBEDDINGS)}")


class Weights(Mapping[str, Tensor]):
    """A checkpoint's tensors under official names, each read when it is asked for.

    Attributes:
        path: the file, or the folder of the files, that they are in.
        naming: "official" or "fla", the names that the files have.
        metadata: the texts that .safetensors files keep beside their tensors.
    """

    def __init__(self, path: Path, files: Sequence[TensorFile], said: Mapping[str, Any]) -> None:
        """`said` is what config.json says, {} where there is none."""
        self.path, self._files, self._said = path, files, said
        self.metadata = {key: text for file in files for key, text in file.metadata.items()}
        where: dict[str, TensorFile] = {}
        for file in files:
            for name in file:
                if name in where:
                    raise ValueError(f"{name} is in {where[name].path.name} and {file.path.name}")
                where[name] = file
        self.naming, prefix = _naming(where)
        plain = {name.removeprefix(prefix): name for name in where}
        reads: dict[str, tuple[str, Callable]]
        if self.naming == "fla":
            reads = fla.official_reads(plain, bool(said.get("tie_word_embeddings")))
        else:
            reads = {name: (name, lambda x: x) for name in plain}
        self._reads = {
            ours: (where[plain[theirs]], plain[theirs], change)
            for ours, (theirs, change) in reads.items()
        }

    def release(self) -> None:
        """Give back the memory that reading took so far, as `TensorFile.release` does."""
        for file in self._files:
            file.release()

    def config(self) -> ModelConfig:
        """The sizes of the model; ValueError where the tensors, or config.json, make none."""
        if self._said:
            fla.check_config(self._said, None)
        config = config_from_tensors(self)
        if self._said:
            fla.check_config(self._said, config)
        return config

    def __getitem__(self, name: str) -> Tensor:
        file, theirs, change = self._reads[name]
        return change(file[theirs])

    def __iter__(self) -> Iterator[str]:
        return iter(self._reads)

    def __len__(self) -> int:
        return len(self._reads)


@contextlib.contextmanager
def open_weights(path: str | os.PathLike[str]) -> Iterator[Weights]:
    """The tensors of the checkpoint at `path`: a file, a Hugging Face folder, a run's folder.

    Nothing in it is executed.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: no checkpoint is in the folder, or a file of it cannot be read.
    """
    path = Path(path)
    files = _find(path)
    said: dict[str, Any] = {}
    if path.is_dir() and (about := path / "config.json").is_file():
        try:
            said = json_object(about.read_bytes())
        except ValueError as error:
            raise ValueError(f"{about}: cannot be read ({error})") from None
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(open_tensors(file)) for file in files]
        place = files[0] if len(files) == 1 else path
        try:
            weights = Weights(place, opened, said)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
        yield weights


def all_finite(x: Tensor) -> Tensor:
    """Whether no number of `x` is NaN or infinite, as a tensor of one bool on its device.

    The extremes are NaN as soon as one number is; finding them takes no memory.
    """
    low, high = x.aminmax()
    return torch.isfinite(low) & torch.isfinite(high)


def _naming(names: Mapping[str, Any]) -> tuple[str, str]:
    """Whose names they are, and the prefix before them."""
    for naming, anchor in (("fla", _FLA_ANCHOR), ("official", _ANCHOR)):
        prefixes = [match[1] for name in names if (match := anchor.fullmatch(name))]
        if prefixes:
            return naming, min(prefixes, key=len)
    return "official", ""


def _find(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"path: there is no file or folder {path}")
    for single, index in zip(_SINGLE, _INDEX, strict=True):
        if (path / single).is_file():
            return [path / single]
        if (path / index).is_file():
            return _shards(path / index)
    return [_newest_of_run(path)]


def _shards(index: Path) -> list[Path]:
    try:
        names = json_object(index.read_bytes()).get("weight_map")
    except ValueError as error:
        raise ValueError(f"{index}: cannot be read ({error})") from None
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{index}: expected a weight_map of names to files, found {names!r:.60}")
    files = []
    for name in sorted({str(name) for name in names.values()}):
        # A list from a stranger must not lead out of its own folder.
        if Path(name).name != name or not (index.parent / name).is_file():
            raise ValueError(f"{index}: the file {name!r} that it names is not beside it")
        files.append(index.parent / name)
    return files


def _newest_of_run(path: Path) -> Path:
    found = sorted(
        (path / "checkpoints").glob("step-*/model.safetensors"),
        key=lambda file: (len(file.parent.name), file.parent.name),
        reverse=True,
    )
    for file in found:
        try:
            with open_tensors(file):
                return file
        except ValueError as error:
            warnings.warn(f"{error}; taking the checkpoint before it", stacklevel=4)
    if (path / MERGED).is_file():
        raise ValueError(
            f"{path}: this run tuned adapters; its model is {path / MERGED}, name that"
        )
    raise ValueError(
        f"{path}: expected {', '.join((*_SINGLE, *_INDEX))} or checkpoints/step-*/model.safetensors"
        f" in this folder, found {'no whole one' if found else 'none'}"
    )
