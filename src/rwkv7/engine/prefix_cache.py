"""States after the beginnings of prompts, so that what prompts share is read once.

Bounded in bytes, in memory and on disk; what was used longest ago goes first. When a state is
worth keeping is for `prefill` to say.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import warnings
from collections import OrderedDict
from pathlib import Path

from torch import Tensor

from rwkv7.files import remove_forgotten
from rwkv7.fingerprint import fingerprint
from rwkv7.nn import RWKV7
from rwkv7.state import ModelState

from .request import check_count

_SUFFIX = ".prefix.safetensors"
_SEEN = 1 << 18  # beginnings remembered by name alone, 32 bytes each


class PrefixCache:
    """States on the CPU by the tokens that led to them, of one model. May serve several engines.

    Args:
        model: whose states these are. Its weights must not change while the cache is in use.
        memory_bytes: how much memory the states may take.
        folder: where states that memory has no room for go, and are found again by another
            process; made if it is missing. None keeps none.
        disk_bytes: how much of the disk they may take.

    Raises ValueError or TypeError for bounds that are no numbers of bytes.

    Attributes:
        memory_used, disk_used: bytes.
        hits: how often a beginning was found.
    """

    def __init__(
        self,
        model: RWKV7,
        memory_bytes: int,
        folder: str | os.PathLike[str] | None = None,
        disk_bytes: int = 0,
    ) -> None:
        for name, size in (("memory_bytes", memory_bytes), ("disk_bytes", disk_bytes)):
            check_count(name, size, 0)
        self._config = model.config
        self._origin = _origin(model)
        self._memory_bytes, self._disk_bytes = memory_bytes, disk_bytes
        self._states: OrderedDict[bytes, ModelState] = OrderedDict()  # the newest last
        self._files: OrderedDict[bytes, int] = OrderedDict()  # with their sizes
        self._seen: OrderedDict[bytes, None] = OrderedDict()
        self._folder = None if folder is None else Path(folder)
        self.memory_used = self.disk_used = self.hits = 0
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._find_files(self._folder)

    def check(self, model: RWKV7) -> None:
        """ValueError unless it holds the states of a model with these weights, in this dtype."""
        if _origin(model) != self._origin:
            raise ValueError(
                "cache: it was made for other weights, or another dtype, than this engine's model"
            )

    def names(self, tokens: Tensor, piece: int) -> list[bytes]:
        """The name of each beginning of `piece`, 2 · `piece`, … tokens [T] (int64, on the CPU)."""
        digest = hashlib.sha256(self._origin)
        found = []
        for start in range(0, len(tokens) - piece + 1, piece):
            digest.update(tokens[start : start + piece].numpy().astype("<i8").tobytes())
            found.append(digest.digest())
        return found

    def longest(self, names: list[bytes]) -> tuple[int, ModelState | None]:
        """How many of `names`, the shortest beginning first, the longest known one has; its state.

        (0, None) where none is known. A file that cannot be read, or has other numbers than were
        put into it, is dropped with a warning.
        """
        for count in range(len(names), 0, -1):
            if (state := self._get(names[count - 1])) is not None:
                self.hits += 1
                return count, state
        return 0, None

    def put(self, name: bytes, state: ModelState) -> None:
        """Keep the state [B = 1] that follows the beginning called `name`; not to be changed."""
        self._keep(name, state.to("cpu"))

    def seen_before(self, names: list[bytes]) -> int:
        """How many of `names` the longest beginning has that an earlier call was given."""
        count = next((i for i in range(len(names), 0, -1) if names[i - 1] in self._seen), 0)
        for name in names:
            self._seen[name] = None
            self._seen.move_to_end(name)
        while len(self._seen) > _SEEN:
            self._seen.popitem(last=False)
        return count

    def __contains__(self, name: bytes) -> bool:
        return name in self._states or name in self._files

    def _get(self, name: bytes) -> ModelState | None:
        if (state := self._states.get(name)) is not None:
            self._states.move_to_end(name)
            return state
        if name not in self._files:
            return None
        try:
            state = ModelState.load(self._path(name), self._config)
        except (ValueError, OSError) as error:
            # An OSError is another process's doing, which needed the room.
            if isinstance(error, ValueError):
                warnings.warn(
                    f"a state of the prefix cache is left out, and its prompt read ({error})",
                    RuntimeWarning,
                    stacklevel=2,
                )
            self._forget(name)
            return None
        self._files.move_to_end(name)
        with contextlib.suppress(OSError):
            os.utime(self._path(name))  # for the order in which another process finds them
        self._keep(name, state)
        return state

    def _keep(self, name: bytes, state: ModelState) -> None:
        if name in self._states:
            self._states.move_to_end(name)
            return
        self._states[name] = state
        self.memory_used += _size(state)
        while self.memory_used > self._memory_bytes:
            oldest, evicted = self._states.popitem(last=False)
            self.memory_used -= _size(evicted)
            self._spill(oldest, evicted)

    def _spill(self, name: bytes, state: ModelState) -> None:
        if self._folder is None or name in self._files or _size(state) > self._disk_bytes:
            return
        path = self._path(name)
        try:
            state.save(path, self._config)
            size = path.stat().st_size
        except OSError:
            return  # a full disk costs time later, not a request now
        self._files[name] = size
        self.disk_used += size
        while self.disk_used > self._disk_bytes:
            self._forget(next(iter(self._files)))

    def _forget(self, name: bytes) -> None:
        self.disk_used -= self._files.pop(name)
        with contextlib.suppress(OSError):
            self._path(name).unlink()

    def _find_files(self, folder: Path) -> None:
        remove_forgotten(folder, f".*{_SUFFIX}.*.tmp")
        # Files of other models are counted too, and leave when they are the oldest.
        files = []
        for path in folder.glob(f"*{_SUFFIX}"):
            with contextlib.suppress(OSError, ValueError):
                about = path.stat()
                name = bytes.fromhex(path.name.removesuffix(_SUFFIX))
                files.append((about.st_mtime, name, about.st_size))
        for _, name, size in sorted(files):
            self._files[name] = size
            self.disk_used += size
        while self.disk_used > self._disk_bytes:
            self._forget(next(iter(self._files)))

    def _path(self, name: bytes) -> Path:
        assert self._folder is not None
        return self._folder / f"{name.hex()}{_SUFFIX}"


def _origin(model: RWKV7) -> bytes:
    return hashlib.sha256(f"{fingerprint(model)} {model.dtype}".encode()).digest()


def _size(state: ModelState) -> int:
    return sum(x.numel() * x.element_size() for layer in state.layers for x in layer)
