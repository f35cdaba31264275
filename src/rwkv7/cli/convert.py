"""`rwkv7 convert`: a checkpoint in another file format or under other names, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def convert(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="IN", help="A checkpoint, a Hugging Face folder, or a folder that train wrote."
        ),
    ],
    destination: Annotated[
        Path,
        typer.Argument(
            metavar="OUT",
            help="NAME.pth or NAME.safetensors: official names. Without a suffix: a new Hugging "
            "Face folder with flash-linear-attention's names.",
        ),
    ],
    dtype: Annotated[
        str | None,
        typer.Option(help="bf16, fp16, fp32 or fp64. Default: each tensor keeps its own."),
    ] = None,
) -> None:
    """Write a checkpoint in another format.

    Every number keeps its bits unless --dtype asks for another. OUT is whole or not there: whatever
    fails, what was there before stays.
    """
    from rwkv7.machine import dtype_called
    from rwkv7.weights import convert as convert_weights

    kind = None if dtype is None else dtype_called(dtype)
    config = convert_weights(source, destination, kind)
    print(f"{destination}: {config.layers} layers, width {config.width}, from {source}")
