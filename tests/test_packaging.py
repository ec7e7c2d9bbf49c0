"""Wheels, installs with and without a compiler, and the stable ABI of the extension."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from mmfast import backends

ROOT = Path(__file__).parent.parent
NATIVE = sys.platform == "linux" and platform.machine() == "x86_64"

# What an installed mmfast says about itself, and whether it is right.
ASK = """
import json, torch, mmfast, mmfast.kernels
from mmfast import backends
from mmfast.ops import nearest_code
x, codebook = torch.randn(50, 7), torch.randn(30, 7)
arguments = (x, codebook, "euclidean")
print(json.dumps({
    "file": mmfast.__file__,
    "kernels": mmfast.kernels.__file__,
    "version": mmfast.__version__,
    "backend": backends.automatic(nearest_code.OP, "cpu")[0],
    "missing": backends.extension_missing(),
    "complaints": nearest_code.OP.compare(mmfast.nearest_code(x, codebook), arguments),
}))
"""


def clean_environment(**variables: str) -> dict[str, str]:
    """The environment less what would lead Python, or the build, elsewhere."""
    drop = ("PYTHONPATH", "MMFAST_NO_EXTENSION", "MMFAST_REQUIRE_EXTENSION")
    return {k: v for k, v in os.environ.items() if k not in drop} | variables


def run(*command: str | Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=clean_environment(**variables),
        capture_output=True,
        text=True,
    )


@pytest.fixture
def source(tmp_path) -> Path:
    """A copy of the checkout, with nothing built."""
    return copy_source(tmp_path / "source")


def copy_source(to: Path) -> Path:
    ignore = shutil.ignore_patterns(".*", "build", "dist", "*.so", "*.egg-info", "__pycache__")
    return Path(shutil.copytree(ROOT, to, ignore=ignore))


def copy_objects(source: Path) -> None:
    """What the checkout has compiled is not compiled again."""
    if (ROOT / "build").exists():
        shutil.copytree(ROOT / "build", source / "build")


class Environment:
    """A virtual environment that sees this one's packages, but no mmfast of theirs."""

    def __init__(self, path: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", path], check=True)
        self.python = path / "bin" / "python"
        inside = sysconfig.get_path("purelib", vars={"base": str(path), "platbase": str(path)})
        # Paths in a .pth file come last, and their own .pth files, editable installs, are not read.
        outside = sysconfig.get_path("purelib")
        (Path(inside) / "outside.pth").write_text(outside + "\n")
        self.elsewhere = path / "elsewhere"
        self.elsewhere.mkdir()

    def install(self, *what: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
        return run(
            sys.executable,
            *("-m", "pip", "--python", self.python, "install", "--verbose", "--no-deps"),
            *("--no-index", "--no-build-isolation", "--ignore-installed", *what),
            cwd=self.elsewhere,
            **variables,
        )

    def ask(self) -> dict:
        asked = run(self.python, "-c", ASK, cwd=self.elsewhere)
        assert asked.returncode == 0, asked.stderr
        return json.loads(asked.stdout)


@pytest.fixture
def environment(tmp_path) -> Environment:
    return Environment(tmp_path / "environment")


def build_wheel(source: Path, to: Path, **variables: str) -> Path:
    built = run(
        sys.executable,
        *("-m", "pip", "wheel", "--no-deps", "--no-index", "--no-build-isolation"),
        *("--wheel-dir", to, source),
        cwd=source,
        **variables,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = to.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built once, with the extension where this system can have it."""
    path = tmp_path_factory.mktemp("wheel")
    require = "1" if NATIVE else "0"
    source = copy_source(path / "source")
    copy_objects(source)
    return build_wheel(source, path, MMFAST_REQUIRE_EXTENSION=require)


def files_of_the_checkout() -> set[str]:
    found = [p for kind in ("*.py", "*.json") for p in (ROOT / "kernels").glob(kind)]
    kernels = {f"mmfast/kernels/{p.name}" for p in found}
    return kernels | {str(p.relative_to(ROOT)) for p in (ROOT / "mmfast").rglob("*.py")}


@pytest.mark.packaging
def test_wheel_contents(wheel):
    with zipfile.ZipFile(wheel) as opened:
        names = set(opened.namelist())
    files = {name for name in names if ".dist-info/" not in name}
    extensions = {name for name in files if name.endswith(".so")}
    assert files - extensions == files_of_the_checkout() | {"mmfast/py.typed"}
    assert len(extensions) == NATIVE
    assert all(name.startswith("mmfast/_C.") for name in extensions)
    assert any(name.endswith("LICENSE") for name in names)


@pytest.mark.packaging
def test_wheel_install(wheel, environment):
    installed = environment.install(wheel)
    assert installed.returncode == 0, installed.stderr
    answer = environment.ask()
    assert Path(answer["file"]).is_relative_to(environment.python.parent.parent)
    assert answer["backend"] == ("cpp" if NATIVE else "reference")
    assert answer["complaints"] == []
    script = run(environment.python.parent / "mmfast", "--version", cwd=environment.elsewhere)
    assert script.stdout == f"mmfast {answer['version']}\n"


@pytest.mark.packaging
def test_editable_install(source, environment):
    require = "1" if NATIVE else "0"
    copy_objects(source)
    objects = {p: p.stat().st_mtime_ns for p in source.glob("build/temp*/**/*.o")}
    installed = environment.install("--editable", source, MMFAST_REQUIRE_EXTENSION=require)
    assert installed.returncode == 0, installed.stdout + installed.stderr
    answer = environment.ask()
    assert Path(answer["file"]) == source / "mmfast/__init__.py"
    assert Path(answer["kernels"]) == source / "kernels/__init__.py"
    assert objects == {p: p.stat().st_mtime_ns for p in objects}
    assert answer["backend"] == ("cpp" if NATIVE else "reference")
    assert answer["complaints"] == []


@pytest.mark.packaging
def test_install_without_extension(source, environment):
    installed = environment.install(source, MMFAST_NO_EXTENSION="1")
    assert installed.returncode == 0, installed.stdout + installed.stderr
    assert "MMFAST_NO_EXTENSION=1, installing without the C++ kernels" in output(installed)
    answer = environment.ask()
    assert answer["backend"] == "reference"
    assert "the compiled extension is absent" in answer["missing"][0]
    assert answer["complaints"] == []


NO_COMPILER = {"CC": "/bin/false", "CXX": "/bin/false"}


@pytest.mark.packaging
@pytest.mark.skipif(not NATIVE, reason="no extension to build here")
@pytest.mark.parametrize("options", [(), ("--editable",)], ids=["install", "editable"])
def test_install_without_compiler(source, environment, options):
    installed = environment.install(*options, source, **NO_COMPILER)
    assert installed.returncode == 0, installed.stdout + installed.stderr
    assert "the C++ kernels were not built" in output(installed)
    answer = environment.ask()
    assert answer["backend"] == "reference"
    assert "the compiled extension is absent" in answer["missing"][0]
    assert answer["complaints"] == []


@pytest.mark.packaging
@pytest.mark.skipif(not NATIVE, reason="no extension to build here")
def test_required_extension_fails_without_compiler(source, environment):
    installed = environment.install(source, **NO_COMPILER, MMFAST_REQUIRE_EXTENSION="1")
    assert installed.returncode != 0
    assert "the C++ kernels were not built" in output(installed)


def output(ran: subprocess.CompletedProcess[str]) -> str:
    return ran.stdout + ran.stderr


@pytest.mark.packaging
def test_wheel_without_extension_is_for_any_platform(source, tmp_path):
    wheel = build_wheel(source, tmp_path, MMFAST_NO_EXTENSION="1")
    assert wheel.name.endswith("-py3-none-any.whl")


@pytest.mark.packaging
@pytest.mark.skipif(not NATIVE, reason="no extension to build here")
def test_source_distribution_can_be_built_from(source):
    code = "from setuptools import build_meta; print(build_meta.build_sdist('.'))"
    made = run(sys.executable, "-c", code, cwd=source)
    assert made.returncode == 0, made.stderr
    with tarfile.open(source / made.stdout.splitlines()[-1]) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    needed = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cpp", ".h")]
    needed += [ROOT / "setup.py", ROOT / "pyproject.toml", ROOT / "LICENSE"]
    assert {str(p.relative_to(ROOT)) for p in needed} <= names


@pytest.mark.skipif(bool(backends.extension_missing()), reason="the compiled extension is absent")
def test_abi_is_that_of_torch_2_11():
    pytest.importorskip("torch_abi_audit")
    code = "from torch_abi_audit.cli import main; raise SystemExit(main())"
    audit = run(sys.executable, "-c", code, "--json", backends.extension().__file__, cwd=ROOT)
    assert audit.returncode == 0, audit.stderr
    (extension,) = json.loads(audit.stdout)["extensions"]
    assert extension["error"] is None
    found = extension["torch"]
    assert found["uses_torch"]
    assert found["stable"]
    assert found["unstable_symbols"] == found["unknown_shim_symbols"] == []
    assert tuple(map(int, found["min_torch_version"].split("."))) <= (2, 11, 0)
    assert backends.extension().build_info()["torch_target_version"] == "2.11"
