"""RWKV's other generations and variants: known by their tensors' names, refused by their own.

Each is another model with other arithmetic; none is read here as if it were RWKV-7.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple


class _Generation(NamedTuple):
    name: str
    parts: tuple[str, ...]  # a model of it has names with all of these in them
    needs: str  # what running it would take


# The first whose parts are all there decides: a later generation keeps names of earlier ones.
_GENERATIONS = (
    _Generation(
        "RWKV-8 hybrid (DeepEmbed on the output, and attention)",
        ("ffn.enn.", ".qkv."),
        "it would need channel mix times an embedding of the token, and a cache of keys and values",
    ),
    _Generation(
        "RWKV-8 (DeepEmbed on the output)",
        ("ffn.enn.",),
        "it would need channel mix's output times an embedding of the token",
    ),
    _Generation(
        "RWKV-7b (DeepEmbed and DEA)",
        (".qkv.",),
        "it would need DeepEmbed's gate in channel mix, and an attention beside time mix with a "
        "cache that grows with the text",
    ),
    _Generation(
        "RWKV-7a (DeepEmbed)",
        ("ffn.s_emb",),
        "it would need a gate in channel mix from an embedding of the token (s_emb, s0, s1, s2)",
    ),
    *(
        _Generation("RWKV-8 ROSA", (part,), "it would need a suffix automaton in every layer")
        for part in ("rosa", "x_q")  # its layers' name; their mix, in scripts that name them else
    ),
    _Generation(
        "RWKV-6",
        ("time_maa_",),
        "it would need another recurrence (a decay and a bonus u, without RWKV-7's removal and "
        "replacement); the `rwkv` package runs it",
    ),
    _Generation(
        "RWKV-5",
        ("time_decay", "ln_x"),
        "it would need another recurrence, with a decay that no token changes; the `rwkv` "
        "package runs it",
    ),
    _Generation(
        "RWKV-4",
        ("time_decay",),
        "it would need another recurrence, with a state of vectors, not matrices; the `rwkv` "
        "package runs it",
    ),
)


def other_generation(names: Collection[str]) -> str | None:
    """The generation or variant of RWKV, not plain RWKV-7, that tensors of such names are of."""
    found = _find(names)
    return None if found is None else found[0].name


def refuse_other(names: Collection[str]) -> None:
    """Raise ValueError unless the names may be those of an RWKV-7 model (official ones)."""
    if (found := _find(names)) is not None:
        generation, name = found
        raise ValueError(
            f"expected an RWKV-7 model, found {generation.name}, to which {name} belongs: "
            f"{generation.needs}"
        )
    if is_tuned_state(names):
        raise ValueError("a tuned state, not a model; rwkv7.state.load_tuned reads it")
    for name in ("emb.weight", "blocks.0.att.r_k"):
        if name not in names:
            some = ", ".join(list(names)[:3]) or "no tensors"
            raise ValueError(f"expected an RWKV-7 model, which has {name}; found {some}")


def is_tuned_state(names: Collection[str]) -> bool:
    """Whether these are the names of a tuned state without its model."""
    return "emb.weight" not in names and any(n.endswith(".att.time_state") for n in names)


def _find(names: Collection[str]) -> tuple[_Generation, str] | None:
    for generation in _GENERATIONS:
        first = [next((n for n in names if part in n), None) for part in generation.parts]
        if first[0] is not None and None not in first:
            return generation, first[0]
    return None
