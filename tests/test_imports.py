"""Imports point one way (CONTRIBUTING.md)."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "vps").rglob("*.py")) + sorted((ROOT / "kernels").rglob("*.py"))

# A module may import those of its own and of lower layers.
LAYERS = [
    {"config", "reference"},
    {"masking", "policy", "selection", "clipping", "matching"},
    {"torch_backend"},
    {"functional"},
    {"linear", "conv1d", "attention_mask"},
    {"patching"},
    {"settings", "generation", "loading", "doctor"},
    {"demo"},
    {"cli"},
]
KNOW_TRANSFORMERS = {"patching", "conv1d", "loading", "cli"}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module == "vps":
                yield from (f"vps.{alias.name}" for alias in node.names)
            else:
                yield node.module


def layer(name):
    return next((level for level, names in enumerate(LAYERS) if name in names), None)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    own = parts[1] if len(parts) > 1 else parts[0]
    for name in imports(path):
        top, _, rest = name.partition(".")
        assert top not in ("kernels", "tests", "benchmarks"), f"{path} imports {name}"
        if top == "triton":
            assert parts[0] == "kernels"
        if top == "transformers":
            assert own in KNOW_TRANSFORMERS, f"{path} imports {name}"
        if top == "vps" and own != "__init__":
            module = rest.split(".")[0]
            if layer(module) is None:  # a public name of vps itself
                assert own == "cli", f"{path} imports {name} through vps"
                continue
            assert layer(module) <= layer(own), f"{path} imports {name}"
            if own in ("config", "reference"):
                raise AssertionError(f"{path} imports {name}")
