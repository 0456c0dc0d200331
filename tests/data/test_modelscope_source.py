"""The real ModelScope client loads MSAgent-Bench from a hub on the loopback interface.

The client reads its settings at import, hence each load runs in an interpreter of its own.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from agentft.data.modelscope_rows import read_modelscope
from agentft.errors import DataError

pytest.importorskip("modelscope", reason="the ModelScope client is not installed")

REPOSITORY = Path(__file__).parents[2]
TURNS = [
    {"from": "system", "value": 'Tools:\n\n1. {"name": "f", "parameters": [{"name": "x"}]}'},
    {"from": "user", "value": 'it\'s "me", 你好'},
    {
        "from": "assistant",
        "value": '<|startofthink|>```JSON\n{"api_name": "f", "parameters": {"x": "\'"}}\n```<|endofthink|>',
    },
]
SCRIPT = """
import json, sys
from agentft.data.modelscope_rows import read_modelscope
from agentft.data.conversation import Conversation
from agentft.data.sources import read_conversations
from agentft.errors import DataError
found = []
for load in json.loads(sys.argv[1]):
    try:
        items = read_conversations(read_modelscope(**load))
        found.append([[str(i.origin), i.id, [turn.text for turn in i.turns]] if isinstance(i, Conversation) else
                      [str(i.origin), i.reason] for i in items])
    except DataError as error:
        found.append(str(error))
print("FOUND" + json.dumps(found))
"""


PREPARE = """
import json, logging, sys
from agentft.data.config import ModelScopeConfig
from agentft.data.render import MsagentTemplate
from agentft.data.tokens import SegmentEncoder
from agentft.model.random_weights import byte_tokenizer
from agentft.recipes.prepare import prepare_data
logging.basicConfig(level=logging.INFO, format="%(name)s %(message)s")
tokenizer = byte_tokenizer()
template, encoder = MsagentTemplate(tokenizer.eos_token), SegmentEncoder(tokenizer)
config = ModelScopeConfig(name="hub", id="damo/MSAgent-Bench", test_split="validation", cache_dir=sys.argv[1])
data = prepare_data(config, template, encoder)
print("FOUND" + json.dumps([sorted(data.train.ids), data.fingerprint]))
"""


def _hub_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("loopback_hub", Path(__file__).with_name("loopback_hub.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_all(address: str, home: Path, *loads: dict[str, str]) -> list:
    given = json.dumps([{"cache_dir": str(home / "data"), **load} for load in loads])
    return run_client(address, home, SCRIPT, given)[0]


def run_client(address: str, home: Path, script: str, argument: str) -> tuple[list, str]:
    """What the script found, with the client turned to the hub at `address`, and what it said meanwhile."""
    settings = {
        "MODELSCOPE_ENDPOINT": address,
        "MODELSCOPE_CACHE": str(home),
        "MODELSCOPE_HOME": str(home),
        "CI_TEST": "True",
    }
    settings |= {"MODELSCOPE_DOWNLOAD_INTRA_CLOUD": "false", "MODELSCOPE_API_MAX_RETRIES": "1", "HF_HOME": str(home)}
    settings |= {"PYTHONPATH": str(REPOSITORY), "HOME": str(home)}
    settings |= {"HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0"}  # the client obeys them too; the hub here is local
    run = subprocess.run(
        [sys.executable, "-c", script, argument],
        env=os.environ | settings,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        cwd=home,
    )
    answers = [line for line in run.stdout.splitlines() if line.startswith("FOUND")]
    assert answers, run.stderr[-3000:]
    return json.loads(answers[0].removeprefix("FOUND")), run.stderr


def jsonl(*records: dict) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def test_the_splits_of_a_dataset_load_with_their_rows_as_origin(tmp_path: Path) -> None:
    as_text = [{"id": f"t{n}", "conversations": repr(TURNS)} for n in range(3)]
    broken = {"id": "broken", "conversations": "[{'from': 'user', 'value': os.getcwd()}]"}
    datasets = {
        "damo/MSAgent-Bench": {"train.jsonl": jsonl(*as_text[:2], broken), "dev.jsonl": jsonl(as_text[2])},
        "modelscope/ms_hackathon_23_agent_train_dev": {"train.jsonl": jsonl({"id": "list", "conversations": TURNS})},
    }
    with _hub_module().loopback_hub(datasets) as (address, requests):
        train, validation, as_list, no_split, no_dataset = load_all(
            address,
            tmp_path,
            {"dataset_id": "damo/MSAgent-Bench", "split": "train"},
            {"dataset_id": "damo/MSAgent-Bench", "split": "validation"},
            {"dataset_id": "modelscope/ms_hackathon_23_agent_train_dev", "split": "train"},
            {"dataset_id": "damo/MSAgent-Bench", "split": "nope"},
            {"dataset_id": "damo/nothing", "split": "train"},
        )
    texts = [turn["value"] for turn in TURNS]
    assert not isinstance(train, str), train
    assert train[:2] == [["damo/MSAgent-Bench:1", "t0", texts], ["damo/MSAgent-Bench:2", "t1", texts]]
    assert train[2] == ["damo/MSAgent-Bench:3", "conversations_unreadable_text"]
    assert validation == [["damo/MSAgent-Bench:1", "t2", texts]]
    assert as_list == [["modelscope/ms_hackathon_23_agent_train_dev:1", "list", texts]]
    assert "split 'nope'" in no_split
    assert "validation" in no_split, "the message lists the splits there are"
    assert "damo/nothing" in no_dataset
    assert any("/repo/tree" in request for request in requests)


@pytest.mark.parametrize("bad_id", ["", "name", "../etc/passwd", "/etc/passwd", "a/b/c", "a/..", "http://x/y", "a/b\n"])
def test_an_id_that_is_no_owner_and_name_is_refused_before_the_client_sees_it(bad_id: str) -> None:
    with pytest.raises(DataError, match="no dataset id"):
        read_modelscope(bad_id)


def test_a_local_folder_of_the_same_name_is_not_read_by_accident(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "damo" / "MSAgent-Bench").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="local path"):
        read_modelscope("damo/MSAgent-Bench")


@pytest.mark.slow
def test_tokens_of_a_hub_come_from_the_cache_until_its_client_has_other_tables(tmp_path, monkeypatch) -> None:
    """The client keeps its tables by the name of the revision: that `master` has moved it sees in an empty folder only."""
    monkeypatch.setenv("AGENTFT_DATA_CACHE", str(tmp_path / "tokens"))
    other = [{**turn, "value": turn["value"].replace("f", "g")} for turn in TURNS]
    exam = [TURNS[0], {"from": "user", "value": "another question"}, TURNS[2]]

    def prepare(turns: list, downloads: str) -> tuple[list, str]:
        record = {"id": "t", "conversations": repr(turns)}
        files = {"train.jsonl": jsonl(record), "dev.jsonl": jsonl({"id": "exam", "conversations": repr(exam)})}
        with _hub_module().loopback_hub({"damo/MSAgent-Bench": files}) as (address, _):
            return run_client(address, tmp_path, PREPARE, str(tmp_path / downloads))

    first, said_first = prepare(TURNS, "one")
    again, said_again = prepare(TURNS, "one")
    assert first == again
    assert "from the cache" not in said_first
    assert "from the cache" in said_again
    changed, said_changed = prepare(other, "two")
    assert "from the cache" not in said_changed
    assert changed != first
