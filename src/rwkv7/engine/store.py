"""Saved conversations by name in a folder, each whole or absent whatever happens meanwhile.

What a conversation is, and what its file holds, is `generate.Session`'s affair.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote_to_bytes

from rwkv7.files import remove_forgotten
from rwkv7.fingerprint import fingerprint
from rwkv7.generate import Session
from rwkv7.nn import RWKV7

_PREFIX, _SUFFIX = "session-", ".safetensors"
_LONGEST = 200  # bytes of an encoded name; file systems take 255 with what is around it


class StateStore:
    """A folder of sessions of one model. Several processes may use it; the last to save wins.

    Args:
        folder: made if it is missing. Half-written files that a killed process left there are
            removed once they are an hour old.
        model: whose sessions these are; its weights must not change while the store is in use.
    """

    def __init__(self, folder: str | os.PathLike[str], model: RWKV7) -> None:
        self._folder, self._model = Path(folder), model
        self._weights = fingerprint(model)
        self._folder.mkdir(parents=True, exist_ok=True)
        remove_forgotten(self._folder, f".{_PREFIX}*.tmp")

    def save(self, name: str, session: Session) -> None:
        """Keep a session under `name`, in place of what was there.

        Raises:
            ValueError, TypeError: a name that is empty, too long or no text, or a session of other
                weights.
            OSError: a full disk and its like; what was there before is still whole.
        """
        if session.weights not in (None, self._weights):
            raise ValueError("session: it belongs to other weights than this store's")
        session.save(self._path(name), self._model)

    def load(self, name: str) -> Session:
        """The session under `name`, on the model's device.

        Raises:
            KeyError: there is none.
            ValueError: its file is damaged or belongs to another model.
        """
        try:
            return Session.load(self._path(name), self._model)
        except FileNotFoundError:
            raise KeyError(name) from None

    def delete(self, name: str) -> None:
        """Forget the session under `name`; KeyError where there is none."""
        try:
            self._path(name).unlink()
        except FileNotFoundError:
            raise KeyError(name) from None

    def __contains__(self, name: str) -> bool:
        return self._path(name).is_file()

    def __iter__(self) -> Iterator[str]:
        """The names there are, in no particular order."""
        with os.scandir(self._folder) as entries:
            for entry in entries:
                name = entry.name
                if name.startswith(_PREFIX) and name.endswith(_SUFFIX):
                    yield unquote_to_bytes(name[len(_PREFIX) : -len(_SUFFIX)]).decode()

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _path(self, name: str) -> Path:
        if not isinstance(name, str):
            raise TypeError(f"name: expected a text, found {name!r:.60}")
        # Everything but small letters, digits, - and _ is written as %xx: names that differ in
        # case alone stay two files where the file system knows no case.
        encoded = re.sub(
            rb"[^a-z0-9_-]", lambda found: b"%%%02x" % found[0][0], name.encode()
        ).decode()
        if not 0 < len(encoded) <= _LONGEST:
            raise ValueError(
                f"name: expected 1 to {_LONGEST} bytes, with three for each that is not a-z, 0-9, "
                f"_ or -; found {len(encoded)}"
            )
        return self._folder / f"{_PREFIX}{encoded}{_SUFFIX}"
