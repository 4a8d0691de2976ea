"""The layout of the repository and what gets installed from it."""

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def python(code, cwd=ROOT, **environment):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_kernels_folder_is_linked_and_no_package():
    assert not (ROOT / "kernels/__init__.py").exists()
    assert (ROOT / "vps/kernels").is_symlink()
    assert (ROOT / "vps/kernels").resolve() == ROOT / "kernels"


def test_import_is_light_and_fast():
    run = python(
        """
        import sys, time
        import torch
        before = set(sys.modules)
        start = time.perf_counter()
        import vps
        seconds = time.perf_counter() - start
        heavy = {"transformers", "triton", "sympy", "pint", "matplotlib", "tqdm", "kernels"}
        print(sorted(heavy & (set(sys.modules) - before)), seconds < 0.5)
        """
    )
    assert run.stdout == "[] True\n", run.stderr


def test_works_without_optional_packages():
    run = python(
        """
        import sys
        for name in ("transformers", "triton", "sympy", "pint", "matplotlib", "tqdm", "gguf"):
            sys.modules[name] = None
        import torch, vps
        model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        vps.patch(model, vps.VPSConfig(target_modules=["0"]))
        model(torch.randn(3, 4))
        from vps.loading import load_model
        try:
            load_model("x")
        except ModuleNotFoundError as error:
            print(error)
        """
    )
    assert run.stdout == "loading a model needs transformers: pip install 'vps-kernels[hf]'\n", (
        run.stderr
    )


@pytest.mark.parametrize("installed", [True, False])
def test_the_other_package_named_kernels(tmp_path, installed):
    """With a stand-in for Hugging Face's kernels it is the one imported, from our root too."""
    if installed:
        (tmp_path / "kernels").mkdir()
        (tmp_path / "kernels/__init__.py").write_text("STAND_IN = True\n")
    run = python(
        """
        import importlib.util, vps, transformers
        spec = importlib.util.find_spec("kernels")
        print(spec is not None and spec.origin)
        """,
        PYTHONPATH=str(tmp_path),
    )
    expected = str(tmp_path / "kernels/__init__.py") if installed else "None"
    assert run.stdout.strip() == expected, run.stderr


def test_every_package_is_listed():
    folders = {path.parent for path in (ROOT / "vps").rglob("*.py")}
    packages = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    listed = (ROOT / "setup.py").read_text()
    for package in packages | {"vps.kernels"}:
        assert f'"{package}"' in listed


def test_plain_install(tmp_path):
    source = tmp_path / "source"
    ignore = shutil.ignore_patterns(".git", ".venv", ".cache", "*.egg-info", "build", "demo_out")
    shutil.copytree(ROOT, source, symlinks=True, ignore=ignore)
    target = tmp_path / "target"
    subprocess.run(
        [
            sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index",
            "--no-build-isolation", "--target", str(target), str(source),
        ],
        check=True,
        capture_output=True,
        cwd=tmp_path,
    )  # fmt: skip
    assert (target / "vps/demo/__init__.py").is_file()
    assert (target / "vps/kernels/README.md").is_file()
    assert not (target / "kernels").exists()
    run = python("import vps; print(vps.__file__)", cwd=tmp_path, PYTHONPATH=str(target))
    assert run.stdout.strip() == str(target / "vps/__init__.py"), run.stderr
