"""What a reader may count on in every file: short, typed, documented, and saying what it is."""

import ast
import statistics

import pytest
from source.reading import inside, modules

LONGEST_FILE = 500
MEDIAN_FILE = 180
LONGEST_FUNCTION = 60  # without its docstring
MOST_PARAMETERS = 10
# Mirrors of other projects' functions keep their originals' parameters.
MIRRORS = "rwkv7.compat"

MODULES = modules()
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)


def functions(name):
    """All functions and methods; GPU kernels, one straight block of tile code, are left out."""
    if "kernels" in name.split("."):
        return []
    return [node for node in ast.walk(TREES[name]) if isinstance(node, FUNCTION)]


def public_functions(name):
    """(function, its class or None) for module functions and methods of public classes."""
    if "kernels" in name.split("."):
        return
    classes = [node for node in ast.walk(TREES[name]) if isinstance(node, ast.ClassDef)]
    for holder in [TREES[name], *classes]:
        owner = None if holder is TREES[name] else holder
        if owner and owner.name.startswith("_"):
            continue
        for node in holder.body:
            if isinstance(node, FUNCTION) and not node.name.startswith("_"):
                yield node, owner


def documented_methods():
    """Names that some class documents: a method that overrides it need not say it again."""
    return {
        method.name
        for name in MODULES
        for method, owner in public_functions(name)
        if owner and ast.get_docstring(method)
    }


def is_documented(function, owner, overridden):
    if ast.get_docstring(function):
        return True
    if owner is None:
        return False
    # What a protocol's members mean is told in its own docstring.
    is_stub = ast.unparse(function.body[-1]) == "..." and bool(ast.get_docstring(owner))
    return is_stub or (bool(owner.bases) and function.name in overridden)


def length(function):
    """Lines of a function, its docstring not counted: an operator's contract is long."""
    lines = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function):
        lines -= function.body[0].end_lineno - function.body[0].lineno + 1
    return lines


def parameters(function):
    arguments = function.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return [argument for argument in every if argument.arg not in ("self", "cls")]


@pytest.mark.parametrize("name", MODULES)
def test_a_file_is_short_and_opens_with_what_it_is(name):
    assert MODULES[name].read_text(encoding="utf-8").count("\n") <= LONGEST_FILE
    if MODULES[name].name != "__init__.py":
        assert ast.get_docstring(TREES[name])
    long = {f.name: length(f) for f in functions(name) if length(f) > LONGEST_FUNCTION}
    assert not long


@pytest.mark.parametrize("name", MODULES)
def test_public_functions_are_documented_and_typed(name):
    overridden = documented_methods()
    for function, owner in public_functions(name):
        where = f"{name}.{function.name}"
        assert is_documented(function, owner, overridden), f"{where}: no docstring"
        assert function.returns is not None, f"{where}: its result is not typed"
        untyped = [p.arg for p in parameters(function) if p.annotation is None]
        assert not untyped, f"{where}: not typed"
        assert function.args.kwarg is None, f"{where}: takes any keyword"
        if not inside(name, MIRRORS):
            assert len(parameters(function)) <= MOST_PARAMETERS, f"{where}: too many parameters"


def test_most_files_are_short():
    sizes = [
        path.read_text(encoding="utf-8").count("\n")
        for path in MODULES.values()
        if path.name != "__init__.py"
    ]
    assert statistics.median(sizes) <= MEDIAN_FILE
