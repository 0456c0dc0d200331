"""A start that is refused, or has nothing to do, leaves the run folder as it was, byte for byte; a folder allows no code."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import agentft.audit
import agentft.export
from agentft import entry, worker
from agentft.errors import DataError
from agentft.model.config import TrustConfig
from agentft.recipes.config import saved_config, trained_config
from agentft.runs import RunFolder, read_json
from agentft.tracking import read_metrics

SHORT = Path(__file__).parent.parent / "faults" / "short.jsonl"

TRAINED = [
    *("model=tiny", "model.shape.hidden=16", "model.shape.intermediate=32", "dataset=local", "dataset.test_ratio=0.2"),
    *(
        "training.gradient_accumulation_steps=2",
        "training.max_steps=4",
        "training.save_steps=2",
        "training.logging_steps=1",
    ),
    *(
        "training.learning_rate=0.01",
        "evaluation.eval_steps=2",
        "evaluation.best_metric=loss",
        "evaluation.before=false",
    ),
    *(
        "evaluation.max_new_tokens=4",
        "evaluation.bootstrap_samples=20",
        "evaluation.examples=0",
        "tracking=disabled",
        "threads=1",
    ),
]

PROGRAMS: dict[str, Callable[[], object]] = {
    "train": entry.train,
    "evaluate": entry.evaluate,
    "worker": worker.main,
    "export": agentft.export.main,
    "audit": agentft.audit.main,
}


@pytest.fixture
def command(tmp_path, monkeypatch, capfd):
    """Run a program's real entry point in this process; (exit code, lines it ends with in its own name)."""
    monkeypatch.chdir(tmp_path)

    def call(line: str | list[str]) -> tuple[int, str]:
        program, *words = line.split() if isinstance(line, str) else line
        monkeypatch.setattr(sys, "argv", [f"{program}.py", *words])
        capfd.readouterr()
        try:
            PROGRAMS[program]()
        except SystemExit as end:
            return int(end.code or 0), capfd.readouterr().err
        return 0, capfd.readouterr().err

    return call


def digest(folder: Path) -> str:
    """Of the names and contents of all that is in it, empty folders and hidden files too."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        found.update(f"{path.relative_to(folder)}\0".encode())
        found.update(path.read_bytes() if path.is_file() else b"")
    return found.hexdigest()


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A finished run, its data beside it."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copy(SHORT, folder / "data.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        words = [*TRAINED, f"dataset.path={folder}/data.jsonl", f"run_dir={folder}/run"]
        patch.setattr(sys, "argv", ["train.py", *words])
        entry.train()
    assert read_json(folder / "run" / "status.json")["state"] == "finished"
    return folder


@pytest.fixture
def run(source, tmp_path) -> Path:
    shutil.copytree(source / "run", tmp_path / "run")
    return tmp_path / "run"


SAME = f"train {' '.join(TRAINED)} dataset.path={{data}} run_dir=run"

UNCHANGED = [
    ("train run_dir=run", 0, "run: this run is finished, nothing is left to do"),
    (SAME, 0, "run: this run is finished"),
    (
        "train run_dir=run training.pause_at_fraction=0.5 training.save_steps=1 tracking=wandb",
        0,
        "this run is finished",
    ),
    ("train run_dir=run sft_type.rank=4", 2, "belongs to another training: sft_type.rank: 8 -> 4. Give"),
    ("train run_dir=run sft_type=full", 2, "sft_type: 'lora' -> 'full'"),
    ("train run_dir=run model=smollm2-135m", 2, "model: 'tiny' -> 'smollm2-135m'"),
    ("train run_dir=run seed=7 training.learning_rate=0.02", 2, "seed: 42 -> 7; training.learning_rate: 0.01"),
    ("train run_dir=run dataset=synthetic", 2, "dataset: 'local' -> 'synthetic'"),
    ("train run_dir=run dataset.test_ratio=0.3", 2, "dataset.test_ratio: 0.2 -> 0.3"),
    ("train run_dir=run training=short training.max_steps=9", 2, "training.max_steps: 4 -> 9"),
    ("train run_dir=run threads=2", 2, "threads: 1 -> 2"),
    ("train run_dir=run model.dtype=bf16", 2, "model.dtype: 'fp32' -> 'bf16'"),
    ("train run_dir=run training.resume=never", 2, "has checkpoints; training.resume=auto resumes"),
    ("train run_dir=run experiment=msagent_7b_lora", 2, "the run in run is of experiment=null"),
    ("train run_dir=run hydra.run.dir=other", 2, "two folders for one run"),
    ("train run_dir=run sft_type.rnak=4", 2, "did you mean sft_type.rank?"),
    ("train -m run_dir=run seed=1,2", 2, "names one folder, a sweep has many"),
    ("train hydra.run.dir=run model=tiny", 2, "belongs to another training: dataset: 'local' -> 'synthetic'"),
    ("evaluate run=run model.dtype=fp32", 2, "model.dtype: is the run's, which stays as it was trained"),
    ("evaluate run=run dataset=synthetic", 2, "dataset: is the run's, which stays as it was trained"),
    ("evaluate run=run evaluation.batch=0", 2, "evaluation.batch=0: expected a whole number from 1"),
    ("evaluate run=run checkpoint=7", 1, "checkpoint=7: not there; this run has steps 2, 4"),
    ("evaluate run={data}/../run output=run", 2, "output=run: holds a training"),
    ("export run=run checkpoint=7", 1, "checkpoint=7: not there"),
    ("export run=run out=run/final", 1, "is there already"),
    ("audit --config-dir run --config-name config", 2, "names a TrainConfig, this program takes a AuditConfig"),
]


ALIKE = (
    "dataset=synthetic",
    "test_ratio",
    "training=short",
    "rnak",
    "run=run dataset",
    "evaluation.batch=0",
    "sft_type=full",
)
"""Words of those that `make test` leaves to the whole run: they go the way of another."""


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        pytest.param(*each, id=each[0], marks=pytest.mark.slow if any(word in each[0] for word in ALIKE) else ())
        for each in UNCHANGED
    ],
)
def test_a_start_that_is_refused_or_has_nothing_to_do_changes_nothing(run, source, command, line, code, words):
    before = digest(run)
    found = command(line.format(data=source / "data.jsonl").replace("data.jsonl/../", ""))
    assert (found[0], digest(run)) == (code, before), found[1]
    last = found[1].splitlines()[-1]
    assert words in last
    assert code == 0 or last.startswith(f"{line.split()[0]}.py: ")
    assert "Traceback" not in found[1]


def test_a_training_without_an_exam_trains_on_all_rows_where_nothing_is_measured(source, command, tmp_path):
    words = [*TRAINED, f"dataset.path={source}/data.jsonl", "run_dir=alone", "dataset.test_ratio=0"]
    code, said = command(["train", *words])
    assert (code, (tmp_path / "alone" / "data").exists()) == (2, False)
    assert "dataset.test_ratio=0: nothing is held out, but evaluation asks for it" in said.splitlines()[-1]
    assert command(["train", *words, "evaluation.eval_steps=0", "evaluation.after=false"])[0] == 0
    manifest = read_json(tmp_path / "alone" / "data" / "manifest.json")
    assert manifest["heldout"]["conversations"] == 0
    assert manifest["train"]["conversations"] == manifest["rows"]


ROWS = {"query": "q", "response": "a", "messages": None}
UNUSABLE = {
    "rows.jsonl": ("none of 20 rows can be used", ("20 conversations_missing", "query and response", "xlam (query,")),
    "pointer.jsonl": ("pointer.jsonl: a Git LFS pointer", ("git lfs pull",)),
    "absent.jsonl": ("absent.jsonl: no such file or folder", ()),
    "saved": ("none of 1 rows can be used", ("data-00000-of-00001.arrow",)),
}
"""Data that cannot be used: how the account begins, and what it names."""


def _unusable_data(folder: Path) -> None:
    (folder / "rows.jsonl").write_text("".join(json.dumps(ROWS | {"n": n}) + "\n" for n in range(20)))
    (folder / "pointer.jsonl").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    (folder / "saved").mkdir()
    (folder / "saved" / "data-00000-of-00001.arrow").write_bytes(b"ARROW1 cut")


@pytest.mark.parametrize("name", UNUSABLE)
def test_data_that_cannot_be_used_ends_with_its_account_alone(name, command, tmp_path):
    _unusable_data(tmp_path)
    begin, named = UNUSABLE[name]
    words = [word for word in TRAINED if not word.startswith("evaluation.")]
    code, said = command(["train", *words, f"dataset.path={name}", "run_dir=failed"])
    account = said[said.index("train.py: ") :]
    assert code == 1
    assert account.startswith(f"train.py: {begin}"), account
    assert all(word in account for word in named), account
    assert len(account.splitlines()) <= 6
    assert said.count(begin) == 1, "it is said once"
    assert "Traceback" not in said
    assert "Traceback" in (tmp_path / "failed" / "train.log").read_text(encoding="utf-8")


def test_the_traceback_of_a_data_error_is_there_on_request(command, capfd, monkeypatch):
    """The interpreter prints it, as of any error that reaches it; nobody prints another."""
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(DataError, match="^absent.jsonl: no such file or folder"):
        command(["train", *TRAINED, "dataset.path=absent.jsonl", "run_dir=failed"])
    assert "Traceback" not in capfd.readouterr().err


def test_a_folder_in_which_a_training_runs_is_refused_in_one_line(run, command):
    with RunFolder.create(run) as held:
        held.begin()
        before = digest(run)
        for line in ("train run_dir=run", "evaluate run=run"):
            code, said = command(line)
            assert (code, digest(run), said.count("\n")) == (1, before, 1)
            assert "is in use by process" in said


@pytest.fixture
def changed_data(run, tmp_path):
    """The run, with one conversation fewer than it was trained on and held out from."""
    lines = SHORT.read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "data.jsonl").write_text("".join(lines[1:]), encoding="utf-8")
    tree = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    tree["dataset"]["path"] = str(tmp_path / "data.jsonl")
    (run / "config.yaml").write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    return run


def test_other_data_is_refused_by_training_and_evaluation(changed_data, command):
    before = digest(changed_data)
    code, said = command("train run_dir=run evaluation.max_new_tokens=5")
    assert (code, digest(changed_data)) == (2, before)
    assert "data: " in said
    code, said = command("evaluate run=run")
    assert (code, digest(changed_data)) == (1, before)
    assert "held-out conversations" in said
    assert "other_data=true scores it all the same" in said


@pytest.mark.parametrize("mode", ["teacher_forced", "likelihood"])
def test_other_data_is_scored_loudly_where_that_is_typed(changed_data, command, mode):
    code, said = command(f"evaluate run=run other_data=true evaluation.mode={mode}")
    assert code == 0, said
    assert "OTHER DATA: " in (changed_data / "evaluate.log").read_text(encoding="utf-8")
    name = "evaluate-final" if mode == "teacher_forced" else "likelihood-final"
    report = read_json(changed_data / "metrics" / f"{name}.json")
    assert len((report.get("identity") or report)["other_data"]) == 64


def test_run_dir_alone_goes_on_with_the_settings_of_the_run(source, tmp_path, command):
    half = SAME.format(data=source / "data.jsonl").replace("run_dir=run", "run_dir=cut")
    assert command(f"{half} training.pause_at_fraction=0.5")[0] == 0
    assert read_json(tmp_path / "cut" / "status.json")["state"] == "paused"
    assert command("train run_dir=cut")[0] == 0
    ends = [
        [(row["step"], row["train/loss"]) for row in read_metrics(folder / "metrics.jsonl") if "train/loss" in row]
        for folder in (source / "run", tmp_path / "cut")
    ]
    assert ends[0] == ends[1]
    assert read_json(tmp_path / "cut" / "status.json")["state"] == "finished"
    assert not (tmp_path / "cut" / ".hydra").exists()


def test_an_exam_of_a_finished_run_may_be_asked_anew(run, command):
    assert (
        command("train run_dir=run evaluation.max_new_tokens=2 evaluation=short evaluation.bootstrap_samples=20")[0]
        == 0
    )
    assert read_json(run / "metrics" / "after.json")["identity"]["max_new_tokens"] == 2
    assert saved_config(run).sft_type.rank == 8


# --- What allows code or pickles ---


@pytest.fixture(params=["trust_remote_code", pytest.param("allow_pickle", marks=pytest.mark.slow)])
def received(request, run) -> str:
    """A run folder that allows it by itself; the setting's name."""
    file = run / "config.yaml"
    text = file.read_text(encoding="utf-8")
    assert text.count("\nmodel:\n") == 1
    file.write_text(text.replace("\nmodel:\n", f"\nmodel:\n  {request.param}: true\n"), encoding="utf-8")
    options = run / "model"
    options.mkdir()
    (options / "theirs.yaml").write_text(f"defaults: [tiny, _self_]\n{request.param}: true\n", encoding="utf-8")
    return request.param


@pytest.mark.parametrize(
    "line",
    [
        "train run_dir=run",
        "train --config-dir run --config-name config",
        "worker --config-dir run --config-name config",
        "train --config-dir run model=theirs",
        "train -m --config-dir run model=tiny,theirs",
        "audit --config-dir run model=theirs",
        "evaluate run=run",
        "evaluate run=run distributed=ddp distributed.nproc=2",
        "export run=run",
    ],
)
def test_a_received_folder_allows_no_code_and_no_pickle(received, run, command, line):
    before, there = digest(run), sorted(run.parent.iterdir())
    code, said = command(line)
    assert (code, digest(run), sorted(run.parent.iterdir())) == (2, before, there), said
    assert f"model.{received}=true stands in " in said
    assert "run" in said.partition("stands in ")[2].split(" and ")[0]
    assert said.count("\n") == 1


def test_what_the_command_line_allows_counts(received, run, command):
    assert command(f"train run_dir=run model.{received}=true")[0] == 0
    typed = TrustConfig(**{received: True})
    assert getattr(trained_config(run, typed).model, received)
    code, said = command(f"evaluate run=run model.{received}=true checkpoint=7")
    assert (code, "checkpoint=7: not there" in said) == (1, True)
