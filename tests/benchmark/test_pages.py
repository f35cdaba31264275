"""Results of benchmark scripts become a page, whatever else lies among them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rwkv7.benchmark import results_in, update_tables
from rwkv7.benchmark.document import BEGIN_SCRIPTS, END
from rwkv7.benchmark.pages import run_tables, runs_in
from rwkv7.benchmark.record import Record

CARD = "NVIDIA H100"


def leave(folder: Path, date: str, parts: list[dict[str, Any]], **changes: Any) -> Path:
    machine = {"torch": "2.11.0", "fla-core": "0.6.0", "numpy": "2"}
    run = {
        "benchmark": "speed",
        "about": "Speed of it.",
        "command": f"python speed.py OUT --on {date}",
    }
    run |= {"date": date, "device": CARD, "device_type": "cuda", "threads": 1, "machine": machine}
    run |= {"parts": parts, **changes}
    path = folder / f"{run['benchmark']}-{date}-{len(list(folder.iterdir()))}.json"
    path.write_text(json.dumps(run))
    return path


def page(folder: Path) -> str:
    return "\n\n".join(run_tables(runs_in(folder)))


def test_parts_with_the_same_figures_share_a_table(tmp_path: Path) -> None:
    ours = {"part": "ours", "tokens_per_s": 123456.7, "peak_gib": 3.25, "mfu": 0.4567, "odd": 1}
    fla = {"part": "fla", "tokens_per_s": 61728.0, "peak_gib": None, "mfu": None}
    leave(tmp_path, "2026-01-01", [ours, fla, {"part": "ours / fla", "speed": 2.0}])
    text = page(tmp_path)
    assert text.startswith("## speed\n\nSpeed of it.\n\n")
    assert f"{CARD}, torch 2.11.0, fla-core 0.6.0, 2026-01-01:\n\n" in text
    assert "    python speed.py OUT --on 2026-01-01\n\n" in text
    first = "|  | tokens/s | MFU | peak memory |\n|---|--:|--:|--:|\n"
    assert first + "| ours | 123,457 | 45.7% | 3.25 GiB |\n| fla | 61,728 |  |  |\n\n" in text
    assert text.endswith("|  | speed |\n|---|--:|\n| ours / fla | 2.00x |")


def test_the_newest_of_each_part_with_the_run_it_is_from(tmp_path: Path) -> None:
    leave(tmp_path, "2026-01-02", [{"part": "a", "step_s": 0.2}, {"part": "b", "not_run": "late"}])
    leave(tmp_path, "2026-01-01", [{"part": "a", "step_s": 0.1}, {"part": "b", "step_s": 0.3}])
    leave(tmp_path, "2026-01-01", [{"part": "a", "step_s": 0.4}], device="another")
    text = page(tmp_path)
    assert "| a | 200 ms |" in text and "| b | 300 ms |" in text and "| a | 400 ms |" in text
    assert "100 ms" not in text and text.count("## speed") == 1
    assert text.index("--on 2026-01-02") > text.index("--on 2026-01-01")


def test_threads_of_a_cpu_are_kept_apart_and_those_beside_a_gpu_not(tmp_path: Path) -> None:
    for date, threads in (("2026-01-01", 1), ("2026-01-02", 2)):
        leave(tmp_path, date, [{"part": "a", "step_s": 1.0}], threads=threads)
        leave(tmp_path, date, [{"part": "a", "step_s": 1.0}], threads=threads, device_type="cpu")
    assert len(runs_in(tmp_path)) == 3


def test_what_failed_is_said_and_rows_of_a_part_are_a_table(tmp_path: Path) -> None:
    rows = [{"part": f"place | {i}", "ms": 5.0, "share": 0.5} for i in range(30)]
    failed = [{"part": "large", "out_of_memory": "no room"}, {"part": "odd", "error": "at home"}]
    leave(tmp_path, "2026-01-01", [{"part": "profile", "rows": rows, "step_ms": 1}, *failed])
    text = page(tmp_path)
    assert "large: out of memory." in text and "odd: failed." in text and "at home" not in text
    assert r"| place \| 19 | 5.00 ms | 50.0% |" in text and "place | 20" not in text


def test_a_page_holds_scripts_and_operator_apart(tmp_path: Path) -> None:
    leave(tmp_path, "2026-01-01", [{"part": "a", "step_s": 0.2}])
    document = tmp_path / "measured.md"
    document.write_text(f"before\n{BEGIN_SCRIPTS}\nold\n{END}\nafter\n")
    assert update_tables(document, tmp_path) == 1
    text = document.read_text()
    assert text.startswith(f"before\n{BEGIN_SCRIPTS}\n\n## speed") and text.endswith(
        f"{END}\nafter\n"
    )
    assert "old" not in text
    assert results_in(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("cut.json", '{"benchmark": "speed", "par', "cut.json: not a file of results"),
        ("list.json", "[1]", "list.json: not a file of results"),
        ("deep.json", "[" * 100_000, "deep.json: not a file of results"),
        ("binary.json", b"\xff\xfe\x00", "binary.json: not a file of results"),
        ("short.json", '{"benchmark": "speed", "parts": []}', "short.json: not the whole file"),
    ],
)
def test_a_broken_file_is_named_and_the_page_stays(
    name: str, content: str | bytes, says: str, tmp_path: Path
) -> None:
    leave(tmp_path, "2026-01-01", [{"part": "a", "step_s": 0.2}])
    data = content if isinstance(content, bytes) else content.encode()
    (tmp_path / name).write_bytes(data)
    document = tmp_path / "measured.md"
    before = f"{BEGIN_SCRIPTS}\nold\n{END}\n"
    document.write_text(before)
    with pytest.raises(ValueError, match=says):
        update_tables(document, tmp_path)
    assert document.read_text() == before


def test_figures_of_another_kind_than_their_key_says_are_named(tmp_path: Path) -> None:
    path = leave(tmp_path, "2026-01-01", [{"part": "a", "step_s": "fast"}])
    with pytest.raises(ValueError, match=f"{path.name}: part 'a', step_s"):
        page(tmp_path)


def test_a_record_says_how_it_was_made_and_nothing_of_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = "/home/someone/code/benchmarks/gpu/speed.py"
    monkeypatch.setattr("sys.argv", [script, f"{tmp_path}/", "--parts", "a b"])
    record = Record(tmp_path, "speed", torch.device("cpu"), about="Speed.\nLong.")
    record.keep({"part": "a", "step_s": 0.5})
    (run,) = runs_in(tmp_path)
    assert run["command"] == "python benchmarks/gpu/speed.py OUT --parts 'a b'"
    assert run["about"] == "Speed." and "| a | 500 ms |" in page(tmp_path)
