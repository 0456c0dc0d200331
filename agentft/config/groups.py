"""The folder `conf/`: where it lies, and which options each of its groups has."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def conf_dir() -> Path:
    """The folder of the config groups: inside an installed package, else beside it in the repository."""
    here = Path(__file__).resolve().parent.parent
    return next(folder for folder in (here / "conf", here.parent / "conf") if folder.is_dir())


def options(group: str, folders: Sequence[Path] = ()) -> list[str]:
    """The options of a group: the files of `conf/<group>/`; none if there is no such group."""
    if not group:
        return []
    return sorted({path.stem for folder in folders or [conf_dir()] for path in (folder / group).glob("*.yaml")})
