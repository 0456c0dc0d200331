"""The real clients of ModelScope and Hugging Face load datasets from a hub on the loopback interface.

A client reads its settings at import, hence each load runs in an interpreter of its own.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from agentft.data.config import HuggingFaceConfig, ModelScopeConfig
from agentft.data.sources import read_hub
from agentft.errors import DataError
from tests.data.loopback_hub import loopback_hub

needs_modelscope = pytest.mark.skipif(
    importlib.util.find_spec("modelscope") is None, reason="the ModelScope client is not installed"
)
REPOSITORY = Path(__file__).parents[2]
TURNS = [
    {"from": "system", "value": 'Tools:\n\n1. {"name": "f", "parameters": [{"name": "x"}]}'},
    {"from": "user", "value": 'it\'s "me", 你好'},
    {
        "from": "assistant",
        "value": '<|startofthink|>```JSON\n{"api_name": "f", "parameters": {"x": "\'"}}\n```<|endofthink|>',
    },
]
CALLS = [{"x": "'"}]
SCRIPT = """
import json, sys
from agentft.data.config import HuggingFaceConfig, ModelScopeConfig
from agentft.data.conversation import Conversation
from agentft.data.sources import read_conversations, read_hub
from agentft.errors import DataError
found = []
for kind, split, settings in json.loads(sys.argv[1]):
    try:
        config = (ModelScopeConfig if kind == "modelscope" else HuggingFaceConfig)(name=kind, **settings)
        items = read_conversations(read_hub(config, split))
        found.append([[str(i.origin), i.id, [m.source_text or m.text for m in i.messages],
                       [call.arguments for call in i.tool_calls]] if isinstance(i, Conversation) else
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
from agentft.model.sources import byte_tokenizer
from agentft.data.prepare import prepare_data
logging.basicConfig(level=logging.INFO, format="%(name)s %(message)s")
tokenizer = byte_tokenizer()
template, encoder = MsagentTemplate(tokenizer.eos_token), SegmentEncoder(tokenizer)
config = ModelScopeConfig(name="hub", id="damo/MSAgent-Bench", test_split="validation", cache_dir=sys.argv[1])
data = prepare_data(config, template, encoder)
print("FOUND" + json.dumps([sorted(data.train.ids), data.fingerprint]))
"""


def load_all(address: str, home: Path, *loads: tuple[str, str, dict[str, str]]) -> list:
    """Load splits, each given as the kind of hub, the split and the settings of the dataset."""
    given = [(kind, split, {"cache_dir": str(home / kind), **settings}) for kind, split, settings in loads]
    return run_client(address, home, SCRIPT, json.dumps(given))[0]


def run_client(address: str, home: Path, script: str, argument: str) -> tuple[list, str]:
    """What the script found, with the client turned to the hub at `address`, and what it said meanwhile."""
    settings = {
        "MODELSCOPE_ENDPOINT": address,
        "MODELSCOPE_CACHE": str(home),
        "MODELSCOPE_HOME": str(home),
        "CI_TEST": "True",
    }
    settings |= {"MODELSCOPE_DOWNLOAD_INTRA_CLOUD": "false", "MODELSCOPE_API_MAX_RETRIES": "1", "HF_HOME": str(home)}
    settings |= {"HF_ENDPOINT": address, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
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


@needs_modelscope
def test_the_splits_of_a_dataset_load_with_their_rows_as_origin(tmp_path: Path) -> None:
    as_text = [{"id": f"t{n}", "conversations": repr(TURNS)} for n in range(3)]
    broken = {"id": "broken", "conversations": "[{'from': 'user', 'value': os.getcwd()}]"}
    datasets = {
        "damo/MSAgent-Bench": {"train.jsonl": jsonl(*as_text[:2], broken), "dev.jsonl": jsonl(as_text[2])},
        "modelscope/ms_hackathon_23_agent_train_dev": {"train.jsonl": jsonl({"id": "list", "conversations": TURNS})},
    }
    with loopback_hub(datasets) as (address, requests):
        train, validation, as_list, no_split, no_dataset = load_all(
            address,
            tmp_path,
            ("modelscope", "train", {"id": "damo/MSAgent-Bench"}),
            ("modelscope", "validation", {"id": "damo/MSAgent-Bench"}),
            ("modelscope", "train", {"id": "modelscope/ms_hackathon_23_agent_train_dev"}),
            ("modelscope", "nope", {"id": "damo/MSAgent-Bench"}),
            ("modelscope", "train", {"id": "damo/nothing"}),
        )
    texts = [turn["value"] for turn in TURNS]
    assert not isinstance(train, str), train
    assert train[:2] == [
        ["damo/MSAgent-Bench:1", "t0", texts, CALLS],
        ["damo/MSAgent-Bench:2", "t1", texts, CALLS],
    ]
    assert train[2] == ["damo/MSAgent-Bench:3", "conversations_unreadable_text"]
    assert validation == [["damo/MSAgent-Bench:1", "t2", texts, CALLS]]
    assert as_list == [["modelscope/ms_hackathon_23_agent_train_dev:1", "list", texts, CALLS]]
    assert "split 'nope'" in no_split
    assert "validation" in no_split, "the message lists the splits there are"
    assert "damo/nothing" in no_dataset
    assert any("/repo/tree" in request for request in requests)


def test_a_dataset_of_the_hugging_face_hub_loads_by_split_and_subset(tmp_path: Path) -> None:
    """Parquet unifies the structs of its rows: the nulls that this puts into a call are no arguments."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    def table(**arguments: dict) -> bytes:
        rows = [
            {
                "id": name,
                "messages": [
                    {"role": "user", "content": f"question {name}"},
                    {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": given}}]},
                ],
            }
            for name, given in arguments.items()
        ]
        sink = pyarrow.BufferOutputStream()
        parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
        return sink.getvalue().to_pybytes()

    card = (
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - {split: train, path: data/train-*}\n"
        "  - {split: test, path: data/test-*}\n- config_name: other\n  data_files: other.parquet\n---\n"
    )
    files = {
        "README.md": card.encode(),
        "data/train-00000-of-00001.parquet": table(a={"city": "Rome"}, b={"day": 2}),
        "data/test-00000-of-00001.parquet": table(c={"city": "Oslo", "day": 1}),
        "other.parquet": table(x={"k": 1}),
    }
    with loopback_hub({"team/calls": files}) as (address, requests):
        train, test, subset, no_split, no_dataset = load_all(
            address,
            tmp_path,
            ("huggingface", "train", {"id": "team/calls"}),
            ("huggingface", "test", {"id": "team/calls"}),
            ("huggingface", "train", {"id": "team/calls", "subset": "other"}),
            ("huggingface", "nope", {"id": "team/calls"}),
            ("huggingface", "train", {"id": "team/nothing"}),
        )
    assert not isinstance(train, str), (train, requests)
    assert train == [
        ["team/calls:1", "a", ["question a", ""], [{"city": "Rome"}]],
        ["team/calls:2", "b", ["question b", ""], [{"day": 2}]],
    ]
    assert [row[1:] for row in test] == [["c", ["question c", ""], [{"city": "Oslo", "day": 1}]]]
    assert subset == [["team/calls:1", "x", ["question x", ""], [{"k": 1}]]]
    assert "split 'nope'" in no_split
    assert "team/nothing" in no_dataset
    assert any("/datasets/team/calls/resolve/" in request for request in requests)


@pytest.mark.parametrize("bad_id", ["", "name", "../etc/passwd", "/etc/passwd", "a/b/c", "a/..", "http://x/y", "a/b\n"])
def test_an_id_that_is_no_owner_and_name_is_refused_before_the_client_sees_it(bad_id: str) -> None:
    with pytest.raises(DataError, match="no dataset id"):
        read_hub(HuggingFaceConfig(name="h", id=bad_id), "train")


def test_a_local_folder_of_the_same_name_is_not_read_by_accident(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "damo" / "MSAgent-Bench").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="local path"):
        read_hub(ModelScopeConfig(name="m", id="damo/MSAgent-Bench"), "train")


@needs_modelscope
@pytest.mark.slow
def test_tokens_of_a_hub_come_from_the_cache_until_its_client_has_other_tables(tmp_path, monkeypatch) -> None:
    """The client keeps its tables by the name of the revision: that `master` has moved it sees in an empty folder only."""
    monkeypatch.setenv("AGENTFT_DATA_CACHE", str(tmp_path / "tokens"))
    other = [{**turn, "value": turn["value"].replace("f", "g")} for turn in TURNS]
    exam = [TURNS[0], {"from": "user", "value": "another question"}, TURNS[2]]

    def prepare(turns: list, downloads: str) -> tuple[list, str]:
        record = {"id": "t", "conversations": repr(turns)}
        files = {"train.jsonl": jsonl(record), "dev.jsonl": jsonl({"id": "exam", "conversations": repr(exam)})}
        with loopback_hub({"damo/MSAgent-Bench": files}) as (address, _):
            return run_client(address, tmp_path, PREPARE, str(tmp_path / downloads))

    first, said_first = prepare(TURNS, "one")
    again, said_again = prepare(TURNS, "one")
    assert first == again
    assert "from the cache" not in said_first
    assert "from the cache" in said_again
    changed, said_changed = prepare(other, "two")
    assert "from the cache" not in said_changed
    assert changed != first
