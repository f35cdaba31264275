"""A conversation as official models are trained on it: "User: …", a blank line, "Assistant: …".

What of it is learnt, how an answer begins and where it ends are left to those who train and talk.
"""

from __future__ import annotations

import re

__all__ = ["END", "ROLES", "turn"]

ROLES = {"system": "System", "user": "User", "assistant": "Assistant"}
END = "\n\n"  # of a turn


def turn(message: object) -> tuple[str, str]:
    """The name in `ROLES` and the text of a message, {"role": …, "content": …}.

    Blank lines within it, which would end it, become line breaks. Raises ValueError for another
    role, and for a content that is no text or holds half a character.
    """
    given = message if isinstance(message, dict) else {}
    role, content = given.get("role"), given.get("content")
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(f"role: expected one of {', '.join(ROLES)}, found {role!r}")
    if not isinstance(content, str):
        raise ValueError(f"content: expected text, found {type(content).__name__}")
    content.encode()  # UnicodeError, a ValueError, for half a surrogate pair
    return ROLES[role], re.sub(r"\n{2,}", "\n", content.replace("\r\n", "\n")).strip()
