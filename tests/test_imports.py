"""Imports point one way (CONTRIBUTING.md), and importing vps is light and fast."""

import ast
from pathlib import Path

import pytest
from processes import python

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "vps").rglob("*.py")) + sorted((ROOT / "kernels").rglob("*.py"))

# A room, a module or a folder of vps, may import those of its own level and of those above it here.
LEVELS = [
    {"reading", "packing", "constants"},
    {"config", "reference", "masking", "files", "verify"},
    {"algorithm", "kernels"},
    {"backends"},
    {"functional", "coupled", "doctor"},
    {"layers"},
    {"model"},
    {"refine", "evaluation", "serving"},
    {"fitting"},
    {"cli"},
]
KNOW_TRANSFORMERS = {"layers", "model", "evaluation", "cli"}

# Imported inside functions only: importing vps loads none of them.
OPTIONAL = {
    "transformers",
    "gguf",
    "tqdm",
    "matplotlib",
    "sympy",
    "latex2sympy2_extended",
    "math_verify",
    "pint",
    "scipy",
    "peft",
    "bitsandbytes",
    "torchao",
    "accelerate",
    "lm_eval",
    "reasoning_gym",
    "datasets",
    "yaml",
    "vllm",
    "rich",
    "jinja2",
}
# Subclasses a class of transformers, so imported inside functions only itself.
NEEDS_TRANSFORMERS = {"layers.conv1d"}
# Imported by the worker process of verify alone.
NEEDS_SYMPY = {"verify.symbolic"}
# Subclasses classes of vLLM, which imports them by their names.
NEEDS_VLLM = {"plugin", "linear_method", "scheduler"}


def named(node):
    """Full names imported by a statement; none for any other statement."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"relative import in line {node.lineno}"
        if node.module.split(".")[0] == "vps":
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        else:
            yield node.module


def imports(tree):
    """All imports of a module, wherever they stand."""
    for node in ast.walk(tree):
        yield from named(node)


def eager_imports(node):
    """Those that run when the module is imported."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield from named(child)
        yield from eager_imports(child)


def noun(path):
    """The module or subpackage of vps that a file belongs to; kernels/ is vps.kernels."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return "kernels" if parts[0] == "kernels" else parts[1]


def needs_vllm(path):
    return noun(path) == "serving" and path.stem in NEEDS_VLLM


def level(name):
    return next((at for at, names in enumerate(LEVELS) if name in names), None)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    own = noun(path)
    assert own == "__init__" or level(own) is not None, f"{own} has no place in LEVELS"
    for name in imports(ast.parse(path.read_text())):
        top, _, rest = name.partition(".")
        assert top not in ("kernels", "tests", "benchmarks"), f"{path} imports {name}"
        assert top != "triton" or own == "kernels", f"{path} imports {name}"
        assert top != "transformers" or own in KNOW_TRANSFORMERS, f"{path} imports {name}"
        assert top != "vllm" or needs_vllm(path), f"{path} imports {name}"
        if top != "vps" or own == "__init__":
            continue
        module = rest.split(".")[0]
        assert own != "reference" and (own != "config" or module == "reading"), (
            f"{path} imports {name}"
        )
        if level(module) is None:  # a public name of vps itself
            assert own == "cli", f"{path} imports {name} through vps"
        else:
            assert level(module) <= level(own), f"{path} imports {name}"
            assert own != "kernels" or module == "kernels", f"{path} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_optional_packages_are_imported_late(path):
    if path.stem in ("conv1d", "symbolic") or needs_vllm(path):
        return
    for name in eager_imports(ast.parse(path.read_text())):
        assert name.split(".")[0] not in OPTIONAL, f"{path} imports {name} when it is imported"
        late = {f"vps.{module}" for module in NEEDS_TRANSFORMERS | NEEDS_SYMPY}
        late |= {f"vps.serving.{module}" for module in NEEDS_VLLM}
        assert not any(name == each or name.startswith(f"{each}.") for each in late), (
            f"{path} imports {name} when it is imported"
        )


def test_no_module_imports_itself_by_way_of_others():
    """Also where the order of imports would let it pass."""
    files = [path for path in FILES if path.is_relative_to(ROOT / "vps")]
    files += (ROOT / "benchmarks").rglob("*.py")
    module = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in files
    }
    imported = {
        name: {
            each if each in module else each.rpartition(".")[0]
            for each in eager_imports(ast.parse(path.read_text()))
        }
        & set(module)
        for name, path in module.items()
    }
    settled: set[str] = set()

    def follow(name, way):
        assert name not in way, " imports ".join([*way[way.index(name) :], name])
        if name not in settled:
            for each in sorted(imported[name] - {name}):
                follow(each, [*way, name])
            settled.add(name)

    for name in module:
        follow(name, [])


def test_import_is_light_and_fast():
    """Nothing optional and, in the best of three processes, under 0.5 s beyond torch."""
    code = """
import sys, time
import torch
before = set(sys.modules)
start = time.perf_counter()
import vps
seconds = time.perf_counter() - start
unwanted = {"triton", "kernels", *sys.argv[1:]}
print(seconds, *sorted(unwanted & (set(sys.modules) - before)))
"""
    fastest = float("inf")
    for _ in range(3):
        run = python(code, *OPTIONAL)
        assert run.returncode == 0, run.stderr
        seconds, *loaded = run.stdout.split()
        assert not loaded, f"import vps loads {loaded}"
        fastest = min(fastest, float(seconds))
        if fastest < 0.5:
            return
    raise AssertionError(f"import vps takes {fastest:.2f} s beyond torch")
