"""The source files of the project as syntax trees: imports with file and line, the room of a module, circles, identifiers.

A module is a dotted name such as `specl.shared.engine.decode`. A room is what the ordered list of layers in test_architecture.py
names: a folder or a file of `shared`, a daemon's folder, `daemons` (what daemons share), `cli`, `configs`, or `specl` itself.
"""

import ast
import io
import tokenize
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"shared": "specl.shared", "daemons": "specl.daemons", "cli": "specl.cli", "configs": "specl.configs"}
FILES = sorted(path for folder in PACKAGES for path in (ROOT / folder).rglob("*.py"))
TEST_FILES = sorted((ROOT / "tests").rglob("*.py"))
EXAMPLES = sorted((ROOT / "examples").rglob("*.py"))


@dataclass(frozen=True, slots=True)
class Import:
    """One import statement's way to one module. `for_types`: it stands under `if TYPE_CHECKING`."""

    file: str
    line: int
    importer: str
    module: str
    for_types: bool

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.module}"


def name(path: Path) -> str:
    """The path within the project."""
    return str(path.relative_to(ROOT))


@cache
def tree(path: Path) -> ast.Module:
    """Its syntax tree."""
    return ast.parse(path.read_text(encoding="utf-8"))


def module_of(path: Path) -> str:
    """The dotted name under which a file is imported."""
    folder, *rest = path.relative_to(ROOT).with_suffix("").parts
    if (folder, *rest) == ("shared", "root", "__init__"):
        return "specl"
    return ".".join((PACKAGES[folder], *(part for part in rest if part != "__init__")))


def room(module: str) -> str:
    """The room of one of our modules."""
    parts = module.split(".")
    if parts[:2] == ["specl", "shared"]:
        return parts[2] if len(parts) > 2 else "shared"
    if parts[:2] == ["specl", "daemons"]:
        return (
            ".".join(parts[1:3]) if (ROOT / "daemons" / "".join(parts[2:3])).is_dir() and len(parts) > 2 else "daemons"
        )
    return parts[1] if len(parts) > 1 else "specl"


def _imports_in(path: Path) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Every import statement, those within functions too, and whether it is for types only."""
    for_types = {
        child
        for node in ast.walk(tree(path))
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for part in node.body
        for child in ast.walk(part)
    }
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node, node in for_types


def _modules_of(node: ast.Import | ast.ImportFrom, importer: str, path: Path) -> Iterator[str]:
    """The modules that a statement names; of `from package import name` the submodule, where there is one."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
        return
    base = node.module or ""
    if node.level:
        package = importer if path.name == "__init__.py" else importer.rpartition(".")[0]
        parents = package.split(".")[: len(package.split(".")) - node.level + 1]
        base = ".".join([*parents, base]).rstrip(".")
    for alias in node.names:
        yield f"{base}.{alias.name}" if f"{base}.{alias.name}" in modules() else base


@cache
def modules() -> dict[str, Path]:
    """Our modules and their files."""
    return {module_of(path): path for path in FILES}


@cache
def imports() -> tuple[Import, ...]:
    """Every import of every file under shared, daemons and cli, of our modules and of libraries."""
    return tuple(
        Import(name(path), node.lineno, importer, module, for_types)
        for importer, path in modules().items()
        for node, for_types in _imports_in(path)
        for module in dict.fromkeys(_modules_of(node, importer, path))
    )


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """The strongly connected parts of more than one node, each sorted (Tarjan)."""
    index: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    parts: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = lowest[node] = len(index)
        stack.append(node)
        for target in sorted(arrows.get(node, ())):
            if target not in index:
                visit(target)
                lowest[node] = min(lowest[node], lowest[target])
            elif target in stack:
                lowest[node] = min(lowest[node], index[target])
        if lowest[node] == index[node]:
            part = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(part) > 1:
                parts.append(sorted(part))

    for node in sorted(arrows):
        if node not in index:
            visit(node)
    return parts


@cache
def identifiers(path: Path) -> Counter[str]:
    """Every NAME token of a file, and how often it stands there."""
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline)
    return Counter(token.string for token in tokens if token.type == tokenize.NAME)


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function and method of a file."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def names_of(module: str) -> set[str]:
    """What a module defines or imports at its top level, and its submodules."""
    names = {other.removeprefix(f"{module}.") for other in modules() if other.startswith(f"{module}.")}
    for node in ast.walk(tree(modules()[module])):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def missing_names(path: Path) -> list[str]:
    """Imports of our names, in a file outside the package, that lead nowhere."""
    missing = []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "specl":
            known = names_of(node.module) if node.module in modules() else set()
            missing += [
                f"{name(path)}:{node.lineno} {node.module}.{alias.name}"
                for alias in node.names
                if alias.name not in known
            ]
        elif isinstance(node, ast.Import):
            ours = [alias.name for alias in node.names if alias.name.split(".")[0] == "specl"]
            missing += [f"{name(path)}:{node.lineno} {module}" for module in ours if module not in modules()]
    return missing
