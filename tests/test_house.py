"""The house: imports go down, names say what a room is for, and the README's map is complete."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import ways

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "agentft"

FLOORS = {
    5: ("config", "entry", "worker", "launch", "plugins", "sweeping", "audit", "export"),
    4: ("recipes", "audits", "compare", "comparison", "dashboard", "score", "read"),
    3.5: ("distributed",),
    3: ("training", "evaluation"),
    2: ("model",),
    1: ("data",),
    0: (
        "errors",
        "cache",
        "settings",
        "secrets",
        "runs",
        "outfile",
        "runtime",
        "tracking",
        "progress",
        "signals",
        "__init__",
    ),
}
"""Room -> floor. A module imports rooms of lower floors and its own room; on floors 0, 4 and 5 also its neighbours."""

MAY_MEET_NEIGHBOURS = {0, 4, 5}
MAY_IMPORT = {"agentft.recipes.minimal": {"agentft.config"}}
"""The teaching recipe is a command of its own, so that all of it stands in one file."""
BANNED = {"utils", "util", "helpers", "helper", "common", "misc", "base", "tools_misc"}
MODULES = sorted(PACKAGE.rglob("*.py"))


def _room(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def _floor(room: str) -> float:
    for floor, rooms in FLOORS.items():
        if room in rooms:
            return floor
    raise AssertionError(f"agentft.{room} has no floor: add it to FLOORS and to docs/architecture.md")


def _imports(path: Path) -> set[str]:
    """Return the agentft modules that a file imports, inside functions too; imports for types alone count as well."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [node.module] if node.module != "agentft" else [f"agentft.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {name for name in names if name == "agentft" or name.startswith("agentft.")}
    return found


def _module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("path", MODULES, ids=_module_name)
def test_imports_go_down(path: Path):
    room = _room(_module_name(path))
    floor = _floor(room)
    for imported in _imports(path) - MAY_IMPORT.get(_module_name(path), set()):
        other = _room(imported)
        allowed = other == room or _floor(other) < floor or (_floor(other) == floor and floor in MAY_MEET_NEIGHBOURS)
        assert allowed, f"{path.name} (floor {floor}) imports {imported} (floor {_floor(other)})"


def test_only_the_composition_knows_hydra():
    """OmegaConf also reads and writes the config of a run folder, without Hydra, for programs that compose nothing."""
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            found = {module.split(".")[0] for module in modules} & {"hydra", "omegaconf"}
            if found and _floor(_room(_module_name(path))) != 5:
                assert (_module_name(path), found) == ("agentft.recipes.config", {"omegaconf"}), (
                    f"{path} imports {modules}"
                )


def test_no_module_is_a_drawer_of_odds_and_ends():
    for path in ROOT.rglob("*.py"):
        if not {".venv", "build"} & set(path.parts):
            assert path.stem not in BANNED, path


def test_every_module_opens_with_what_it_is_for():
    for path in MODULES:
        text = path.read_text(encoding="utf-8")
        assert not text.strip() or ast.get_docstring(ast.parse(text)), f"{path} has no docstring"


def test_the_map_in_the_readme_lists_every_room():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rooms = {_module_name(path).split(".")[1] for path in MODULES if path.parent != PACKAGE or path.stem != "__init__"}
    for room in sorted(rooms):
        assert re.search(rf"`?agentft/{room}\b", readme), f"README.md does not say where agentft/{room} is"


def test_importing_a_room_prints_nothing_and_loads_no_torch_where_none_is_needed():
    light = (
        "agentft.config, agentft.recipes.config, agentft.data.records, agentft.tracking, agentft.runs, agentft.score"
    )
    code = f"import {light}, sys; sys.exit(' '.join(m for m in ('torch', 'transformers', 'wandb') if m in sys.modules) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.slow
def test_our_entry_points_hide_no_package_of_the_same_name():
    """`evaluate` and `train` are also names of packages; nothing we depend on may pick ours up when run from here."""
    code = (
        "import sys; import torch, transformers, peft, modelscope, rouge_score, safetensors, datasets, wandb;"
        "ours = [n for n in ('train', 'evaluate') if n in sys.modules]; sys.exit(' '.join(ours) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-500:]


def test_the_ways_that_are_counted_begin_and_end_at_functions_that_exist():
    for way in ways.WAYS.values():
        for file, _, name in (way.start.partition(":"), way.ends.partition(":")):
            assert re.search(rf"def {name.rpartition('.')[2]}\(", (PACKAGE / file).read_text(encoding="utf-8")), way


ROOTS = {"TrainConfig", "EvaluateConfig", "AuditConfig", "ExportConfig"}
NODES = {f"{kind}Config": kind for kind in ("Model", "Dataset", "Distributed", "Training", "Evaluation", "Tracking")}
NODES |= {f"{kind}Config": "Sft" for kind in ("Sft", "Lora", "Qlora", "Full", "Freeze")} | {"AuditOptions": "Audit"}
TAKES_ALL_SETTINGS = {
    **dict.fromkeys(
        ("entry._train", "entry._evaluate", "worker._train", "audit.run", "export.run"), "hands them to its recipe"
    ),
    **dict.fromkeys(("train.train", "train._train_as", "train._train", "train.load_for_training"), "the recipe"),
    "minimal.train": "the teaching recipe",
    "train._require_ranks": "the recipe: asked before the ranks start, and again by each",
    **dict.fromkeys(("train.run_id", "train.choices"), "names a run by all that decides it"),
    **dict.fromkeys(("config.objective_of_finished", "config.changed_settings"), "compares all with a run's own"),
    **dict.fromkeys(
        ("config.primary_config", "config.config_to_yaml", "config.settings_to_yaml"), "writes config.yaml"
    ),
    **dict.fromkeys(("evaluate.evaluate", "evaluate._evaluate_as", "evaluate._evaluate"), "the recipe"),
    "export.export": "the recipe",
    "export._facts": "the model card names what a run was trained with",
    "audit.audit": "the recipe",
}
"""Functions that take the settings of a whole command -> why; every other takes values, or one or two nodes of them."""


def test_only_a_recipe_takes_all_settings_and_every_other_function_two_nodes_at_most():
    found = set()
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                name, arguments = f"{path.stem}.{node.name}", [*node.args.args, *node.args.kwonlyargs]
                hints = [arg.annotation for arg in arguments if arg.annotation]
                names = {part.id for hint in hints for part in ast.walk(hint) if isinstance(part, ast.Name)}
                found |= {name} if names & ROOTS else set()
                assert name in TAKES_ALL_SETTINGS or len({NODES[each] for each in names & NODES.keys()}) <= 2, name
                hidden = [
                    a for a in arguments if a.arg == "config" and getattr(a.annotation, "id", "") in ("Any", "object")
                ]
                assert not hidden, name
    assert found == TAKES_ALL_SETTINGS.keys(), found ^ TAKES_ALL_SETTINGS.keys()
