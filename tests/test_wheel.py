"""What `make wheel` has built, installed where there is no compiler (make test-wheel)."""

import json
import os
import re
import site
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from processes import ROOT

DIST = os.environ.get("VPS_DIST")
pytestmark = pytest.mark.skipif(DIST is None, reason="needs VPS_DIST (make test-wheel)")
TORCH_GLIBC = 28  # the wheels of torch are manylinux_2_28

OUTPUTS = """
import sys
import torch, vps
assert vps.__file__.startswith(sys.prefix), vps.__file__
assert vps.backends()["cpp"] is None, vps.backends()
linear = torch.nn.Linear(64, 48)
layer = vps.VPSLinear.from_linear(linear, vps.VPSConfig())
x = torch.randn(2, 5, 64)
with torch.no_grad():
    with vps.backend("cpp"):
        found = layer(x)
    with vps.backend("torch"):
        expected = layer(x)
assert torch.allclose(found, expected, atol=1e-5) and not torch.equal(found, linear(x))
"""


@pytest.fixture(scope="module")
def wheel():
    (found,) = (ROOT / DIST).glob("*.whl")
    return found


@pytest.fixture(scope="module")
def sdist():
    (found,) = (ROOT / DIST).glob("*.tar.gz")
    return found


@pytest.fixture(scope="module")
def dependencies(tmp_path_factory):
    """The packages of this environment without ours, so that nothing is fetched."""
    folder = tmp_path_factory.mktemp("dependencies")
    for packages in site.getsitepackages():
        for entry in Path(packages).iterdir():
            if not re.match(r"vps|__editable__|_virtualenv|__pycache__", entry.name) and (
                entry.suffix != ".pth"
            ):
                (folder / entry.name).symlink_to(entry)
    return folder


class Environment:
    """A virtual environment whose commands find no compiler."""

    def __init__(self, folder, dependencies):
        self.folder = folder
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        (packages,) = folder.glob("lib/python*/site-packages")
        packages.joinpath("dependencies.pth").write_text(f"{dependencies}\n")

    def run(self, *command, **more):
        """Run a command of the environment, in a folder without our sources."""
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("VPS_", "PYTHON", "PIP_"))
        }
        environment |= {"PATH": str(self.folder / "bin"), "CC": "false", "CXX": "false"} | more
        done = subprocess.run(
            [self.folder / "bin" / command[0], *command[1:]], cwd=self.folder, env=environment,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def install(self, *arguments, **more):
        """Install without an index: every requirement must be there already."""
        options = ("--no-index", "--no-build-isolation", "--no-cache-dir")
        return self.run("python", "-m", "pip", "install", "-q", *options, *arguments, **more)


@pytest.fixture(scope="module")
def installed(wheel, dependencies, tmp_path_factory):
    """An environment with the wheel and its extra hf."""
    environment = Environment(tmp_path_factory.mktemp("wheel"), dependencies)
    environment.install(f"vps-kernels[hf] @ file://{wheel}")
    return environment


def test_one_wheel_for_every_python_and_torch(wheel):
    found = re.fullmatch(
        r"vps_kernels-[\d.]+-cp311-abi3-manylinux_2_(\d+)_x86_64(\..+)?\.whl", wheel.name
    )
    assert found and int(found[1]) <= TORCH_GLIBC, wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        library = archive.read("vps/_cpp.abi3.so")
    assert "vps/py.typed" in names
    assert not any(re.search(r"\.libs/|csrc|\.cpp$|tests|benchmarks", name) for name in names)
    assert max(int(version) for version in re.findall(rb"GLIBC_2\.(\d+)", library)) <= TORCH_GLIBC
    libraries = {each for each in re.findall(rb"lib[\w+-]+\.so[\d.]*", library)}
    assert libraries <= {
        b"libc10.so", b"libtorch_cpu.so", b"libtorch.so", b"libstdc++.so.6", b"libm.so.6",
        b"libgcc_s.so.1", b"libc.so.6", b"libpthread.so.0",
    }  # fmt: skip
    assert wheel.stat().st_size < 2_000_000


def test_the_sdist_holds_what_it_takes_to_build(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    kinds = ("*.cpp", "*.h", "*.inc")
    sources = {str(p.relative_to(ROOT)) for kind in kinds for p in (ROOT / "csrc").rglob(kind)}
    assert sources <= names and {"setup.py", "pyproject.toml", "LICENSE"} <= names


def test_the_wheel_has_the_backend_cpp_without_a_compiler(installed):
    installed.run("python", "-c", OUTPUTS)
    facts = json.loads(installed.run("vps", "doctor", "--json"))
    assert facts["backends"]["cpp"] == "available" and facts["tools"]["c++"] == "not found"
    assert installed.run("vps", "--version").startswith("vps 0.")
    assert not any("compiler" in step for step in facts["next"])


def test_requirements_of_the_extras_are_met(installed):
    assert installed.run("python", "-m", "pip", "check").startswith("No broken requirements")
    listed = json.loads(installed.run("python", "-m", "pip", "list", "--format=json"))
    named = {each["name"].lower() for each in listed}
    assert {"vps-kernels", "transformers", "typer", "rich"} <= named
    assert not [name for name in named if name.startswith("nvidia-")]


def test_plain_install_of_the_sdist(sdist, dependencies, tmp_path):
    """`pip install .` where nothing can be compiled: all but the C++ backend."""
    environment = Environment(tmp_path / "plain", dependencies)
    environment.install(sdist)
    code = OUTPUTS.partition("linear =")[0].replace('["cpp"] is None', '["cpp"] is not None')
    environment.run("python", "-c", code)
    assert "vps generate" in environment.run("vps", "--help")
    steps = json.loads(environment.run("vps", "doctor", "--json"))["next"]
    assert any("install a C++ compiler" in step for step in steps)
