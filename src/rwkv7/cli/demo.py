"""`rwkv7 demo`: the whole story on the text that comes with the package, in minutes.

Verify, train, write, stop, go on, and a table beside what compressors make of the same bytes. It
strings together what the other verbs do; the work itself is theirs.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from .terminal import DeviceName

if TYPE_CHECKING:
    from rwkv7.generate import Session
    from rwkv7.nn import RWKV7
    from rwkv7.training import Evaluation, TrainResult, TrainSettings

# A new chapter after the last one of the Psalms, for which there is no text to remember.
PROMPT = "Psalms 151\n1 "
TEMPERATURE, TOP_P, SEED = 1.0, 0.8, 7


@dataclass(frozen=True, kw_only=True, slots=True)
class Story:
    """The sizes of the demo; tests tell a shorter one."""

    settings: TrainSettings
    text: bytes
    characters: int = 600  # written in all, cut in the middle


def demo(
    out: Annotated[
        Path | None, typer.Option(help="A new folder for all results. Default: rwkv7-demo.")
    ] = None,
    device: DeviceName = None,
) -> None:
    """Verify, train a small model on real text, let it write, stop it and go on.

    Ends with the model's bits per byte on text that it never saw, beside those of a byte bigram
    model, gzip -9 and xz -9 on the very same bytes. The exit code is 1 when a check fails or the
    model does not beat all three.
    """
    from rwkv7.demo_text import load_text

    tell(Story(settings=demo_settings(), text=load_text()), out or _free_folder(), device)


def demo_settings() -> TrainSettings:
    """The model that the demo trains, and how."""
    from rwkv7.demo_text import HELD_OUT_BYTES
    from rwkv7.training import TrainSettings

    return TrainSettings(
        steps=700,
        layers=3,
        width=128,
        batch=4,
        window=256,
        lr=3e-3,
        lr_final=3e-4,
        held_out=HELD_OUT_BYTES,
        save_every=350,
        eval_every=350,
    )


def tell(story: Story, out: Path, device: str | None) -> None:
    """The demo itself, with its results in the folder `out`.

    Raises typer.Exit(1) when a check fails, ValueError when `out` is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out: expected a new or empty folder, found {out}")
    out.mkdir(parents=True, exist_ok=True)
    console, started = Console(highlight=False), time.perf_counter()

    _chapter(console, "1  Verify: every backend here against the recurrence in fp64")
    _verify(out)
    _chapter(console, "2  Train: a small model, byte by byte, on the King James text")
    result = _train(story, out, device, console)
    assert result.evaluation is not None  # a finished run with held-out text has one
    _chapter(console, "3  Write, stop in the middle, read everything back from disk, and go on")
    same = _write(story, out, device, console)
    _chapter(console, f"4  Bits per byte on {result.evaluation.bytes:,} bytes never trained on")
    beaten = _table(story, result.evaluation, out, console)
    seconds = time.perf_counter() - started
    console.print(f"\nAll of it in {seconds:.0f} s; its results are in {out}", markup=False)
    if not (same and beaten):
        raise typer.Exit(1)


def _verify(out: Path) -> None:
    from .verify import verify

    verify(plot=out / "verify.png", json_file=out / "verify.json")


def _train(story: Story, out: Path, device: str | None, console: Console) -> TrainResult:
    from rwkv7.training import TrainingDivergedError, console_report, train_model

    text, run = out / "text.txt", out / "model"
    text.write_bytes(story.text)
    started = time.perf_counter()
    report = console_report(console)
    try:
        result = train_model(story.settings, [text], run, device=device, report=report)
    except TrainingDivergedError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    if not result.finished:
        print(f"stopped and saved; go on with: rwkv7 train --out {run} --resume")
        raise KeyboardInterrupt
    tokens = story.settings.steps * story.settings.batch * story.settings.window
    console.print(
        f"{tokens:,} bytes read in {time.perf_counter() - started:.0f} s, evaluation included "
        f"({result.tokens_per_second:,.0f} bytes a second in training); the loss is drawn in "
        f"{run / 'loss.png'}",
        markup=False,
        soft_wrap=True,
    )
    return result


def _write(story: Story, out: Path, device: str | None, console: Console) -> bool:
    """Write a text in two halves with everything read from disk between them; whether the two
    are, byte for byte, what one uninterrupted run gives."""
    from rwkv7.generate import Session
    from rwkv7.tokenizer import ByteTokenizer, StreamDecoder

    bytes_ = ByteTokenizer()
    saved = out / "session.safetensors"
    decoder = StreamDecoder(bytes_)

    def show(token: int) -> None:
        print(decoder.feed(token), end="", flush=True)

    half = story.characters // 2
    model, session = _begin(out, device)
    print(PROMPT, end="", flush=True)
    first = _draw(session, model, half, show)
    session.save(saved, model)
    console.print("[reverse] saved, and read back [/reverse]", end="")
    del model, session
    model = _load(out, device)
    second = _draw(Session.load(saved, model), model, story.characters - half, show)
    print(decoder.flush())

    model, session = _begin(out, device)
    same = first + second == _draw(session, model, story.characters, lambda _: None)
    if same:
        console.print("\n[green]The same, byte for byte, as the uninterrupted text.[/green]")
    else:
        console.print("\n[bold red]NOT the same as the uninterrupted text.[/bold red]")
    (out / "sample.txt").write_bytes(PROMPT.encode() + bytes_.decode_bytes(first + second))
    return same


def _begin(out: Path, device: str | None) -> tuple[RWKV7, Session]:
    from rwkv7.generate import Session
    from rwkv7.sampling import Sampler
    from rwkv7.tokenizer import ByteTokenizer

    model = _load(out, device)
    session = Session(Sampler(temperature=TEMPERATURE, top_p=TOP_P, seed=SEED))
    session.feed(model, ByteTokenizer().encode(PROMPT))
    return model, session


def _load(out: Path, device: str | None) -> RWKV7:
    from rwkv7.machine import device_called
    from rwkv7.weights import load_model

    return load_model(out / "model", device=device_called(device)).eval()


def _draw(session: Session, model: RWKV7, count: int, each: Callable[[int], None]) -> list[int]:
    drawn = []
    for token in session.run(model, count):
        each(token)
        drawn.append(token)
    return drawn


def _table(story: Story, evaluation: Evaluation, out: Path, console: Console) -> bool:
    """Show and keep the figures; whether the model beats the three baselines."""
    from rwkv7.baselines import bits_per_byte
    from rwkv7.demo_text import split

    baselines = bits_per_byte(*split(story.text, evaluation.bytes))
    figures = {
        **baselines,
        "this model, state dropped at every window": evaluation.dropped,
        "this model, state carried": evaluation.carried,
    }
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for name, bits in figures.items():
        table.add_row(name, f"{bits:.3f}", style="bold" if bits == evaluation.carried else "")
    console.print(table)
    (out / "bits_per_byte.json").write_text(
        json.dumps({"held_out_bytes": evaluation.bytes, "bits_per_byte": figures}, indent=1) + "\n",
        encoding="utf-8",
    )
    beaten = [name for name, bits in baselines.items() if evaluation.carried < bits]
    if len(beaten) == len(baselines):
        console.print("[green]The model needs fewer bits than all three.[/green]")
    else:
        lost = ", ".join(name for name in baselines if name not in beaten)
        console.print(f"[bold red]The model needs more bits than {lost}.[/bold red]")
    return len(beaten) == len(baselines)


def _chapter(console: Console, title: str) -> None:
    console.print()
    console.rule(f"[bold]{title}", align="left")


def _free_folder() -> Path:
    """rwkv7-demo, or with a number where an earlier demo left its results."""
    folder, number = Path("rwkv7-demo"), 1
    while folder.exists():
        number += 1
        folder = Path(f"rwkv7-demo-{number}")
    return folder
