"""The layout of the repository and what gets installed from it."""

import os
import re
import shutil
import subprocess
import tarfile
import textwrap
import zipfile

import pytest
from processes import ROOT, execute, python

# transformers asks for the version and then imports names from it: only a package that answers
# both shows that ours does not stand in its way.
STAND_IN = """
from unittest.mock import MagicMock

STAND_IN = True
__version__ = "{version}"


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return MagicMock()
"""

WITH_STAND_IN = """
import vps
import kernels
import transformers.modeling_utils
from transformers.utils.import_utils import is_kernels_available

assert kernels.STAND_IN
assert is_kernels_available()
"""

WITHOUT_STAND_IN = """
import importlib.util

import vps
import transformers.modeling_utils
from transformers.utils.import_utils import is_kernels_available

spec = importlib.util.find_spec("kernels")
assert spec is None or spec.origin is None, spec
assert not is_kernels_available()
"""


@pytest.fixture
def source(tmp_path):
    """A copy of the tree as a checkout has it, with one file more among the kernels."""
    copy = tmp_path / "source"
    ignore = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist")
    shutil.copytree(ROOT, copy, symlinks=True, ignore=ignore)
    (copy / "kernels/probe.py").write_text('"""Not a kernel."""\n')
    return copy


def test_the_oldest_releases_are_the_lower_bounds():
    """What ``make test-oldest`` installs is what ``setup.py`` promises."""
    promised = dict(re.findall(r'"([a-z]+)>=([\d.]+)"', (ROOT / "setup.py").read_text()))
    pins = re.findall(r"^(\w+)==([\d.]+)$", (ROOT / "constraints-oldest.txt").read_text(), re.M)
    assert dict(pins).keys() == {"torch", "triton", "transformers"}
    for name, version in pins:
        assert version == f"{promised[name]}.0"


def test_kernels_folder_is_linked_and_no_package():
    assert not (ROOT / "kernels/__init__.py").exists()
    assert (ROOT / "vps/kernels").is_symlink()
    assert os.readlink(ROOT / "vps/kernels") == "../kernels"


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_git_holds_the_link_as_a_link():
    listed = subprocess.run(
        ["git", "ls-files", "-s", "vps/kernels"], cwd=ROOT, capture_output=True, text=True
    )
    assert listed.stdout.startswith("120000 "), listed.stdout + listed.stderr


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
        from vps.model.loading import load_model
        try:
            load_model("x")
        except ModuleNotFoundError as error:
            print(error)
        """
    )
    assert run.stdout == "loading a model needs transformers: pip install 'vps-kernels[hf]'\n", (
        run.stderr
    )


@pytest.mark.parametrize("way", ["python -c", "python -m pytest"])
@pytest.mark.parametrize("installed", [True, False], ids=["installed", "absent"])
def test_the_other_package_named_kernels(tmp_path, installed, way):
    """From our root, Hugging Face's kernels (a stand-in here) is found and transformers uses it."""
    site = tmp_path / "site"
    site.mkdir()
    if installed:
        from transformers.utils.import_utils import KERNELS_MIN_VERSION as version

        (site / "kernels/layer").mkdir(parents=True)
        for name in ("__init__.py", "layer/__init__.py", "layer/mode.py"):
            (site / "kernels" / name).write_text(STAND_IN.format(version=version))
        metadata = site / f"kernels-{version}.dist-info/METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n")
    elif execute("-c", "import kernels; kernels.__version__", cwd=tmp_path).returncode == 0:
        pytest.skip("Hugging Face's kernels is installed in this environment")
    code = WITH_STAND_IN if installed else WITHOUT_STAND_IN
    if way == "python -c":
        run = python(code, PYTHONPATH=str(site))
    else:
        inner = tmp_path / "test_inner.py"
        inner.write_text("def test_imports():\n" + textwrap.indent(code, "    "))
        options = ["-q", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml")]
        run = execute("-m", "pytest", *options, str(inner), PYTHONPATH=str(site))
    assert run.returncode == 0, run.stdout + run.stderr


def test_every_package_is_listed():
    folders = {path.parent for path in (ROOT / "vps").rglob("*.py")}
    folders |= {
        ROOT / "vps" / path.parent.relative_to(ROOT) for path in (ROOT / "kernels").rglob("*.py")
    }
    packages = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    listed = (ROOT / "setup.py").read_text().partition("PACKAGES = [")[2].partition("]")[0]
    assert {name.strip().strip('"') for name in listed.split(",") if name.strip()} == packages


def test_plain_install(tmp_path, source):
    target = tmp_path / "target"
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--target", str(target)]
    # What `make wheel` builds, a minute on a slow machine, is left out here.
    command = "-m", "pip", "install", "-q", *options, source
    run = execute(*command, cwd=tmp_path, VPS_BUILD_CPP="0")
    assert run.returncode == 0, run.stderr
    for name in ("__init__.py", "report.html", "problems.json", "calibration.json"):
        assert (target / "vps/cli/demo" / name).is_file()
    assert (target / "vps/kernels/probe.py").is_file()
    assert (target / "vps/verify/units.txt").is_file()
    assert (target / "vps/py.typed").is_file()
    assert not (target / "kernels").exists()
    run = python(
        "import vps, vps.kernels.probe; print(vps.__file__)", cwd=tmp_path, PYTHONPATH=str(target)
    )
    assert run.stdout.strip() == str(target / "vps/__init__.py"), run.stderr


def test_built_archives_hold_the_kernels(tmp_path, source):
    """An sdist from the tree, and a wheel from that sdist; C++ is tests/test_wheel.py's."""
    build = "from setuptools import build_meta; print(build_meta.build_{}('..'))"
    run = python(build.format("sdist"), cwd=source)
    assert run.returncode == 0, run.stderr
    sdist = tmp_path / run.stdout.splitlines()[-1]
    with tarfile.open(sdist) as archive:
        files = {name.partition("/")[2] for name in archive.getnames()}
        assert {"vps/kernels/probe.py", "vps/kernels/README.md", "LICENSE"} <= files
        archive.extractall(tmp_path, filter="data")
    unpacked = tmp_path / sdist.name.removesuffix(".tar.gz")
    run = python(build.format("wheel"), cwd=unpacked, VPS_BUILD_CPP="0")
    assert run.returncode == 0, run.stderr
    files = zipfile.ZipFile(tmp_path / run.stdout.splitlines()[-1]).namelist()
    assert {"vps/kernels/probe.py", "vps/kernels/README.md", "vps/cli/demo/report.html"} <= {*files}
    assert {"vps/cli/demo/__init__.py", "vps/cli/demo/calibration.json"} <= {*files}
    data = ("evaluation/templates/report.html", "evaluation/templates/report.md")
    assert {f"vps/{name}" for name in (*data, "fitting/other_texts.txt")} <= {*files}
    assert {name.split("/")[0].partition("-")[0] for name in files} == {"vps", "vps_kernels"}


def test_modules_are_found_by_their_names_of_version_0_1():
    code = """
import importlib, pickle, sys
import torch, vps
for old, new in (("linear", "layers.linear"), ("policy", "algorithm.policy"),
                 ("dispatch", "backends.dispatch"), ("sharding", "layers.shards.sharding"),
                 ("patching", "model.patching"), ("demo", "cli.demo")):
    moved = importlib.import_module(f"vps.{new}")
    assert importlib.import_module(f"vps.{old}") is moved and moved.__spec__.name == f"vps.{new}"
from vps.patching import sharpened_layers
for name in ("nothing", "linear.nothing"):
    try:
        importlib.import_module(f"vps.{name}")
    except ModuleNotFoundError:
        continue
    raise AssertionError(name)
assert callable(vps.capture) and callable(vps.refine)

model = torch.nn.Sequential(torch.nn.Linear(4, 4))
vps.patch(model, vps.VPSConfig(target_modules=["0"]))
vps.VPSLinear.__module__, vps.PolicyState.__module__ = "vps.linear", "vps.policy"
text = pickle.dumps(model)
vps.VPSLinear.__module__, vps.PolicyState.__module__ = "vps.layers.linear", "vps.algorithm.policy"
assert b"vps.linear" in text and b"vps.policy" in text and b"vps.layers" not in text
for name in [name for name in sys.modules if name in ("vps.linear", "vps.policy")]:
    del sys.modules[name]
again = pickle.loads(text)
x = torch.randn(2, 3, 4)
assert torch.equal(again(x), model(x)) and type(again[0]) is vps.VPSLinear
"""
    run = python(code)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(
    "code",
    [
        "import vps.verify; assert 'torch' not in sys.modules",
        "import vps; vps.VPSConfig; vps.__version__; dir(vps)",
        "import vps.refine, vps; assert callable(vps.refine) and vps.refine.RefineResult",
        "import vps; assert callable(vps.refine); from vps.refine import RefineResult",
        "from vps.refine import refine; import vps; assert vps.refine.refine is refine",
        "from vps import refine, patch, reference, fitting; assert callable(refine)",
        "from vps.refine import Iteration; from vps import refine, Iteration as again\n"
        "assert again is Iteration and 'model' in inspect.signature(refine).parameters",
        "from vps import *; assert callable(refine) and callable(backends) and backends()",
        "import vps; import torch; assert torch.ops.vps.linear.default",
        "import torch; import vps; assert torch.ops.vps.linear.default",
        "import vps.verify; from torch import nn; import torch\n"
        "assert torch.ops.vps.linear.default",
        "import vps; assert set(vps.__all__) <= set(dir(vps))\n"
        "assert all(getattr(vps, name) is not None for name in vps.__all__)",
    ],
)
def test_public_names_in_any_order_of_imports(code):
    run = python(f"import inspect, sys\n{code}")
    assert run.returncode == 0, run.stderr


def test_a_program_is_loaded_after_importing_vps_alone(tmp_path):
    made = python(
        """
        import sys, torch, vps
        model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        vps.patch(model, vps.VPSConfig(target_modules=["0"]))
        x = torch.arange(12.0).reshape(1, 3, 4)
        program = torch.export.export(model, (x,))
        assert "vps" in str(program.graph)
        torch.export.save(program, "program.pt2")
        torch.save(model, "model.pt")
        torch.save(model(x), "y.pt")
        """,
        cwd=tmp_path,
        PYTHONPATH=str(ROOT),
    )
    assert made.returncode == 0, made.stderr
    for imports in ("import vps, torch", "import torch, vps"):
        run = python(
            f"""
            {imports}
            x = torch.arange(12.0).reshape(1, 3, 4)
            y = torch.load("y.pt")
            assert torch.equal(torch.export.load("program.pt2").module()(x), y)
            assert torch.equal(torch.load("model.pt", weights_only=False)(x), y)
            """,
            cwd=tmp_path,
            PYTHONPATH=str(ROOT),
        )
        assert run.returncode == 0, run.stderr
