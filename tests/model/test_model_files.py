"""The models' files: each says where it is, under which licence and how large, and docs/models.md lists them all.

That each composes and fits its schema is held by tests/test_config.py, option by option.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from agentft.config import conf_dir
from agentft.model.config import ModelConfig

DOCS = Path(__file__).resolve().parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- models: begin -->\n", "<!-- models: end -->"
FILES = {path.stem: yaml.safe_load(path.read_text("utf-8")) for path in sorted((conf_dir() / "model").glob("*.yaml"))}
ANY = {"auto", "tiny"}
"""Any model, and random weights: neither has a licence or a size of its own."""


def table() -> str:
    lines = ["| `model=` | ModelScope | Hugging Face | context | notes |", "|---|---|---|---|---|"]
    for name, settings in FILES.items():
        cells = [settings.get("modelscope_id"), settings.get("huggingface_id")]
        shown = [f"`{cell}`" if cell else "" for cell in cells]
        lines.append(f"| `{name}` | {' | '.join(shown)} | {settings['context']:,} | {settings['notes']} |")
    return "\n".join(lines) + "\n"


def test_the_docs_list_every_model() -> None:
    before, _, rest = DOCS.read_text("utf-8").partition(BEGIN)
    found, _, after = rest.partition(END)
    if os.environ.get("AGENTFT_UPDATE_DOCS") == "1":
        DOCS.write_text(before + BEGIN + table() + END + after, encoding="utf-8")
        return
    assert found == table(), "run AGENTFT_UPDATE_DOCS=1 pytest tests/model/test_model_files.py"


@pytest.mark.parametrize("name", sorted(FILES.keys() - ANY))
def test_a_file_names_place_licence_and_size(name: str) -> None:
    settings: dict[str, Any] = FILES[name]
    assert settings["name"] == name
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", settings["modelscope_id"])
    assert re.search(r"licence|Apache-2\.0", settings["notes"])
    assert re.search(r"\d(\.\d+)?[BM] parameters", settings["notes"])
    assert re.search(r"\d GB|memory", settings["notes"])
    assert settings.keys() - {"defaults"} <= ModelConfig.__dataclass_fields__.keys()


def test_the_issues_models_are_there() -> None:
    wanted = {"modelscope-agent-7b", "qwen-7b", "baichuan-7b", "llama2-7b", "auto"}
    wanted |= {f"qwen2.5-{size}b" for size in ("0.5", "1.5", "3", "7")}
    wanted |= {f"qwen3-{size}b" for size in ("0.6", "1.7", "4", "8")}
    wanted |= {"llama3.1-8b", "llama3.2-1b", "llama3.2-3b", "smollm2-135m", "smollm2-360m", "smollm2-1.7b"}
    assert wanted <= FILES.keys()
