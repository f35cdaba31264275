"""The examples run, and what they print is what their texts promise."""

import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def differences(printed):
    return [float(number) for number in re.findall(r"by (\d\.\de[+-]\d+)", printed)]


def run(name, capsys, **replaced):
    runpy.run_path(str(EXAMPLES / f"{name}.py"), {})["main"](**replaced)
    return capsys.readouterr().out


def test_operator_state(capsys):
    *handed_over, forgotten = differences(run("operator_state", capsys))
    assert len(handed_over) == 9  # y, the final state, and seven gradients
    assert max(handed_over) < 1e-5
    assert forgotten > 0.1


def test_moving_over(capsys):
    *equal, y_wrong, state_wrong = differences(run("moving_over", capsys))
    assert len(equal) == 4
    assert max(equal) < 1e-5
    assert min(y_wrong, state_wrong) > 0.1


def test_tiny_model(capsys):
    printed = run("tiny_model", capsys, steps=3)
    assert "the same as one uninterrupted text: True" in printed


def test_recall_across_windows(capsys, tmp_path):
    image = tmp_path / "recall.png"
    printed = run("recall_across_windows", capsys, steps=2, image=image)
    assert re.search(r"state carried, exact gradient +\d+\.\d% of the answers", printed)
    assert re.search(r"chance +12\.5%", printed)
    assert image.read_bytes().startswith(b"\x89PNG")


def test_only_the_exact_gradient_teaches_recall():
    train = runpy.run_path(str(EXAMPLES / "recall_across_windows.py"))["train"]
    sizes = {"KEYS": 1, "VALUES": 4, "NOISE": 2, "WINDOW": 2, "WINDOWS": 5}
    train.__globals__.update(sizes, LAST=8, VOCABULARY=7)
    right = {mode: train(mode, 20)[-1][1] for mode in ("off", "truncated", "exact")}
    assert right["exact"] > 0.9
    assert max(right["off"], right["truncated"]) < 0.5  # chance is 0.25


def test_pretrain_from_zero(capsys):
    printed = run("pretrain_from_zero", capsys, steps=4)
    assert "step 2 writes: 'And the " in printed
    assert "checkpoints, data, log.jsonl, loss.png, samples.txt" in printed


def test_continue_checkpoint(capsys):
    printed = run("continue_checkpoint", capsys, steps=3)
    assert "the same names and shapes: True torch.bfloat16" in printed


def test_state_tuning(capsys):
    printed = run("state_tuning", capsys, steps=12)
    assert "the model is untouched: True" in printed
    before, after = re.search(r"loss on the answer: (\S+) before, (\S+) after", printed).groups()
    assert float(after) < float(before)


def test_classify_series(capsys):
    printed = run("classify_series", capsys, steps=30)
    assert int(re.search(r"told right: (\d+)%", printed)[1]) >= 80
    (difference,) = differences(printed)
    assert difference < 1e-3


def test_context_parallel(capsys):
    state, gradient = differences(run("context_parallel", capsys))
    assert state < 1e-5 and gradient < 1e-4


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_is_a_script_that_says_what_it_shows(path):
    text = path.read_text(encoding="utf-8")
    assert text.startswith('"""')
    assert f"python examples/{path.name}" in text
