"""The options of verbs that write text: how the next token is chosen.

They are told once, as fields; `with_sampler_options` hands them to a verb as one argument. What the
settings mean is `rwkv7.sampling`'s affair.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable
from typing import Annotated, Any

import typer

from rwkv7.sampling import Sampler
from rwkv7.tokenizer import Tokenizer

# Their repetition says nothing about a text (rwkv/utils.py of the rwkv package).
_BLANKS_AND_DIGITS = " \t0123456789"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SamplerOptions:
    """Settings as they were given; None where they were not."""

    temperature: Annotated[
        float | None, typer.Option(help="0: always the likeliest token. Default 1.")
    ] = None
    top_k: Annotated[
        int | None, typer.Option(help="Draw from the k likeliest tokens. Default 0: from all.")
    ] = None
    top_p: Annotated[
        float | None,
        typer.Option(help="Draw from the likeliest that together reach p. Default 1."),
    ] = None
    min_p: Annotated[
        float | None, typer.Option(help="Drop what is p times less likely than the likeliest.")
    ] = None
    presence: Annotated[
        float | None, typer.Option(help="Taken off the logit of a token drawn before.")
    ] = None
    frequency: Annotated[
        float | None, typer.Option(help="Taken off once more for every time it was drawn.")
    ] = None
    decay: Annotated[
        float | None, typer.Option(help="What is left of such a count after each token. Default 1.")
    ] = None
    order: Annotated[
        str | None,
        typer.Option(
            help="rwkv: top-p, top-k, then temperature. hf: temperature, top-k, then top-p. "
            "Default rwkv."
        ),
    ] = None
    seed: Annotated[int | None, typer.Option(help="Draw the same tokens again.")] = None

    def sampler(self, tokenizer: Tokenizer | None = None, base: Sampler | None = None) -> Sampler:
        """A sampler with these settings, or `base` with those that were given replaced.

        With the tokenizer it counts blanks and digits as the order has it. A new seed begins its
        draws. ValueError for a setting outside its range.
        """
        state = (base or Sampler(seed=self.seed)).state_dict()
        if self.seed is not None:
            state["draws"] = 0
        state |= {name: x for name, x in dataclasses.asdict(self).items() if x is not None}
        if tokenizer is not None:
            state["exempt"] = _uncounted(tokenizer) if state["order"] == "rwkv" else []
        return Sampler.from_state_dict(state)


NOTHING_GIVEN = SamplerOptions()


def with_sampler_options(verb: Callable[..., None]) -> Callable[..., None]:
    """`verb`, whose argument `options` is made of one command line option for each field."""
    types = typing.get_type_hints(SamplerOptions, include_extras=True)
    names = [field.name for field in dataclasses.fields(SamplerOptions)]

    @functools.wraps(verb)
    def _spread(*args: Any, **kwargs: Any) -> None:
        chosen = SamplerOptions(**{name: kwargs.pop(name) for name in names})
        verb(*args, **kwargs, options=chosen)

    parameters: list[inspect.Parameter] = []
    annotations = typing.get_type_hints(verb, include_extras=True)
    del annotations["options"]
    for parameter in inspect.signature(verb).parameters.values():
        if parameter.name != "options":
            parameters.append(parameter.replace(annotation=annotations[parameter.name]))
            continue
        for name in names:
            keyword = inspect.Parameter.POSITIONAL_OR_KEYWORD
            parameters.append(
                inspect.Parameter(name, keyword, default=None, annotation=types[name])
            )
    _spread.__annotations__ = annotations | {name: types[name] for name in names}
    vars(_spread)["__signature__"] = inspect.Signature(parameters)
    return _spread


def _uncounted(tokenizer: Tokenizer) -> list[int]:
    """The ids of all tokens that are a piece of " \\t0123456789"."""
    whole, ends = _BLANKS_AND_DIGITS, range(len(_BLANKS_AND_DIGITS) + 1)
    pieces = [tokenizer.encode(whole[start:end]) for end in ends for start in range(end)]
    return sorted({piece[0] for piece in pieces if len(piece) == 1})
