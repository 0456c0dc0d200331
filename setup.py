"""Puts `conf/` and `sweeps/`, which stand beside the package in a checkout, inside it in a wheel; see pyproject.toml."""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

BESIDE = ("conf", "sweeps")


class BuildWithConfigs(build_py):
    """An editable install finds the folders where they are."""

    def run(self) -> None:
        if not self.editable_mode:  # else a removed module of an earlier build would be shipped
            shutil.rmtree(Path(self.build_lib) / "agentft", ignore_errors=True)
        super().run()
        if not self.editable_mode:
            for file in _config_files():
                target = Path(self.build_lib) / "agentft" / file
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)

    def get_source_files(self) -> list[str]:
        """Name them for the source distribution too."""
        return [*super().get_source_files(), *map(str, _config_files())]


def _config_files() -> list[Path]:
    return sorted(file for folder in BESIDE for file in Path(folder).rglob("*.yaml"))


setup(cmdclass={"build_py": BuildWithConfigs})
