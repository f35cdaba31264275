"""Tasks of lm-evaluation-harness (PyPI: lm-eval, the extra `harness`), run on a model of ours.

`python -m rwkv7.evaluation.harness` is the harness's own command line, with the model "rwkv7" in
it: --model rwkv7 --model_args path=…,tokenizer=…. Scripts call `register` before `simple_evaluate`.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rwkv7.nn import RWKV7
from rwkv7.tokenizer import Tokenizer

__all__ = ["HarnessTasks", "register"]

_RESAMPLED = 1000  # times, for the standard errors of figures that are not means


def register() -> None:
    """Let the harness know the model "rwkv7"; once is enough.

    Its arguments are `path` (what `load_model` reads), `tokenizer` (as `get_tokenizer` takes it),
    `dtype`, `device`, `slots`, how many texts are written at once, and `template`, of conversations
    (a name in `rwkv7.chat.TEMPLATES`), which --apply_chat_template may name too.

    Raises ValueError where lm-eval is not installed.
    """
    _package("lm_eval")
    import lm_eval.models  # noqa: F401  (else the first name in the table keeps its own out)
    from lm_eval.api.registry import model_registry

    if "rwkv7" not in model_registry:
        model_registry.register("rwkv7", target="rwkv7.evaluation.harness.model:HarnessModel")


class HarnessTasks:
    """Tasks of the harness, found before a model is read.

    Args:
        tasks: names that `lm_eval ls tasks` lists, or of tasks in `folder`.
        shots: examples before each question; None leaves it to the task. With a number the tasks'
            data are looked at here.
        limit: only the first questions of each task, to try something out.
        folder: where more tasks are described, as .yaml files.

    Raises ValueError where lm-eval is not installed, for a task that it does not know, and for one
    that has fewer examples than `shots`.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        shots: int | None = None,
        limit: int | None = None,
        folder: str | os.PathLike[str] | None = None,
    ) -> None:
        self._evaluator = _package("lm_eval.evaluator")
        from lm_eval.tasks import TaskManager

        self._tasks, self._shots, self._limit = list(tasks), shots, limit
        self._manager = TaskManager(include_path=None if folder is None else str(folder))
        if unknown := [task for task in tasks if task not in self._manager.all_tasks]:
            raise ValueError(
                f"harness: no task {unknown[0]!r}; `python -m rwkv7.evaluation.harness ls tasks` "
                "lists those there are"
            )
        if shots:
            self._check_examples(shots)

    def evaluate(self, model: RWKV7, tokenizer: Tokenizer) -> list[dict[str, float | int | str]]:
        """The figures of each task, under the harness's names; "kind" is "harness", "task" its
        name.

        Args:
            model: in evaluation mode; on any device.
            tokenizer: the model's.
        """
        from .model import HarnessModel

        found = self._evaluator.simple_evaluate(
            HarnessModel(model, tokenizer),
            tasks=self._tasks,
            num_fewshot=self._shots,
            limit=self._limit,
            task_manager=self._manager,
            bootstrap_iters=_RESAMPLED,
            log_samples=False,
        )
        return [
            {"task": task, "kind": "harness", **_figures(figures)}
            for task, figures in found["results"].items()
        ]

    def _check_examples(self, shots: int) -> None:
        from lm_eval.tasks import get_task_dict

        for name, task in _leaves(get_task_dict(self._tasks, self._manager)):
            if task.get_config("num_fewshot") == 0:
                continue  # the task's own wish, which the harness keeps to
            split = task.config.fewshot_split
            itself = split is not None and split == task.config.test_split  # no example to itself
            count = sum(1 for _ in task.fewshot_docs() or ()) - itself
            if shots > count:
                raise ValueError(
                    f"shots: expected at most the {count} examples of {name}, found {shots}"
                )


def _leaves(tasks: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    """The tasks, with their names, of a dictionary in which groups are dictionaries."""
    for name, task in tasks.items():
        if isinstance(task, Mapping):
            yield from _leaves(task)
        else:
            yield str(name), task


def _figures(figures: dict[str, Any]) -> dict[str, float | int]:
    """Numbers alone, "acc,none" as "acc": a filter is named where it is one."""
    numbers = {name: x for name, x in figures.items() if isinstance(x, int | float)}
    count = {"questions": numbers.pop("sample_len")} if "sample_len" in numbers else {}
    return {name.removesuffix(",none").replace(",", " "): x for name, x in numbers.items()} | count


def _package(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f'harness: needs the package lm-eval ({error}): run `pip install "rwkv7[harness]"`'
        ) from error
