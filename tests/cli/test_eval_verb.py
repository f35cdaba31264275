"""`rwkv7 eval`: a table, the same figures as JSON, and mistakes in one line."""

from __future__ import annotations

import json
import re
import sys

import pytest
from talking_model import REFRAIN, talking_model

from rwkv7.cli import main
from rwkv7.evaluation import harness
from rwkv7.weights import save_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "talking.safetensors"
    save_model(talking_model(), path)
    return path


@pytest.fixture
def evaluated(checkpoint, capfd, tmp_path):
    """Evaluate these files: (exit code, stdout, stderr)."""
    (tmp_path / "text.txt").write_bytes(REFRAIN * 20)
    (tmp_path / "words.jsonl").write_text('{"text": "what is a"}\n{"text": "so it is"}\n')
    question = {"context": "a", "choices": ["é", "zz"], "answer": 0}
    (tmp_path / "questions.jsonl").write_text(json.dumps(question))
    (tmp_path / "wrong.jsonl").write_text('{"text": "what is a"}\n{"text": 3}\n')

    def run(*names, options=()):
        paths = [str(tmp_path / name) for name in names]
        with pytest.raises(SystemExit) as ended:
            main(["eval", str(checkpoint), *paths, "--device", "cpu", *options])
        out, err = capfd.readouterr()
        return ended.value.code or 0, out, err

    return run


def test_a_table_and_json(evaluated, tmp_path):
    names = ("text.txt", "words.jsonl", "questions.jsonl")
    code, out, _ = evaluated(*names, options=("--json", str(tmp_path / "out.json")))
    assert code == 0
    assert all(name in out for name in names)
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    text, words, questions = results
    assert text["kind"] == "text"
    assert text["bits_per_byte"] < 4
    assert words["texts"] == 2
    assert (questions["accuracy"], questions["questions"]) == (1.0, 1)


def test_a_bar_grows_on_a_terminal_and_nowhere_else(evaluated, monkeypatch):
    names = ("text.txt", "words.jsonl", "questions.jsonl")
    counts = (len(REFRAIN) * 20 - 1, 2, 2)
    quiet = evaluated(*names)[2]
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    code, _, err = evaluated(*names)
    assert code == 0
    for name, count in zip(names, counts, strict=True):
        assert re.search(rf"{name}.*{count}/{count}", err)
        assert f"{count}/{count}" not in quiet


@pytest.mark.parametrize(
    ("names", "line"),
    [
        (("text.txt", "none.txt"), "none.txt: No such file"),
        (("wrong.jsonl",), 'wrong.jsonl, line 2: "text" should be a text'),
    ],
)
def test_mistakes_are_one_line(evaluated, names, line):
    code, out, err = evaluated(*names)
    assert (code, out) == (2, "")
    assert line in err.splitlines()[-1]


def test_tasks_of_the_harness_stand_beside_files(evaluated, monkeypatch, tmp_path):
    asked = {}

    class Answers:
        def __init__(self, tasks, **options):
            asked.update(options, tasks=tasks)

        def evaluate(self, model, tokenizer):
            figures = {"kind": "harness", "acc": 0.25, "questions": 4}
            return [{"task": task, **figures} for task in asked["tasks"]]

    monkeypatch.setattr(harness, "HarnessTasks", Answers)
    options = ("--harness", "piqa, arc_easy", "--shots", "2", "--limit", "4")
    code, out, _ = evaluated("text.txt", options=(*options, "--json", str(tmp_path / "out.json")))
    assert code == 0
    assert all(name in out for name in ("text.txt", "piqa", "arc_easy", "acc 0.25"))
    assert asked == {"tasks": ["piqa", "arc_easy"], "shots": 2, "limit": 4, "folder": None}
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert [result.get("task") for result in results] == [None, "piqa", "arc_easy"]


def test_without_the_harness_its_extra_is_named(evaluated, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)
    code, out, err = evaluated(options=("--harness", "piqa"))
    assert (code, out) == (2, "")
    assert 'pip install "rwkv7[harness]"' in err.splitlines()[-1]


@pytest.mark.parametrize("option", [("--shots", "0"), ("--limit", "3"), ("--task-folder", ".")])
def test_an_option_of_the_harness_needs_its_tasks(evaluated, option):
    code, out, err = evaluated("text.txt", options=option)
    assert (code, out) == (2, "")
    assert err == f"error: {option[0]}: expected --harness beside it, found none\n"


def test_nothing_to_measure(evaluated):
    code, _, err = evaluated()
    assert code == 2
    assert "expected a file, or --harness with a task" in err.splitlines()[-1]
