"""Private names of other libraries: few, each in one file, and there in the installed version."""

from __future__ import annotations

import ast
import importlib.util
import re
import tomllib
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

PACKAGE = Path(__file__).resolve().parent.parent / "agentft"

FSDP = "distributed/fsdp/_fully_shard"
NAMES = {
    "_attn_implementation": ("transformers", "configuration_utils.py"),
    "_softmax_backward_data": ("torch", "_C/_VariableFunctions.pyi"),
    "_C": ("torch", "__init__.py"),
    "_record_memory_history": ("torch", "cuda/memory.py"),
    "_dump_snapshot": ("torch", "cuda/memory.py"),
    "_cuda_attach_out_of_memory_observer": ("torch", "lib/libtorch_python.so"),  # of builds for CUDA
    "_set_pg_timeout": ("torch", "distributed/distributed_c10d.py"),
    "_get_fsdp_state": ("torch", f"{FSDP}/_fully_shard.py"),
    "_lazy_init": ("torch", f"{FSDP}/_fsdp_state.py"),
    "_apply": ("torch", "nn/modules/module.py"),
    "_register_deepspeed_module": ("deepspeed", "runtime/zero/parameter_offload.py"),
    "_link_all_hp_params": ("deepspeed", "runtime/zero/stage_1_and_2.py"),
    "_hp_optimizer_states_linked": ("deepspeed", "runtime/zero/stage_1_and_2.py"),
    "_lazy_init_hp_params_optimizer_state": ("deepspeed", "runtime/zero/stage_1_and_2.py"),
    "_get_norm_groups": ("deepspeed", "runtime/zero/stage3.py"),
    "_to_model": ("wandb_workspaces", "workspaces/interface.py"),
    "_internal_id": ("wandb_workspaces", "workspaces/interface.py"),
    "_internal_name": ("wandb_workspaces", "workspaces/interface.py"),
    "_id": ("wandb_workspaces", "reports/v2/interface.py"),
}
"""Name -> package and the file that has it."""


def _uses() -> dict[str, set[str]]:
    """Return each private name that its file does not define -> the files that use it."""
    uses: dict[str, set[str]] = defaultdict(set)
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        own = set(re.findall(r"(?:def |class |self\.|cls\.|^ *)(_[a-z]\w*)", text, re.MULTILINE))
        for node in ast.walk(ast.parse(text)):
            match node:
                case ast.Attribute(attr=name) if name not in own:
                    found = [name]
                case ast.Call(func=ast.Name(id="getattr" | "setattr"), args=[_, ast.Constant(value=str(name)), *_]):
                    found = [name]
                case ast.ImportFrom(module=str(module), names=names) if not module.startswith("agentft"):
                    found = [*module.split("."), *(alias.name for alias in names)]
                case ast.Import(names=names):
                    found = [part for alias in names for part in alias.name.split(".")]
                case _:
                    continue
            for name in found:
                if re.match("_[a-zA-Z]", name):
                    uses[name].add(path.name)
    return uses


def test_each_private_name_of_a_library_is_listed_and_in_one_file():
    public = {"_replace", "_asdict", "_exit", "_thread"}  # documented by Python
    uses = {name: places for name, places in _uses().items() if name not in public}
    assert uses.keys() == NAMES.keys(), {name: uses.get(name) for name in uses.keys() ^ NAMES.keys()}
    assert not {name: places for name, places in uses.items() if len(places) > 1}


@pytest.mark.parametrize("name", NAMES)
def test_the_installed_library_has_the_name(name):
    package, file = NAMES[name]
    found = importlib.util.find_spec(package)
    if found is None or (name.startswith("_cuda") and torch.version.cuda is None):
        pytest.skip(f"{package} is not installed, or without CUDA")
    folder = Path((found.submodule_search_locations or [""])[0])
    assert re.search(rb"\b%b\b" % name.encode(), (folder / file).read_bytes()), f"{package}/{file} has no {name}"


def test_the_oldest_torch_that_may_be_installed_has_what_ranks_are_started_with():
    """`LaunchConfig` of torch 2.10 and 2.11 has no `shutdown_timeout`; of its other arguments, all are older."""
    from torch.distributed.launcher.api import LaunchConfig

    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (allowed,) = [each.specifier for each in map(Requirement, project["dependencies"]) if each.name == "torch"]
    assert [allowed.contains(version) for version in ("2.11.0", "2.12.0")] == [False, True]
    launch = ast.parse((PACKAGE / "distributed" / "launch.py").read_text(encoding="utf-8"))
    (call,) = [
        node for node in ast.walk(launch) if isinstance(node, ast.Call) and ast.unparse(node.func) == "LaunchConfig"
    ]
    assert {keyword.arg for keyword in call.keywords} <= LaunchConfig.__dataclass_fields__.keys()
