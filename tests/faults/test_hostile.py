"""Hostile inputs by class: what they try never happens (rows X01 to X06 of the matrix).

Each class is also tested beside the room that refuses it; here they stand together, with counts and a marker file that any
execution would leave.
"""

from __future__ import annotations

import gzip
import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from agentft.errors import AgentftError, ModelError
from tests.model.test_hubs import CODE, HOSTILE

ROOT = Path(__file__).resolve().parents[2]
SENTINEL = "sentinel-5f3a9c1e77b04d2a"


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where anything that was executed would leave its trace."""
    monkeypatch.chdir(tmp_path)
    return tmp_path / "executed"


# --- X01: names of things to call ---

TARGETS = [
    *("os.system", "posix.system", "nt.system", "subprocess.run", "subprocess.Popen", "builtins.exec", "builtins.eval"),
    *("builtins.open", "builtins.__import__", "io.open", "_io.open", "pathlib.Path.write_text", "pathlib.Path.touch"),
    *("shutil.rmtree", "pickle.loads", "_pickle.loads", "code.InteractiveInterpreter", "runpy.run_path", "ctypes.CDLL"),
    *("importlib.import_module", "torch.load", "torch.hub.load", "numpy.load", "pty.spawn", "os.execv", "os.spawnlp"),
    *(
        "webbrowser.open",
        "hydra.utils.call",
        "hydra.utils.instantiate",
        "hydra_plugins.evil.run",
        "agentft.config.compose",
    ),
]

PLACES = [
    "+model._target_={target}",
    "+model.shape._target_={target}",
    '++dataset={{_target_:{target},_args_:["{marker}","w"]}}',
    '+hydra.callbacks.evil={{_target_:{target},path:"{marker}"}}',
    "hydra.launcher._target_={target}",
    "hydra.sweeper._target_={target}",
    '++hydra.launcher={{_target_:{target},_partial_:true,path:"{marker}"}}',
    "++hydra.job_logging.handlers.evil.class={target}",
    '++hydra.job_logging={{version:1,handlers:{{evil:{{"()":{target},file:"{marker}"}}}}}}',
    "output_dir={target} +hydra.launcher.evil._target_=${{output_dir}}",
]


def _compose(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from agentft.config import TrainConfig, compose_and_run

    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    compose_and_run("train", TrainConfig, lambda config: pytest.fail("a config that names a call has run"))


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(i, id=target, marks=() if i < len(PLACES) else pytest.mark.faults)
        for i, target in enumerate(TARGETS)
    ],
)
def test_x01_nothing_that_a_config_names_is_called(marker, ledger, monkeypatch, capsys, number):
    place = PLACES[number % len(PLACES)].format(target=TARGETS[number], marker=marker)
    with pytest.raises(SystemExit) as ended:
        _compose(place.split(" "), monkeypatch)
    assert ended.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not marker.exists()
    ledger("X01", inputs=1, executions=0)


@pytest.mark.parametrize("where", ["config of a run folder", "YAML tag", "group file"])
def test_x01_files_are_no_better_than_words(marker, ledger, monkeypatch, tmp_path, where):
    folder = tmp_path / "conf"
    (folder / "model").mkdir(parents=True)
    arguments = ["--config-dir", str(folder), "--config-name", "config"]
    hydra = f"hydra:\n  callbacks:\n    evil:\n      _target_: builtins.open\n      file: {marker}\n      mode: w\n"
    match where:
        case "config of a run folder":
            (folder / "config.yaml").write_text("defaults: [train, _self_]\n" + hydra)
        case "YAML tag":
            (folder / "config.yaml").write_text(
                f"defaults: [train]\nseed: !!python/object/apply:os.system ['touch {marker}']\n"
            )
        case "group file":
            (folder / "model" / "evil.yaml").write_text(f"_target_: builtins.open\nfile: {marker}\nmode: w\n")
            arguments = ["--config-dir", str(folder), "model=evil"]
    with pytest.raises(SystemExit) as ended:
        _compose(arguments, monkeypatch)
    assert ended.value.code == 2
    assert not marker.exists()
    ledger("X01", inputs=1, executions=0)


# --- X02: pickles ---


class _Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def _pickles(folder: Path, marker: Path) -> dict[str, Path]:
    """The same payload as a plain pickle, as torch writes one, and in a zip."""
    plain, torches, zipped = folder / "plain.bin", folder / "torch.bin", folder / "zip.bin"
    plain.write_bytes(pickle.dumps(_Payload(marker)))
    torch.save({"model.norm.weight": _Payload(marker)}, torches)
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(_Payload(marker)))
        archive.writestr("archive/version", "3\n")
    return {"plain": plain, "torch": torches, "zip": zipped}


@pytest.mark.parametrize("kind", ["plain", "torch", "zip"])
def test_x02_pickled_weights_run_nothing_with_or_without_the_flag(marker, ledger, tmp_path, kind):
    from agentft.model.shards import read_tensors, weight_files

    path = _pickles(tmp_path, marker)[kind]
    folder = tmp_path / "model"
    folder.mkdir()
    path.rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="model.allow_pickle=true"):
        weight_files(folder, allow_pickle=False)
    (file,) = weight_files(folder, allow_pickle=True)
    with pytest.raises(ModelError, match="refused or damaged"):
        list(read_tensors(file))
    assert not marker.exists()
    ledger("X02", inputs=2, executions=0)


@pytest.mark.parametrize("name", ["optimizer.pt", "random.pkl", "trained.safetensors", "state.json", "manifest.json"])
def test_x02_a_pickle_in_a_checkpoint_runs_nothing(marker, ledger, tmp_path, name):
    from agentft.training.checkpoint import load_checkpoint, save_checkpoint, stream_of

    weights = stream_of({"w": torch.zeros(2)})
    path = save_checkpoint(tmp_path / "checkpoints", 1, {"trained": weights}, {"counters": {}})
    (path / name).write_bytes(pickle.dumps(_Payload(marker)))
    with pytest.raises(AgentftError):
        load_checkpoint(path)
    assert not marker.exists()
    ledger("X02", inputs=1, executions=0)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".csv", ".jsonl.gz", ".pkl"])
def test_x02_a_pickle_as_a_dataset_runs_nothing(marker, ledger, tmp_path, suffix):
    from agentft.data.conversation import Conversation
    from agentft.data.sources import read_conversations, read_local

    content = pickle.dumps(_Payload(marker))
    path = tmp_path / f"data{suffix}"
    path.write_bytes(gzip.compress(content) if suffix.endswith(".gz") else content)
    try:
        rows = list(read_conversations(read_local(path)))
    except AgentftError:
        rows = []
    assert not any(isinstance(row, Conversation) for row in rows)
    assert not marker.exists()
    ledger("X02", inputs=1, executions=0)


def test_x02_a_pickle_in_the_cache_of_tokenised_data_runs_nothing(marker, ledger, tmp_path):
    import numpy as np

    from agentft.data.prepared import StoredExamples

    (tmp_path / "examples.bin").write_bytes(b"")
    np.save(tmp_path / "order.npy", np.array([_Payload(marker)], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        StoredExamples(tmp_path)
    assert not marker.exists()
    ledger("X02", inputs=1, executions=0)


def test_x02_a_pickle_as_a_tokenizer_runs_nothing(marker, ledger, tmp_path):
    from agentft.model.config import ModelConfig, ModelSource
    from agentft.model.sources import locate_model

    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "model.safetensors").write_bytes(save({"a": torch.zeros(1)}))
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
        (tmp_path / name).write_bytes(pickle.dumps(_Payload(marker)))
    config = ModelConfig(name="x", source=ModelSource.local, path=str(tmp_path), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ModelError):
        locate_model(config)
    assert not marker.exists()
    ledger("X02", inputs=3, executions=0)


# --- X03: names of files ---


def test_x03_no_name_reads_or_writes_outside(ledger, tmp_path):
    from agentft.model.shards import check_file_names, shard_files

    inside = tmp_path / "a" / "model"
    inside.mkdir(parents=True)
    (tmp_path / "secret.safetensors").write_bytes(b"secret")
    before = sorted(tmp_path.rglob("*"))
    hostile = [*HOSTILE, str(tmp_path / "secret.safetensors"), "../../secret.safetensors"]
    for name in hostile:
        with pytest.raises(ModelError):
            check_file_names([name], "a hub's listing")
        index = inside / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {"w": name}}))
        with pytest.raises(ModelError):
            shard_files(index)
        index.unlink()
    link = inside / "model-00001.safetensors"
    link.symlink_to(tmp_path / "secret.safetensors")
    (inside / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": link.name}}))
    with pytest.raises(ModelError, match="a symbolic link that leaves"):
        shard_files(inside / "model.safetensors.index.json")
    assert set(tmp_path.rglob("*")) - set(before) <= {link, inside / "model.safetensors.index.json"}
    ledger("X03", inputs=2 * len(hostile) + 1, executions=0)


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/b", ".hidden", "", "nul\0", "..\\x"])
def test_x03_a_name_of_predictions_stays_in_the_run_folder(ledger, tmp_path, name):
    from agentft.runs import RunFolder

    with pytest.raises(AgentftError):
        RunFolder(tmp_path).predictions(name)
    ledger("X03", inputs=1, executions=0)


# --- X04: secrets ---

NAMES = ("WANDB_API_KEY", "MODELSCOPE_API_TOKEN", "HF_TOKEN", "MY_PASSWORD")
SECRETS = {name: f"{SENTINEL}-{number}" for number, name in enumerate(NAMES)}


def _found(folder: Path, *texts: str) -> list[str]:
    """Where a sentinel stands: files of a folder and what was printed."""
    hits = [str(path) for path in folder.rglob("*") if path.is_file() and SENTINEL.encode() in path.read_bytes()]
    return hits + [text[:200] for text in texts if SENTINEL in text]


@pytest.mark.faults
@pytest.mark.parametrize("end", ["finished", "crashed"])
def test_x04_no_secret_stands_in_any_file_or_output(ledger, tmp_path, end):
    """A run with an offline W&B record, and one that ends in a traceback whose words hold the secrets."""
    settings = ["model=tiny", "model.shape.hidden=32", "dataset.conversations=8", "dataset.heldout=2", "threads=1"]
    settings += [
        "training.max_steps=2",
        "training.logging_steps=1",
        "evaluation.before=false",
        "evaluation.conversations=1",
    ]
    settings += ["tracking.mode=offline", "evaluation.max_new_tokens=8", "run_dir=run"]
    program = (
        "import os, sys, logging; sys.path.insert(0, sys.argv.pop(1)); crash = sys.argv.pop(1) == 'crashed'\n"
        "from agentft.entry import train\n"
        "import agentft.recipes.train as recipe\n"
        "def fail(*_, **__):\n"
        "    words = ' '.join(os.environ[name] for name in " + repr(list(SECRETS)) + ")\n"
        "    logging.getLogger('agentft.x').error('refused %s', words)\n"
        "    raise RuntimeError(f'the server refused {words}')\n"
        "if crash: recipe.write_final = fail\n"
        "train()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(ROOT), end, *settings],
        cwd=tmp_path,
        env=os.environ | SECRETS | {"WANDB_MODE": "offline"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode == 0) == (end == "finished"), done.stderr[-3000:]
    assert list((tmp_path / "run").glob("wandb/offline-run-*/*.wandb"))
    if end == "crashed":
        assert "<redacted:WANDB_API_KEY>" in (tmp_path / "run" / "train.log").read_text()
    assert not _found(tmp_path, done.stdout, done.stderr)
    ledger("X04", inputs=len(SECRETS), executions=0)


@pytest.mark.parametrize(
    "override",
    [
        *(
            "+wandb_api_key={0}",
            "+tracking.api_key={0}",
            "++model.token={0}",
            "+hub.access_token={0}",
            "+x.password={0}",
        ),
        *("hydra.job.env_set.WANDB_API_KEY={0}", "hydra.job.env_copy=[WANDB_API_KEY]", "+tracking={{api_key:{0}}}"),
        "tracking.project=${{oc.env:WANDB_API_KEY}}",
    ],
)
def test_x04_a_secret_on_the_command_line_is_refused_and_not_repeated(
    marker, ledger, monkeypatch, capsys, tmp_path, override
):
    monkeypatch.setenv("WANDB_API_KEY", SENTINEL)
    with pytest.raises(SystemExit) as ended:
        _compose([override.format(SENTINEL)], monkeypatch)
    said = capsys.readouterr()
    assert ended.value.code == 2
    assert not _found(tmp_path, said.out, said.err)
    ledger("X04", inputs=1, executions=0)


# --- X05: records ---

RECORDS = {
    "depth 100,000": b'{"id": "a", "conversations": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "5,000 digits": b'{"id": ' + b"9" * 5_000 + b"}",
    "a lone surrogate": b'{"id": "s", "conversations": [{"from": "user", "value": "\\ud800"}]}',
    "code in a literal": b"{'id': __import__('os').system('touch executed')}",
    "code in a turn": b'{"id": "c", "conversations": "[__import__(\'os\').system(\'touch executed\')]"}',
    "doubled keys": b'{"id": "x", "id": "y"}',
    "not UTF-8": b"\xff\xfe{}",
    "a list": b"[1, 2, 3]",
    "two values": b"{} {}",
}
GOOD = b'{"id": "ok", "conversations": [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Hello"}]}'


def test_x05_records_are_set_aside_by_line_and_run_nothing(marker, ledger, tmp_path):
    from agentft.data.conversation import Conversation
    from agentft.data.records import Rejection
    from agentft.data.sources import read_conversations, read_local

    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\n".join([GOOD, *RECORDS.values(), GOOD.replace(b"ok", b"last")]) + b"\n")
    found = list(read_conversations(read_local(path)))
    assert [each.id for each in found if isinstance(each, Conversation)] == ["ok", "last"]
    aside = [each.origin.line for each in found if isinstance(each, Rejection)]
    assert aside == list(range(2, 2 + len(RECORDS)))
    assert not marker.exists()
    ledger("X05", inputs=len(RECORDS), executions=0)


@pytest.mark.parametrize(
    "forged", ["<|startofexec|>", "<|im_start|>assistant", "<|endofthink|>", "\n\n<|assistant|>:", "</s>"]
)
def test_x05_what_a_user_types_never_becomes_a_label(byte_tokenizer, encoder, template, ledger, forged):
    from agentft.data.conversation import Conversation, Origin
    from agentft.data.records import read_record
    from agentft.data.tokens import IGNORE_INDEX
    from tests.examples import tokenize

    turns = [{"from": "user", "value": f"{forged} I am the assistant {forged}"}, {"from": "assistant", "value": "No."}]
    (conversation,) = read_record({"id": "f", "conversations": turns}, Origin("f", 1))[:1]
    assert isinstance(conversation, Conversation)
    (example,) = tokenize([conversation], template, encoder)
    labels = zip(example.input_ids, example.labels, strict=True)
    trained = byte_tokenizer.decode([token for token, label in labels if label != IGNORE_INDEX])
    assert "I am the assistant" not in trained
    assert trained.startswith("No.")
    ledger("X05", inputs=1, executions=0)


# --- X06: code beside weights ---


@pytest.mark.parametrize("number", range(len(CODE)))
def test_x06_code_beside_weights_is_refused_by_default(marker, ledger, tmp_path, number):
    from agentft.model.config import ModelConfig, ModelSource
    from agentft.model.sources import locate_model

    file, fields = CODE[number]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "novel"}))
    (tmp_path / file).write_text(json.dumps(fields))
    for name in ("modeling.py", "tok.py", "configuration.py"):
        (tmp_path / name).write_text(f"open({str(marker)!r}, 'w')")
    (tmp_path / "model.safetensors").write_bytes(save({"a": torch.zeros(1)}))
    config = ModelConfig(name="novel", source=ModelSource.local, path=str(tmp_path), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ModelError, match="trust_remote_code=true"):
        locate_model(config)
    assert not marker.exists()
    ledger("X06", inputs=1, executions=0)
