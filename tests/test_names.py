"""Every name that the code reads exists: what a linter finds, but for jaxtyping's shapes, which it takes for names."""

import ast
import builtins
import importlib
import symtable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = [
    path
    for pattern in ("ldm_jax/**/*.py", "tests/**/*.py", "configs/*.py", "*.py")
    for path in sorted(ROOT.glob(pattern))
]
GIVEN = {"__file__", "__name__", "__doc__", *dir(builtins)}


def undefined(path):
    """The global names that a file reads and does not define."""

    def of(table):
        for symbol in table.get_symbols():
            name = symbol.get_name()
            if symbol.is_global() and symbol.is_referenced() and name not in GIVEN | defined:
                yield name
        for child in table.get_children():
            yield from of(child)

    top = symtable.symtable(path.read_text(), str(path), "exec")
    defined = {s.get_name() for s in top.get_symbols() if s.is_assigned() or s.is_imported()}
    return sorted(set(of(top)))


def modules(tree):
    """Local name -> the module of ours that it stands for."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ldm_jax"):
            package = importlib.import_module(node.module)
            for alias in node.names:
                if not hasattr(package, alias.name):
                    try:
                        importlib.import_module(f"{node.module}.{alias.name}")
                    except ModuleNotFoundError as error:
                        raise AssertionError(f"{node.module} has no {alias.name}") from error
                value = getattr(package, alias.name)
                if isinstance(value, type(ast)):
                    found[alias.asname or alias.name] = value
    return found


def stored(tree):
    """The names that are also variables or parameters somewhere in the file."""
    names = {
        n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
    }
    return names | {n.arg for n in ast.walk(tree) if isinstance(n, ast.arg)}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_name_is_defined(path):
    assert not undefined(path)
    if "parity" in path.parts:  # its modules need torch to be imported
        return
    tree = ast.parse(path.read_text())
    ours = modules(tree)
    for name in stored(tree):
        ours.pop(name, None)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = ours.get(node.value.id)
            assert module is None or hasattr(module, node.attr), (
                f"line {node.lineno}: {module.__name__} has no {node.attr}"
            )
