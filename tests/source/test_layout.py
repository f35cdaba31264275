"""Which part may import which, proved from the source, and what `import rwkv7` loads.

Imports go one way: cli, training, engine -> generate -> nn -> wkv7 -> one backend.
"""

import json
import subprocess
import sys

import pytest
from source.reading import SOURCE, imports, inside, modules

MODULES = modules()
OPERATOR = "rwkv7.wkv7"
BACKENDS = "rwkv7.wkv7.backends"
FILES = "rwkv7.files"  # what is written whole or not at all, for everybody
TEXT = ("rwkv7.tokenizer", "rwkv7.demo_text", "rwkv7.baselines")
# Where a program ends: everything else must work without these.
TOP = (
    "rwkv7.cli",
    "rwkv7.training",
    "rwkv7.generate",
    "rwkv7.engine",
    "rwkv7.chat",
    "rwkv7.evaluation.harness",
)
GENERATION = ("rwkv7.generate", "rwkv7.engine")

EDGES = [
    (name, target)
    for name, path in MODULES.items()
    for target in sorted(imports(name, path, MODULES))
    if inside(target, "rwkv7")
]


def edges_from(*packages):
    return [(name, target) for name, target in EDGES if inside(name, *packages)]


def test_the_operator_stands_alone():
    wrong = [e for e in edges_from(OPERATOR) if not inside(e[1], OPERATOR, FILES)]
    assert not wrong


def test_writing_a_file_needs_nothing_else_of_the_library():
    assert not edges_from(FILES)


def test_a_backend_imports_the_contract_and_its_own_kernels():
    wrong = []
    for name, target in edges_from(BACKENDS):
        own = ".".join(name.split(".")[:4])
        if name == BACKENDS or not inside(target, f"{OPERATOR}.contract", FILES, own):
            wrong.append((name, target))
    assert not wrong


def test_only_the_table_names_backends():
    wrong = [
        (name, target)
        for name, target in EDGES
        if inside(target, BACKENDS) and not inside(name, BACKENDS, f"{OPERATOR}.registry")
    ]
    assert not wrong


def test_every_backend_has_its_line_in_the_table():
    on_disk = {name for name in MODULES if name.count(".") == 3 and inside(name, BACKENDS)}
    in_table = {target for name, target in EDGES if name == f"{OPERATOR}.registry"}
    assert on_disk <= in_table


def test_the_model_sees_only_the_face_of_the_operator():
    model = ("rwkv7.nn", "rwkv7.state", "rwkv7.config", "rwkv7.weights", *TOP[1:])
    wrong = [e for e in edges_from(*model) if inside(e[1], OPERATOR) and e[1] != OPERATOR]
    assert not wrong


def test_nothing_below_reaches_up():
    below = [name for name in MODULES if not inside(name, *TOP, "rwkv7.__main__")]
    wrong = [(name, target) for name, target in EDGES if name in below and inside(target, *TOP)]
    assert not wrong


def test_the_model_and_generation_know_ids_not_text():
    numbers_only = (
        "rwkv7.nn",
        "rwkv7.state",
        "rwkv7.sampling",
        "rwkv7.evaluation.scores",
        *GENERATION,
    )
    wrong = [edge for edge in edges_from(*numbers_only) if inside(edge[1], *TEXT)]
    assert not wrong


def test_training_and_generation_do_not_need_each_other():
    wrong = [e for e in edges_from("rwkv7.training") if inside(e[1], *GENERATION)]
    wrong += [e for e in edges_from(*GENERATION) if inside(e[1], "rwkv7.training")]
    assert not wrong


def test_one_text_needs_no_engine():
    assert not [e for e in edges_from("rwkv7.generate") if inside(e[1], "rwkv7.engine")]


def test_nobody_imports_the_command_line():
    wrong = [e for e in EDGES if inside(e[1], "rwkv7.cli") and not inside(e[0], "rwkv7.cli")]
    assert [name for name, _ in wrong if name != "rwkv7.__main__"] == []


@pytest.mark.parametrize(
    ("line", "target"),
    [
        ("import rwkv7.wkv7.op", "rwkv7.wkv7.op"),
        ("from rwkv7.wkv7 import wkv7", "rwkv7.wkv7"),
        ("from rwkv7.wkv7 import registry", "rwkv7.wkv7.registry"),
        ("from .contract import Call", "rwkv7.wkv7.contract"),
        ("from .. import wkv7", "rwkv7.wkv7"),
        ("def f():\n    from .backends import reference", "rwkv7.wkv7.backends.reference"),
        ("x = 'rwkv7.wkv7.backends.reference:Backend'", "rwkv7.wkv7.backends.reference"),
    ],
)
def test_the_reader_of_imports_sees_every_kind(tmp_path, line, target):
    module = tmp_path / "module.py"
    module.write_text(line)
    assert imports("rwkv7.wkv7.module", module, MODULES) == {target}


def test_import_loads_torch_and_nothing_heavier():
    program = (
        "import json, sys, torch; before = set(sys.modules); import rwkv7;"
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=SOURCE
    )
    loaded = json.loads(result.stdout)
    assert "rwkv7.wkv7.op" in loaded
    outside = {name.partition(".")[0] for name in loaded} - sys.stdlib_module_names
    assert outside <= {"rwkv7", "torch", "numpy", "safetensors"}
    compilers = [m for m in loaded if inside(m, "torch._dynamo", "torch._inductor")]
    assert not compilers
    # A backend, the command line and training are loaded when first used.
    assert not [m for m in loaded if inside(m, "rwkv7.cli", "rwkv7.training")]
    assert not [m for m in loaded if inside(m, BACKENDS)]
