"""The library's own source as data for the layout and style tests: modules and what they import."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src"


def modules() -> dict[str, Path]:
    """Every module of the library by its dotted name."""
    named = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        named[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return named


def inside(name: str, *packages: str) -> bool:
    """Whether module `name` is one of `packages` or lies in one."""
    return any(name == package or name.startswith(package + ".") for package in packages)


def imports(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """The modules that `name` imports, wherever in the file: at its top, in a function, by a name
    in a string that `importlib` gets ("package.module" or "package.module:attribute")."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    return {target for node in ast.walk(tree) for target in _targets(node, package, known)}


def _targets(node: ast.AST, package: str, known: dict[str, Path]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            parents = package.split(".")
            base = ".".join([*parents[: len(parents) + 1 - node.level], *filter(None, [base])])
        for alias in node.names:
            # `from package import name` may import a module or something a module holds.
            inner = f"{base}.{alias.name}"
            yield inner if inner in known else base
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        match = re.fullmatch(r"(rwkv7(?:\.\w+)+)(?::\w+)?", node.value)
        if match and match[1] in known:
            yield match[1]
