"""A run in its folder: `train_model` and `tune_model` begin one, `resume_training` goes on with it.

The folder holds data/ (tokens), checkpoints/, log.jsonl, loss.png, and a lock while at work. The
loop itself is in loop.py.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.optim import AdamW

from rwkv7.config import ModelConfig
from rwkv7.files import check_destination
from rwkv7.nn import RWKV7, initialise_, parameter_count
from rwkv7.tokenizer import get_tokenizer

from .checkpoint import (
    Checkpoint,
    load_checkpoint,
    machine,
    newest_checkpoint,
    newest_trouble,
)
from .data import (
    BadRecords,
    ChatData,
    Text,
    TokenData,
    chat_digest,
    count_chat_tokens,
    count_tokens,
    find_text,
    open_chat,
    open_data,
    prepare_chat,
    prepare_data,
    text_digest,
)
from .lock import run_lock
from .loop import OnStep, Run, TrainResult
from .optim import make_optimizer
from .settings import TrainSettings, resumed_settings, tuning_settings
from .sources import make_order
from .together.processes import Crew
from .together.team import Team, check_team, join_checkpoint, weights_place
from .tuning import Tuning, make_tuning, open_base, weights_dtype
from .watch.plan import Plan, check_model_fits, check_step_fits, make_plan
from .watch.report import Report, ReportToAll

__all__ = ["choose_device", "plan_training", "resume_training", "train_model", "tune_model"]

_LEFTOVER = re.compile(
    r"lock(\.\d+)?|data|data/\.?(train\.bin|train\.idx|held_out\.bin|held_out\.idx|data\.json).*"
    r"|checkpoints|checkpoints/\..*\.partial"
)


def train_model(
    settings: TrainSettings,
    texts: Sequence[Path],
    out: Path,
    *,
    held_out_file: Path | None = None,
    device: str | torch.device | None = None,
    report: Report | None = None,
    on_step: OnStep | None = None,
    save: Path | None = None,
) -> TrainResult:
    """Trains a new model on the text of files and folders and leaves the run in the folder `out`.

    Args:
        settings: sizes, recipe and rhythm; a dtype of "auto" is bf16 on a GPU that has it.
        texts: text files, taken as bytes, and folders of them (see `find_text`).
        out: the folder of the run; made, and refused when something else is in it.
        held_out_file: text to evaluate on instead of the end of `texts`.
        device: None means a CUDA GPU if there is one, else the CPU.
        report: what shows the progress; None shows nothing.
        on_step: told of each step; when it returns True the run saves and stops, as on Ctrl-C.
        save: a .pth or .safetensors file for the model at the end, under the official names.

    Raises:
        ValueError: unusable text, settings, device or folder, before anything is written.
        RunIsBusyError: another process is training in `out`.
        OSError: a file could not be written; earlier checkpoints are whole.
        TrainingDivergedError: NaN or infinity; the last good checkpoint stays.
    """
    crew = Crew()

    def begin() -> _Beginning:
        return _new_model(settings, choose_device(device), find_text(texts, exclude=out), crew.size)

    begun = crew.together(begin)
    return begun.run(crew, out, held_out_file, report, on_step, save)


def tune_model(
    base: Path,
    given: Mapping[str, Any],
    texts: Sequence[Path],
    out: Path,
    *,
    held_out_file: Path | None = None,
    device: str | torch.device | None = None,
    report: Report | None = None,
    on_step: OnStep | None = None,
    save: Path | None = None,
) -> TrainResult:
    """Goes on from a model that exists: all of it, its initial states, or adapters are trained.

    Args:
        base: an official checkpoint (.pth, .safetensors), or the folder of a run.
        given: settings by name; the others are the model's own sizes and the rates of
            `tuning_settings`.
        save: a .pth or .safetensors file for the result at the end: the model, adapters merged
            into it, or the states.
        texts, out, held_out_file, device, report, on_step: as for `train_model`.

    A finished run of states leaves state.pth and state.safetensors in `out`, one of adapters
    adapter/ and merged.safetensors.

    Raises what `train_model` and `rwkv7.weights.load_model` raise; ValueError too for sizes that
    are not the model's.
    """
    crew = Crew()

    def begin() -> _Beginning:
        text = find_text(texts, exclude=out)
        return _tuned_model(base, given, choose_device(device), text, crew.size)

    begun = crew.together(begin)
    return begun.run(crew, out, held_out_file, report, on_step, save)


def plan_training(
    given: Mapping[str, Any],
    texts: Sequence[Path],
    *,
    base: Path | None = None,
    held_out_file: Path | None = None,
    device: str | torch.device | None = None,
) -> Plan:
    """What a run with these settings would take; writes nothing.

    Args: as for `tune_model`, or, where `base` is None, for a new model.

    Raises what `train_model` and `tune_model` raise before they write anything.
    """
    device, text = choose_device(device), find_text(texts)
    if base is None:
        begin = _new_model(TrainSettings.from_dict(given), device, text)
    else:
        begin = _tuned_model(base, given, device, text)
    settings = begin.settings
    tokenizer, bad = get_tokenizer(settings.tokenizer), BadRecords(settings.on_bad)
    if settings.chat:
        tokens = count_chat_tokens(text, tokenizer, bad)
    else:
        apart = find_text([held_out_file]) if held_out_file else None
        tokens = count_tokens(text, tokenizer, settings.held_out, apart, key=settings.key, bad=bad)
        row = settings.sequence or settings.window
        make_order(settings.order, tokens, row, settings.seed)  # refuses what is too little
    plan = make_plan(settings, begin.parameters, begin.make, device, tokens)
    return replace(plan, bad_records=bad.count)


def resume_training(
    out: Path,
    changes: Mapping[str, Any] | None = None,
    texts: Sequence[Path] = (),
    *,
    held_out_file: Path | None = None,
    device: str | torch.device | None = None,
    report: Report | None = None,
    on_step: OnStep | None = None,
    save: Path | None = None,
    base: Path | None = None,
) -> TrainResult:
    """Goes on with the run in `out` from its newest whole checkpoint, as if it had never stopped.

    Args:
        out: the folder that `train_model` wrote.
        changes: settings by name. Those of `FREE_ON_RESUME` may differ from the run's.
        texts: not needed, the run has its tokens; when given, they must be the text of the run.
        base: where the model that the run tunes is now, if not where it was.
        held_out_file, device, report, on_step, save: as for `tune_model`.

    Raises what `train_model` raises; ValueError too when there is no checkpoint, when a change
    would make it another run, or when the text is not the same.
    """
    crew = Crew()
    own = crew.together(lambda: choose_device(device))

    def check() -> None:
        if not out.is_dir():
            raise ValueError(f"{out}: there is no such folder, so no run to go on with")
        _check_save(save)

    def load() -> tuple[TrainSettings, TokenData | ChatData, Checkpoint, Tuning, AdamW]:
        checkpoint = newest_checkpoint(out)
        if checkpoint is None:
            nothing = "there is no whole checkpoint to go on from; begin a new run"
            raise ValueError(f"{out}: {newest_trouble(out) or nothing}")
        settings = resumed_settings(checkpoint.settings, changes or {})
        check_team(settings, crew.size)
        data = (open_chat if settings.chat else open_data)(out / "data")
        if texts and crew.first:
            _check_same_text(data, texts, held_out_file, out, settings)
        place = weights_place(settings.parallel, crew.size, own)
        return settings, data, checkpoint, *load_checkpoint(checkpoint, place, base)

    crew.on_first(check)
    with _held(crew, lambda: run_lock(out)):
        crew.on_first(lambda: join_checkpoint(out))
        settings, data, checkpoint, tuning, optimizer = crew.together(load)
        team = Team(crew, settings, own, tuning, optimizer)
        heard = crew.together(lambda: _heard(crew, report, settings, out))
        _note_differences(checkpoint, tuning.model, heard)
        if trouble := newest_trouble(out):
            heard.note(f"goes on from step {checkpoint.step}: {trouble}")
        run = crew.together(lambda: Run(out, settings, data, tuning, team, checkpoint.step))
        return _finish(run, heard, on_step, save)


@dataclass(frozen=True, slots=True)
class _Beginning:
    """What a run begins with: `make` gives the model, which has so many parameters."""

    settings: TrainSettings
    device: torch.device
    text: Text
    make: Callable[[], Tuning]
    parameters: int

    def run(
        self,
        crew: Crew,
        out: Path,
        held_out_file: Path | None,
        report: Report | None,
        on_step: OnStep | None,
        save: Path | None,
    ) -> TrainResult:
        """Prepares the text, makes the model, and trains."""
        settings = self.settings

        def check() -> Text | None:
            _check_save(save)
            check_model_fits(settings, self.parameters, self.device)
            return find_text([held_out_file]) if held_out_file else None

        def prepare(held_out_text: Text | None) -> TokenData | ChatData:
            tokenizer, folder = get_tokenizer(settings.tokenizer), out / "data"
            bad = BadRecords(settings.on_bad, heard.note)
            found = self.text, folder, tokenizer, settings.held_out, held_out_text
            if settings.chat:
                return prepare_chat(*found, bad=bad)
            return prepare_data(*found, key=settings.key, bad=bad)

        def make() -> tuple[TokenData | ChatData, Tuning, AdamW]:
            data = prepared or (open_chat if settings.chat else open_data)(out / "data")
            tuning = self.make()
            most = settings.batch * (settings.sequence or settings.window)
            if isinstance(data, ChatData):  # which goes through each conversation once
                most = min(most, len(data.documents.tokens.tokens))
            check_step_fits(tuning, settings, self.device, most, crew.size)
            return data, tuning, make_optimizer(tuning.trained, settings)

        held_out_text = crew.on_first(check)
        heard = crew.together(lambda: _heard(crew, report, settings, out))
        with _held(crew, lambda: _new_run(out)):
            prepared = crew.on_first(lambda: prepare(held_out_text))
            data, tuning, optimizer = crew.together(make)
            team = Team(crew, settings, self.device, tuning, optimizer)
            run = crew.together(lambda: Run(out, settings, data, tuning, team))
            # A checkpoint of no steps shows a full disk at once, and a kill always finds one.
            team.save(out, 0)
            team.join(out)
            return _finish(run, heard, on_step, save)


def _new_model(
    settings: TrainSettings, device: torch.device, text: Text, processes: int = 1
) -> _Beginning:
    settings = _with_dtype(settings, device)
    check_team(settings, processes)
    if settings.tune != "full":
        raise ValueError(
            f"tune: {settings.tune!r} is for a model that exists; say which with --from"
        )
    config = ModelConfig.from_sizes(
        vocab_size=get_tokenizer(settings.tokenizer).vocab_size,
        width=settings.width,
        layers=settings.layers,
        head_size=settings.head_size,
    )
    place = weights_place(settings.parallel, processes, device)

    def make() -> Tuning:
        model = RWKV7(config, dtype=torch.float32, device="meta").to_empty(device=place)
        initialise_(model, torch.Generator().manual_seed(settings.seed))
        return Tuning(model)

    return _Beginning(settings, device, text, make, parameter_count(config))


def _tuned_model(
    base: Path, given: Mapping[str, Any], device: torch.device, text: Text, processes: int = 1
) -> _Beginning:
    known = {name: given[name] for name in ("tune", "dtype", "parallel") if name in given}
    auto = _with_dtype(TrainSettings(**known), device)
    place = weights_place(auto.parallel, processes, device)
    model, origin = open_base(base, place, weights_dtype(auto))
    settings = _with_dtype(tuning_settings(given, model.config), device)
    check_team(settings, processes)
    parameters = sum(x.numel() for x in model.parameters())

    def make() -> Tuning:
        return make_tuning(settings, model, origin)

    return _Beginning(settings, device, text, make, parameters)


def _finish(run: Run, report: Report, on_step: OnStep | None, save: Path | None) -> TrainResult:
    """Has the run go on, and leaves its result where it is wanted."""
    result = run.go_on(report, on_step)

    def write() -> None:
        tuning = run.tuning
        if run.team.sharded:  # the checkpoint has what no process has all of
            checkpoint = newest_checkpoint(run.out)
            assert checkpoint is not None
            tuning, _ = load_checkpoint(checkpoint, torch.device("cpu"))
        for path in tuning.finish(run.out):
            report.note(f"written: {path}")
        if save is not None:
            tuning.export(save)
            report.note(f"written: {save}")

    if result.finished:
        run.crew.on_first(write)
    return result


@contextmanager
def _held(
    crew: Crew, hold: Callable[[], contextlib.AbstractContextManager[None]]
) -> Iterator[None]:
    """Inside, the first process holds it; what keeps it from doing so, all are told."""
    with contextlib.ExitStack() as stack:
        crew.on_first(lambda: stack.enter_context(hold()))
        yield


def _heard(crew: Crew, report: Report | None, settings: TrainSettings, out: Path) -> Report:
    """What hears of the run in this process."""
    if report is None or not crew.first:
        report = Report()
    if not (settings.tensorboard and crew.first):
        return report
    from .watch.board import BoardReport  # loads the package tensorboard

    return ReportToAll(report, BoardReport(out / "tensorboard"))


def _check_save(save: Path | None) -> None:
    if save is None:
        return
    if save.suffix not in (".pth", ".safetensors"):
        raise ValueError(f"save: expected a name in .pth or .safetensors, found {save.name}")
    check_destination(save)


def choose_device(device: str | torch.device | None) -> torch.device:
    """The device to train on: the one asked for, else a CUDA GPU, else the CPU.

    Raises ValueError for one that torch does not know or this machine does not have.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device: this machine cannot use {str(device)!r}: {reason}") from error
    return found


def _with_dtype(settings: TrainSettings, device: torch.device) -> TrainSettings:
    if settings.dtype != "auto":
        return settings
    able = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return replace(settings, dtype="bf16" if able else "fp32")


@contextmanager
def _new_run(out: Path) -> Iterator[None]:
    """Holds the folder for a run that begins. One that fails at once leaves nothing behind."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: expected a folder, found the file {out}")
    out.mkdir(parents=True, exist_ok=True)
    try:
        with run_lock(out):
            _check_free(out)
            try:
                yield
            except BaseException:
                if newest_checkpoint(out) is None:
                    for name in ("data", "checkpoints"):
                        shutil.rmtree(out / name, ignore_errors=True)
                raise
    except BaseException:
        with contextlib.suppress(OSError):  # raised where something is in it
            out.rmdir()
        raise


def _check_free(out: Path) -> None:
    """Refuses a folder in which there is more than a start that was killed may have left."""
    if (checkpoint := newest_checkpoint(out)) is not None:
        raise ValueError(
            f"{out}: holds a run of {checkpoint.step} steps. Go on with it (--resume), or choose "
            "another folder"
        )
    found = [p for folder in (out, out / "data", out / "checkpoints") for p in folder.glob("*")]
    names = [p.relative_to(out).as_posix() for p in found]
    foreign = sorted(name for name in names if not _LEFTOVER.fullmatch(name))
    if foreign:
        raise ValueError(
            f"{out}: expected an empty or new folder for the run, found {', '.join(foreign[:3])}"
        )


def _check_same_text(
    data: TokenData | ChatData,
    texts: Sequence[Path],
    held_out_file: Path | None,
    out: Path,
    settings: TrainSettings,
) -> None:
    text = find_text(texts, exclude=out)
    held_out_text = find_text([held_out_file]) if held_out_file else None
    if isinstance(data, ChatData):
        digest = chat_digest(text, held_out_text)
    else:
        digest = text_digest(text, held_out_text, key=settings.key, on_bad=settings.on_bad)
    if digest != data.info.sha256:
        raise ValueError(
            "text: this is not the text that the run was begun with. Leave it out to go on with "
            "the run's own copy, or begin a new run in another folder"
        )


def _note_differences(checkpoint: Checkpoint, model: RWKV7, report: Report) -> None:
    now = machine(model)
    changed = [
        f"{name} {was} then, {now[name]} now"
        for name, was in checkpoint.machine.items()
        if now.get(name) != was
    ]
    if changed:
        report.note(
            f"goes on from step {checkpoint.step}, though not bit for bit as without the stop: "
            + "; ".join(changed)
        )
