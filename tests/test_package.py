"""The wheel: everything a run needs is inside, and its commands work from any folder."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command that does not see the checkout."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}: {done.stdout[-1500:]}{done.stderr[-2500:]}"
    return done


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of what the packages are built from."""
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("building a wheel without the network needs setuptools in this environment")
    source = tmp_path_factory.mktemp("source")
    for folder in ("agentft", "conf", "sweeps"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source / file)
    removed = source / "build" / "lib" / "agentft" / "removed.py"
    removed.parent.mkdir(parents=True)
    removed.touch()
    return source


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", target, source, cwd=target)
    (made,) = target.glob("agentft_hydra-*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the commands of an environment that has the wheel, and this one's packages behind it."""
    environment = tmp_path_factory.mktemp("with space and ü") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=wheel.parent)
    python = environment / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python]
    run(*pip, "install", "--no-deps", "--no-index", wheel, cwd=wheel.parent)
    # Afterwards: an agentft that is installed in this environment would count as installed in that one.
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "behind.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return python.parent


DATA = [
    file for file in (ROOT / "agentft").rglob("*") if file.suffix not in (".py", ".pyc", ".so", "") and file.is_file()
]
"""Files that the package reads: the synthetic catalogue, templates, style sheets, scripts, the kernels' source."""


def test_the_wheel_holds_every_module_config_and_data_file(wheel: Path):
    names = set(zipfile.ZipFile(wheel).namelist())
    for file in [*(ROOT / "conf").rglob("*.yaml"), *(ROOT / "sweeps").rglob("*.yaml")]:
        assert f"agentft/{file.relative_to(ROOT)}" in names
    for file in [*(ROOT / "agentft").rglob("*.py"), *DATA]:
        assert str(file.relative_to(ROOT)) in names
    assert {".yaml", ".j2", ".css", ".js"} <= {file.suffix for file in DATA}
    assert "agentft/removed.py" not in names, "a module of an earlier build"
    beside = {name.split("/")[0] for name in names} - {"agentft"}
    assert all(name.endswith(".dist-info") for name in beside), f"the wheel puts {beside} beside the package"


def test_another_python_is_refused_before_anything_is_made(tmp_path: Path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()
    old = tmp_path / "python3.10"
    set_version = "import sys; sys.version_info = (3, 10, 0); exec(sys.argv[2])"
    old.write_text(f"#!/bin/sh\nexec {sys.executable} -c '{set_version}' \"$@\"\n")
    old.chmod(0o755)
    command = ["make", "-s", "install", f"PYTHON={old}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "Python 3.11 to 3.13 is needed" in done.stderr.splitlines()[0]
    assert done.returncode
    assert not (tmp_path / ".venv").exists()


def test_the_source_distribution_holds_every_data_file(source: Path, tmp_path: Path):
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    run(sys.executable, "-c", code, cwd=source)
    (made,) = tmp_path.glob("agentft_hydra-*.tar.gz")
    with tarfile.open(made) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {str(file.relative_to(ROOT)) for file in DATA} <= names


def test_every_command_exists_and_can_be_loaded(installed: Path, tmp_path: Path):
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    named = {"train", "evaluate", "compare", "audit", "score", "read", "dashboard", "export"}
    assert {f"agentft-{name}" for name in named} <= scripts.keys()
    for script in scripts:
        assert (installed / script).is_file()
    code = "import importlib; " + "; ".join(
        f"getattr(importlib.import_module('{target.partition(':')[0]}'), '{target.partition(':')[2]}')"
        for target in scripts.values()
    )
    where = run(installed / "python", "-c", code + "; import agentft; print(agentft.__file__)", cwd=tmp_path).stdout
    assert str(installed.parent) in where


def test_the_extras_are_there_and_name_each_other_rightly(wheel: Path):
    (name,) = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".dist-info/METADATA")]
    lines = zipfile.ZipFile(wheel).read(name).decode().splitlines()
    extras = {line.partition(": ")[2] for line in lines if line.startswith("Provides-Extra")}
    assert {"gpu", "quantization", "slurm", "ray", "optuna", "deepspeed"} <= extras
    for line in lines:
        if line.startswith("Requires-Dist: agentft-hydra["):
            assert set(line.partition("[")[2].partition("]")[0].split(",")) <= extras, line


def test_hints_name_what_can_be_installed():
    """On the index, `agentft` is another project; an extra is installed from a clone."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    folders = ("agentft", "conf", "sweeps", "docs", "tests", "benchmarks")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*") if file.suffix not in (".pyc", ".png")]
    for file in [*files, *ROOT.glob("*.*"), ROOT / "Makefile"]:
        text = file.read_text(encoding="utf-8") if file.is_file() else ""
        found = re.findall(r"""\bagentft\[|pip install (?:-\S+ )*['"]?agentft""", text)
        assert found == [], f"{file}: {found}"
        assert set(re.findall(r"'\.\[(\w+)\]'", text)) <= extras.keys(), file


def test_another_package_of_the_same_name_is_said_in_one_line(installed: Path, tmp_path: Path):
    (tmp_path / "agentft").mkdir()
    (tmp_path / "agentft" / "__init__.py").touch()
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "agentft"\nversion = "0.2.0"\n')
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    offline = ("--no-deps", "--no-index", "--no-build-isolation")
    run(*pip, "install", *offline, "--target", tmp_path / "theirs", tmp_path, cwd=tmp_path)
    command = (installed / "agentft-train", "--cfg", "job")
    assert run(*command, cwd=tmp_path).stderr == ""
    (site,) = installed.parent.glob("lib/python*/site-packages")
    (site / "theirs.pth").write_text(f"{tmp_path / 'theirs'}\n")
    try:
        said = run(*command, cwd=tmp_path).stderr
    finally:
        (site / "theirs.pth").unlink()
    assert said.count("\n") == 1
    assert said.startswith("agentft-train: the package agentft 0.2.0 of another project is installed")


def test_the_installed_command_composes_from_its_own_configs_and_finds_the_launcher(installed: Path, tmp_path: Path):
    shown = run(installed / "agentft-train", "--cfg", "job", "sft_type.rank=5", cwd=tmp_path).stdout
    assert "rank: 5" in shown
    hydra = run(installed / "agentft-train", "--cfg", "hydra", cwd=tmp_path).stdout
    assert "hydra_plugins.agentft_launcher.AgentftLauncher" in hydra
    sweep = ("--config-dir", "sweeps", "--config-name", "lora_rank")
    assert "sft_type" in run(installed / "agentft-train", *sweep, "--cfg", "job", cwd=tmp_path).stdout
    assert run(installed / "agentft-train", "--help", cwd=tmp_path).stdout.startswith("usage: agentft-train [flags]")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_installed_commands_train_compare_and_sweep(installed: Path, tmp_path: Path):
    small = ["model=tiny", "model.shape.hidden=32", "dataset.conversations=8", "dataset.heldout=2", "tracking=disabled"]
    small += ["training.max_steps=2", "evaluation.before=false", "evaluation.conversations=1", "threads=1"]
    run(installed / "agentft-train", *small, "run_dir=one", cwd=tmp_path)
    assert (tmp_path / "one" / "final" / "adapter_model.safetensors").is_file()
    run(installed / "agentft-evaluate", "run=one", cwd=tmp_path)
    run(installed / "agentft-train", "-m", *small, "seed=1,2", "hydra.sweep.dir=two", cwd=tmp_path)
    assert "seed" in run(installed / "agentft-compare", "two", cwd=tmp_path).stdout


@pytest.mark.skipif(sys.platform != "linux", reason="libgomp is what PyTorch uses on Linux")
def test_idle_threads_do_not_spin_beside_another_training():
    """As libgomp says itself when torch is loaded."""
    environment = {**os.environ, "OMP_DISPLAY_ENV": "verbose", "PYTHONPATH": str(ROOT)}
    environment.pop("GOMP_SPINCOUNT", None)
    command = [sys.executable, "-c", "import agentft.entry, torch"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "GOMP_SPINCOUNT = '10000'" in done.stderr
