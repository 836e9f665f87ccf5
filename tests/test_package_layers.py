"""The folders of the package are layers: none imports from one above it."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "lorapre_jax"
# From the lowest up; an optimizer is a module beside them.
LAYERS = ("_numerics", "_trees", "_moments", "_leaves", "optimizers", "_state")


def layer(name: str) -> int:
    return LAYERS.index(name if name in LAYERS else "optimizers")


def imported(path: Path) -> list[str]:
    """Returns the parts of the package that a module imports from."""
    nodes = ast.walk(ast.parse(path.read_text()))
    modules = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    parts = (module.split(".") for module in modules)
    return [part[1] for part in parts if part[0] == "lorapre_jax" and part[1:]]


def test_no_module_imports_upwards():
    checked = 0
    for path in PACKAGE.rglob("*.py"):
        own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        for name in imported(path):
            assert layer(name) <= layer(own), f"{path} imports from {name}"
            checked += 1
    assert checked > 80
