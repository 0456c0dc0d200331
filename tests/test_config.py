"""Composition: what composes, what is refused and in which words, and what a saved config gives back."""

import dataclasses
import enum
import functools
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from omegaconf import DictConfig, OmegaConf

from agentft.config import (
    EvaluateConfig,
    ExportConfig,
    Setting,
    TrainConfig,
    compose,
    compose_and_run,
    conf_dir,
    config_from_yaml,
    config_to_yaml,
    options,
    register_schemas,
    saved_config,
    settings,
    to_config,
    to_train_config,
)
from agentft.config.compose import without_hydra
from agentft.config.explain import help_text
from agentft.errors import ConfigError, RunError
from agentft.recipes.config import ROOTS, SCHEMAS, primary_config, saved_settings
from agentft.secrets import is_secret_name
from agentft.settings import members

REPOSITORY = Path(__file__).parent.parent
REQUIRED = {
    "dataset=local": ["dataset.path=conversations.jsonl"],
    "dataset=huggingface": ["dataset.id=owner/name"],
}
"""Options that cannot stand without a value."""

EVERY_OPTION = [(group, option) for group in [*SCHEMAS, "experiment"] for option in options(group)]


SWEEPS = [path for path in sorted((REPOSITORY / "sweeps").glob("*.yaml")) if "program:" not in path.read_text("utf-8")]
"""Those that Hydra composes; the others are sweeps of W&B."""


@functools.cache
def composition(config_name: str, overrides: tuple[str, ...], config_dir: Path | None) -> DictConfig:
    """Hydra's own node included; composed once, because it takes a tenth of a second."""
    return compose(config_name, overrides, config_dir, with_hydra=True)


def composed(*overrides: str, config_name: str = "train", config_dir: Path | None = None) -> TrainConfig:
    return to_train_config(without_hydra(composition(config_name, (*overrides, "run_dir=runs/test"), config_dir)))


# --- What composes ---


def test_the_defaults_are_a_small_model_with_lora_on_synthetic_conversations() -> None:
    config = composed()
    assert (config.model.name, config.sft_type.name, config.dataset.name) == ("smollm2-135m", "lora", "synthetic")
    assert (config.distributed.name, config.tracking.name) == ("single", "wandb")
    assert config.training.learning_rate == 1e-3, "a small model takes ten times the method's rate"
    assert composed("model=qwen-7b").training.learning_rate == 1e-4


@pytest.mark.parametrize(("group", "option"), EVERY_OPTION, ids="=".join)
def test_every_option_composes_alone(group: str, option: str) -> None:
    choice = f"{group}={option}"
    config = composed(choice, *REQUIRED.get(choice, []))
    part = getattr(config, group)
    if group == "experiment":
        assert part == option, "an experiment names itself"
    elif hasattr(part, "name"):
        assert part.name == option, "an option names itself: the run folder is called after it"


@pytest.mark.parametrize(("group", "option"), EVERY_OPTION, ids="=".join)
def test_every_option_opens_with_a_sentence(group: str, option: str) -> None:
    text = (conf_dir() / group / f"{option}.yaml").read_text(encoding="utf-8")
    assert re.match(r"(# @package _global_\n)?# \w.*[.:\w]", text)
    assert "_target_" not in text


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_sweep_composes(path: Path) -> None:
    whole = composition(path.stem, ("run_dir=runs/test",), path.parent)
    assert whole.hydra.mode.name == "MULTIRUN"
    first = [f"{name}={str(values).split(',')[0]}" for name, values in whole.hydra.sweeper.params.items()]
    composed(*first, config_name=path.stem, config_dir=path.parent)


@pytest.mark.parametrize("path", sorted((REPOSITORY / "sweeps").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_sweep_opens_with_its_question_its_command_and_its_time(path: Path) -> None:
    lines = itertools.takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
    header = " ".join(line.lstrip("# ") for line in lines)
    assert header.startswith("Question: ")
    assert f"--config-name {path.stem} " in header or f"wandb sweep sweeps/{path.name} " in header
    assert re.search(r"Expected time: .*\b(minutes?|hours?|steps)\b", header)


def test_evaluate_composes() -> None:
    config = to_config(compose("evaluate", ["run=runs/some", "checkpoint=best"]), EvaluateConfig)
    assert (config.run, config.checkpoint, config.evaluation) == ("runs/some", "best", None)
    chosen = compose("evaluate", ["run=runs/some", "evaluation=default", "evaluation.batch=3"])
    assert to_config(chosen, EvaluateConfig).evaluation.batch == 3


def test_every_composition_is_what_it_was(golden_folder: Path, update_golden: bool) -> None:
    """What `--cfg job --resolve` shows and where Hydra writes: the defaults whole, of each option what it changes.

    To renew where a change is meant: `pytest tests/test_config.py --update-golden`.
    """
    lines = {}
    for name in sorted(ROOTS):
        program = name.removeprefix("schema_")
        needed = {"evaluate": "run=runs/test", "export": "run=runs/test", "audit": "output=runs/test"}
        whole = composition(program, (needed.get(program, "run_dir=runs/test"),), None)
        lines[program] = _lines(whole) + _hydra_lines(whole)
    for group, option in EVERY_OPTION:
        choice = f"{group}={option}"
        whole = composition("train", (choice, *REQUIRED.get(choice, []), "run_dir=runs/test"), None)
        lines[f"train {choice}"] = _changes(lines["train"], _lines(whole) + _hydra_lines(whole))
    for path in SWEEPS:
        whole = composition(path.stem, ("run_dir=runs/test",), path.parent)
        lines[f"sweeps/{path.stem}"] = _changes(lines["train"], _lines(whole) + _hydra_lines(whole))
    text = "\n".join(f"== {title}\n" + "".join(f"{line}\n" for line in each) for title, each in lines.items())
    golden = golden_folder / "configs.txt"
    if update_golden:
        golden.write_text(text, encoding="utf-8")
    assert text == golden.read_text(encoding="utf-8")


def _lines(config: DictConfig, prefix: str = "", *, resolve: bool = True) -> list[str]:
    """`name: value` of every setting, sorted; empty groups and lists as they are."""

    def leaves(value: object, name: str) -> Iterator[str]:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                yield from leaves(inner, f"{name}.{key}" if name else str(key))
        else:
            yield f"{prefix}{name}: {json.dumps(value, ensure_ascii=False)}"

    tree = OmegaConf.to_container(without_hydra(config), resolve=resolve, enum_to_str=True)
    return sorted(leaves(tree, ""))


def _hydra_lines(config: DictConfig) -> list[str]:
    nodes = OmegaConf.masked_copy(config.hydra, ["mode", "run", "sweep", "sweeper", "launcher"])
    return _lines(nodes, "hydra.", resolve=False)


def _changes(before: list[str], after: list[str]) -> list[str]:
    gone, come = set(before) - set(after), set(after) - set(before)
    return sorted([f"- {line}" for line in gone] + [f"+ {line}" for line in come], key=lambda line: line[2:])


def test_the_old_command_has_each_value_of_its_table() -> None:
    """The table of `llm_sft.py`, row by row, and what the script also did."""
    config = composed("experiment=msagent_7b_lora")
    model, sft_type, dataset, training = config.model, config.sft_type, config.dataset, config.training
    assert model.modelscope_id == "damo/ModelScope-Agent-7B"  # --model_type modelscope-agent-7b
    assert model.source == "modelscope"
    assert sft_type.name == "lora"  # --sft_type
    assert type(sft_type) is SCHEMAS["sft_type"]["schema_lora"]
    assert config.output_dir == "runs"  # --output_dir
    assert dataset.id == "damo/MSAgent-Bench"  # --dataset
    assert dataset.max_samples == 20000  # --dataset_sample
    assert dataset.test_ratio == 0.02  # --dataset_test_ratio
    assert dataset.test_split is None  # or the ratio would not count
    assert dataset.max_length == 2048  # --max_length
    assert model.dtype == "bf16"  # --dtype
    assert (sft_type.rank, sft_type.alpha, sft_type.dropout) == (8, 32, 0.1)  # --lora_rank, _alpha, _dropout_p
    assert sft_type.targets is None
    assert model.lora_targets == ["q_proj", "k_proj", "v_proj"]  # the fused qkv of the old models
    assert training.per_device_batch_size == 1  # --batch_size
    assert training.gradient_accumulation_steps == 16  # --gradient_accumulation_steps
    assert training.learning_rate == 1e-4  # --learning_rate
    assert config.evaluation.eval_steps == 50  # --eval_steps
    assert training.save_steps == 50  # --save_steps
    assert training.save_total_limit == 2  # --save_total_limit
    assert training.logging_steps == 20  # --logging_steps
    assert model.attention == "auto"  # --use_flash_attn true: flash where it is installed
    assert (training.schedule, training.warmup) == ("cosine", 0.1)
    assert training.weight_decay == 0.01
    assert training.max_grad_norm == 1.0
    assert training.gradient_checkpointing is True
    assert config.distributed.name == "single"


def old_table() -> set[str]:
    """Return the dotted settings that the page names for options of the old script."""
    page = (conf_dir().parent / "docs" / "configuration.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `--.*\| (.*) \|$", page, flags=re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`(\w+\.\w+)", row)}


def test_the_old_command_spells_out_what_the_old_table_says() -> None:
    """A default that changes must not change the experiment, so the file holds each value itself."""
    text = yaml.safe_load((conf_dir() / "experiment" / "msagent_7b_lora.yaml").read_text(encoding="utf-8"))
    for key in old_table():
        group, _, name = key.partition(".")
        assert name in text[group], key


def test_full_fine_tuning_has_the_smaller_learning_rate() -> None:
    assert composed("model=qwen-7b", "sft_type=full").training.learning_rate == 1e-5
    assert composed("sft_type=full").training.learning_rate == 1e-4, "ten times, for a small model"
    assert composed("sft_type=full", "training.learning_rate=3e-5").training.learning_rate == 3e-5


@pytest.mark.parametrize(("chosen", "name"), [("msagent_7b_lora", "train_msagent_7b_lora"), (None, "train")])
def test_the_folder_of_a_sweep_names_its_experiment(chosen: str | None, name: str) -> None:
    register_schemas()
    node = {"job": {"config_name": "train"}, "runtime": {"choices": {"experiment": chosen}}}
    assert OmegaConf.create({"hydra": node, "name": "${sweep_name:}"}).name == name


def test_the_command_line_wins_over_the_experiment() -> None:
    config = composed("experiment=msagent_7b_lora", "sft_type.rank=64", "model=tiny")
    assert (config.sft_type.rank, config.model.name, config.sft_type.alpha) == (64, "tiny", 32.0)


@pytest.mark.parametrize("sign", ["", "+"])
def test_settings_that_another_program_names_need_no_sign(sign: str, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    of_deepspeed = ("distributed=deepspeed_zero2", f"{sign}distributed.deepspeed.zero_optimization.overlap_comm=true")
    (typed,) = run(monkeypatch, f"{sign}model.template_args.enable_thinking=false", *of_deepspeed)
    assert typed.model.template_args == {"enable_thinking": False}
    assert typed.distributed.deepspeed["zero_optimization"] == {"stage": 2, "overlap_comm": True}
    if sign:
        return
    first, second = run(monkeypatch, "-m", "hydra/launcher=basic", "model.template_args.date=a,b")
    assert [each.model.template_args for each in (first, second)] == [{"date": "a"}, {"date": "b"}]
    assert [Path(each.run_dir).name for each in (first, second)] == ["0_date-a", "1_date-b"]


def test_the_replaced_options_are_settings() -> None:
    assert len(old_table()) == 15
    assert old_table() <= set(settings())


# --- What is refused, and in which words ---


MISTAKES = [
    # what is typed, what the line must hold
    ("sft_type.rnak=4", ["sft_type.rnak: no such setting", "did you mean sft_type.rank?"]),
    ("training.learning_rat=1", ["training.learning_rat:", "did you mean training.learning_rate?"]),
    ("evaluation.max_new_token=3", ["did you mean evaluation.max_new_tokens?"]),
    ("model.shape.hiden=3 model=tiny", ["model.shape.hiden:", "did you mean model.shape.hidden?"]),
    ("model.shape.hiden=3", ["model.shape.hiden:", "did you mean model.shape.hidden?"]),
    ("model.shape.hidden=3", ["model.shape.hidden:", "is null"]),
    ("model.context.x=3", ["model.context.x: no such setting"]),
    ("learning_rate=1", ["learning_rate:", "did you mean training.learning_rate?"]),
    ("lora_rank=4", ["lora_rank:", "did you mean sft_type.rank?"]),
    ("~dataset.form", ["dataset.form:", "did you mean dataset.format?"]),
    ("training.draws=5", ["training.draws:", "did you mean evaluation.bootstrap_samples?"]),
    ("--lora_rank 4", ["unrecognized arguments: --lora_rank", "settings are written name=value"]),
    ("sft_type.rank=abc", ["sft_type.rank=abc: expected a whole number"]),
    ("sft_type.rank=null", ["sft_type.rank=null: expected a whole number"]),
    ("dataset.max_samples=1.5", ["dataset.max_samples=1.5: expected a whole number"]),
    ("training.epochs=many", ["training.epochs=many: expected a number"]),
    ("model.trust_remote_code=maybe", ["model.trust_remote_code=maybe: expected true or false"]),
    ("model.lora_targets=q_proj", ["model.lora_targets=q_proj: expected a list"]),
    (
        "model.dtype=bf15",
        ["model.dtype=bf15: expected one of auto, bf16, fp16, fp32", "did you mean model.dtype=bf16?"],
    ),
    ("sft_type=full sft_type.rank=4", ["sft_type.rank: rank belongs to sft_type=lora", "sft_type=full has"]),
    ("sft_type=full +sft_type.rank=4", ["sft_type.rank: rank belongs to sft_type=lora", "sft_type=full has"]),
    ("dataset.path=x.jsonl", ["dataset.path: path belongs to dataset=local"]),
    (
        "experiment=msagent_7b_lora dataset=local dataset.path=x.jsonl",
        [
            *(
                "experiment/msagent_7b_lora.yaml: dataset.test_split: ",
                "belongs to dataset=modelscope and dataset=huggingface",
            ),
            "leave out dataset=local or that file",
        ],
    ),
    ("experiment=msagent_7b_lora sft_type=full", ["sft_type.rank: rank belongs to sft_type=lora", "sft_type=full has"]),
    ("+unknown=1", ["unknown: no such setting", "there are: dataset"]),
    ("++unknown=1", ["unknown: no such setting"]),
    ("+sft_type.foo=1", ["sft_type.foo: no such setting"]),
    ("++training.epochz=1", ["training.epochz:", "did you mean training.epochs?"]),
    ("--cfg job +unknown=1", ["unknown: no such setting"]),
    ("+sft_type.rank=4", ["sft_type.rank: is there already; leave out the +"]),
    (
        "distributed=deepspeed_zero2 +distributed.deepspeed.zero_optimization.stage=1",
        ["zero_optimization.stage: is there already; leave out the +"],
    ),
    ("--cfg job -m seed=1,2", ["not allowed with argument --cfg"]),
    ("~training.epochs", ["training.epochs: settings cannot be removed"]),
    ("~sft_type", ["sft_type: missing"]),
    ("dataset=local", ["dataset.path: missing; give dataset.path=<value>. A file"]),
    ("dataset.max_length=???", ["dataset.max_length: missing"]),
    ("model=smollm2-135", ["model=smollm2-135: no such option", "did you mean model=smollm2-135m?", "tiny"]),
    ("experiment=msagent_7b", ["experiment=msagent_7b: no such option", "did you mean experiment=msagent_7b_lora?"]),
    ("training={epochz:3}", ["training is a group"]),
    ("modle=x", ["modle: no such setting", "did you mean model?"]),
    ("sft_type.rank=[4", ["sft_type.rank: cannot be read", "expected name=value"]),
    ("dataset.path=数据.jsonl", ["dataset.path: cannot be read", "in double quotes"]),
    ("training", ["training: cannot be read", "expected name=value"]),
    ("model.kernels=compiled", ["model.kernels=compiled: expected one of auto, liger, torch"]),
    ("sft_type.rank=0", ["sft_type.rank=0: expected a whole number from 1 to"]),
    ("seed=1e20", ["seed=1e+20: expected a whole number from 0 to 4,294,967,295"]),
    ("seed=100000000000000000000", ["seed=100000000000000000000: expected a whole number from 0 to 4,294,967,295"]),
    ("threads=100000", ["threads=100000: expected a whole number from 1 to 1,024 or null"]),
    ("training.learning_rate=nan", ["training.learning_rate=nan: expected a number above 0 and at most 1"]),
    ("training.max_grad_norm=-1", ["training.max_grad_norm=-1.0: expected a number from 0 to"]),
    ("training.max_grad_norm=inf", ["training.max_grad_norm=inf: expected a number from 0 to"]),
    ("sft_type.dropout=0.999", ["sft_type.dropout=0.999: expected a number from 0 to 0.9"]),
    ("-m hydra.launcher.eta=1 seed=1,2", ["hydra.launcher.eta=1: expected a whole number from 2 to"]),
    ("dataset.test_ratio=1.5", ["dataset.test_ratio=1.5: expected a number at least 0 and below 1 or null"]),
    (
        "model=tiny model.shape.heads=9",
        ["model.shape.heads=9, model.shape.hidden=64: expected an even number of heads"],
    ),
    ("tracking.project=", ["tracking.project=: empty; expected the name of a W&B project"]),
    ("training.learning_rate=${sft_type.lr}", ["training.learning_rate:", "sft_type.lr"]),
    ("sft_type.rank=4,8", ["sft_type.rank=4,8: several values", "-m"]),
    ("-m sft_type.rank=4,0", ["sft_type.rank=0: expected a whole number from 1 to"]),
    ("-m model=tiny,smollm2-135", ["model=smollm2-135: no such option"]),
    (
        "-m sft_type.rank=sort(range(4,17,8),reverse=true)",
        [
            "sft_type.rank=sort(range(4,17,8),reverse=true): Hydra makes 9, 1 of this range; write the values with commas"
        ],
    ),
    ("-m sft_type.dropout=range(0.1,0.4,0.1)", ["Hydra makes 0.1, 0.2, 0.30000000000000004, 0.4 of this range"]),
    ("-m sft_type.rnak=4,8", ["sft_type.rnak:", "did you mean sft_type.rank?"]),
    ("-m run_dir=x seed=1,2", ["run_dir: names one folder"]),
    ("+model._target_=os.system", ["model._target_: refused"]),
    ("hydra.rnu.dir=x", ["hydra.rnu: no such setting of Hydra"]),
    ("hydra/launcher=nope", ["hydra/launcher=nope: no such option"]),
    ("--config-name nope", ["--config-name nope: no such file"]),
    ("--config-dir nope", ["--config-dir nope: no such folder"]),
    ("--config-path nope", ["unrecognized arguments: --config-path"]),
    ("--experimental-rerun nope", ["unrecognized arguments: --experimental-rerun"]),
    ("seed=1 --cfg job seed=2", ["put flags such as --cfg or -m before all settings"]),
    ("tracking.api_key=hunter2", ["tracking.api_key:", "environment"]),
    ("+wandb_api_key=hunter2", ["wandb_api_key:", "environment"]),
    ("++tracking.auth.token=hunter2", ["tracking.auth.token:", "environment"]),
    ("+tracking={password:hunter2}", ["tracking:", "environment"]),
    ("--api_key=hunter2", ["--api_key=..."]),
    ("hydra.job.env_copy=[WANDB_API_KEY]", ["hydra.job.env_copy:", "environment"]),
    ("hydra.job.env_set.HF_TOKEN=hunter2", ["hydra.job.env_set.HF_TOKEN:", "environment"]),
    ("tracking.entity=${oc.env:WANDB_API_KEY,x}", ["tracking.entity: takes WANDB_API_KEY", "environment"]),
]


@pytest.mark.parametrize(("typed", "expected"), MISTAKES, ids=[typed for typed, _ in MISTAKES])
def test_a_mistake_is_refused_in_one_line_and_leaves_no_folder(
    typed: str,
    expected: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train.py", *typed.split(" ")])

    def recipe(config: TrainConfig) -> float:
        raise AssertionError("the recipe must not start")

    with pytest.raises(SystemExit) as stop:
        compose_and_run("train", TrainConfig, recipe)
    said = capsys.readouterr()
    assert stop.value.code == 2
    assert said.out == ""
    assert said.err.startswith("train.py: ")
    assert said.err.count("\n") == 1
    for part in expected:
        assert part in said.err
    assert "hunter2" not in said.err
    assert list(tmp_path.iterdir()) == []


def test_a_typo_in_a_file_is_refused_with_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "experiment").mkdir()
    wrong = {
        "typo": "sft_type: {rnak: 4}",
        "type": "sft_type: {rank: many}",
        "group": "defaults: [override /model: smollm2-135]",
        "target": "model: {_target_: os.system}",
        "broken": "model: [",
    }
    for name, text in wrong.items():
        (tmp_path / "experiment" / f"{name}.yaml").write_text(f"# @package _global_\n{text}\n", encoding="utf-8")
    said = {}
    for name in wrong:
        monkeypatch.setattr("sys.argv", ["train.py", "--config-dir", str(tmp_path), f"experiment={name}"])
        with pytest.raises(SystemExit):
            compose_and_run("train", TrainConfig, lambda config: 0.0)
        said[name] = capsys.readouterr().err
        assert said[name].count("\n") == 1
    assert "experiment/typo.yaml: sft_type.rnak" in said["typo"]
    assert "did you mean sft_type.rank?" in said["typo"]
    assert "experiment/type.yaml: sft_type.rank=many: expected a whole number" in said["type"]
    assert "did you mean model=smollm2-135m?" in said["group"]
    assert "model._target_: refused" in said["target"]
    assert "broken" in said["broken"]


def test_the_traceback_is_there_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr("sys.argv", ["train.py", "sft_type.rnak=4"])
    with pytest.raises(ConfigError) as refused:
        compose_and_run("train", TrainConfig, lambda config: 0.0)
    assert refused.value.__cause__ is not None


def test_no_setting_looks_like_a_secret() -> None:
    names = {part for root in (TrainConfig, EvaluateConfig) for key in settings(root) for part in key.split(".")}
    assert [name for name in names if is_secret_name(name)] == []


# --- Running ---


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> list[TrainConfig]:
    """The configs that the recipe was given by a command line."""
    given: list[TrainConfig] = []

    def recipe(config: TrainConfig) -> float:
        given.append(config)
        assert "HYDRA_FULL_ERROR" not in os.environ, "a job of a sweep would print tracebacks"
        (Path(config.run_dir) / "config.yaml").write_text(config_to_yaml(config), encoding="utf-8")
        return 0.5

    monkeypatch.setattr("sys.argv", ["train.py", *arguments])
    compose_and_run("train", TrainConfig, recipe)
    return given


def test_a_run_folder_is_named_by_choices_and_overridden_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    long = "x" * 200
    (config,) = run(
        monkeypatch,
        *("model=tiny", "dataset=local", "dataset.path='/a b/ü/data.jsonl'", "dataset.workers=1", "seed=7"),
        *("tracking.project=other", f"model.revision={long}"),
    )
    folder = Path(config.run_dir)
    assert folder.parent == Path("runs")
    date_and_time, slug = folder.name[:19], folder.name[20:]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", date_and_time)
    assert slug.startswith("tiny_lora_local_path-data.jsonl_seed-7_revision-xxx"), "what affects nothing is left out"
    assert len(slug) == 100
    assert folder.is_dir()


def test_a_sweep_makes_one_folder_per_job_named_by_its_swept_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("AGENTFT_SWEEP_DIR", raising=False)
    # Hydra's own launcher runs the jobs in this process; ours is tested in test_launcher.py.
    swept = ("sft_type=lora,full", "training.learning_rate=1e-3,1e-2")
    configs = run(monkeypatch, "-m", "hydra/launcher=basic", "model=tiny", *swept)
    assert [Path(config.run_dir).name for config in configs] == [
        "0_lora_learning_rate-0.001",
        "1_lora_learning_rate-0.01",
        "2_full_learning_rate-0.001",
        "3_full_learning_rate-0.01",
    ]
    (sweep,) = {Path(config.run_dir).parent for config in configs}
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d_train", sweep.name)
    assert os.environ["AGENTFT_SWEEP_DIR"] == str(sweep.absolute())


def test_a_saved_run_runs_again_in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (first,) = run(monkeypatch, "experiment=msagent_7b_lora", "sft_type.rank=4", "output_dir=first")
    again = ["--config-dir", first.run_dir, "--config-name", "config"]
    (second,) = run(monkeypatch, *again, "output_dir=second")
    assert second.run_dir != first.run_dir
    assert dataclasses.replace(second, run_dir=first.run_dir, output_dir="first") == first
    (resumed,) = run(monkeypatch, *again, f"run_dir={first.run_dir}")
    assert resumed == first


def test_an_error_of_the_recipe_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def recipe(config: TrainConfig) -> float:
        raise RunError("runs/x: in use")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train.py"])
    with pytest.raises(SystemExit) as stop:
        compose_and_run("train", TrainConfig, recipe)
    assert stop.value.code == 1
    assert capsys.readouterr().err == "train.py: runs/x: in use\n"


# --- A config as a file ---


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param([f"{group}={option}"], marks=[] if options(group)[0] == option else [pytest.mark.slow])
        for group, option in EVERY_OPTION
    ],
    ids=str,
)
def test_a_saved_config_is_read_back_equal(overrides: list[str], tmp_path: Path) -> None:
    config = composed(*overrides, *REQUIRED.get(overrides[0], []))
    text = config_to_yaml(config)
    assert config_from_yaml(text, TrainConfig) == config
    assert "${" not in text
    (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    assert saved_config(tmp_path) == config
    assert to_train_config(compose("config", ["run_dir=runs/test"], tmp_path)) == config, "and Hydra reads the same"


def test_text_that_looks_like_a_number_stays_text(tmp_path: Path) -> None:
    config = composed("model.revision='1234e56'", "model.notes='1e3'", "tracking.tags=['007','null','工具','a: b']")
    (tmp_path / "config.yaml").write_text(config_to_yaml(config), encoding="utf-8")
    assert saved_config(tmp_path) == config
    assert to_train_config(compose("config", ["run_dir=runs/test"], tmp_path)) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("rank: 8", "rank: eight"), "sft_type.rank=eight: expected a whole number from 1 to"),
        (("rank: 8", "rank: true"), "sft_type.rank=True: expected a whole number from 1 to"),
        (("rank: 8", "rnak: 8"), "sft_type.rnak: no such setting"),
        (("dtype: auto", "dtype: bf15"), "model.dtype=bf15: expected one of auto, bf16"),
        (("schema_lora", "schema_full"), "sft_type.rank: no such setting"),
        (
            ("schema_lora", "schema_other"),
            "schema_other is not a schema; known are schema_lora, schema_qlora, schema_full",
        ),
        (("seed: 42\nthreads", "sead: 42\nthreads"), "sead: no such setting"),
        (("  rank: 8\n", "  rank: 0\n"), "sft_type.rank=0: expected a whole number from 1 to"),
        (("model:\n", "_target_: os.system\nmodel:\n"), "_target_: no such setting"),
    ],
    ids=lambda change: str(change)[:40],
)
def test_a_saved_config_that_was_changed_wrongly_is_refused(
    change: tuple[str, str], message: str, tmp_path: Path
) -> None:
    text = config_to_yaml(composed())
    assert change[0] in text
    (tmp_path / "config.yaml").write_text(text.replace(*change), encoding="utf-8")
    with pytest.raises(ConfigError, match=re.escape(message)) as refused:
        saved_config(tmp_path)
    assert str(tmp_path) in str(refused.value)


def test_a_folder_without_a_config_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"config\.yaml: not there"):
        saved_config(tmp_path)


def test_a_default_config_writes_at_most_seventy_settings_and_help_shows_no_more() -> None:
    tree = yaml.safe_load(config_to_yaml(composed()))
    written = [key for group, values in tree.items() for key in (values if isinstance(values, dict) else [group])]
    assert len(written) - 1 <= 70, "without the defaults list"
    chosen = {"sft_type": "schema_lora", "dataset": "schema_synthetic"}
    shown = [key for key, setting in settings(TrainConfig, chosen).items() if setting.is_value and not setting.advanced]
    assert len(shown) <= 70
    text = help_text("train.py", "train")
    assert all(f"\n  {key} " in text for key in shown)
    assert "training.beta1" not in text


def test_an_advanced_setting_is_written_only_where_it_differs_and_read_back_either_way() -> None:
    plain, changed = composed(), composed("training.beta2=0.95", "dataset.span_weights.call=2")
    beta2, weights = "\n  beta2: ", "\n  span_weights:\n"
    assert beta2 not in config_to_yaml(plain)
    assert weights not in config_to_yaml(plain)
    assert beta2 + "0.95" in config_to_yaml(changed)
    assert weights in config_to_yaml(changed)
    for config in (plain, changed):
        assert config_from_yaml(config_to_yaml(config), TrainConfig) == config
        whole, tables = primary_config(config), saved_settings(config_to_yaml(config))
        assert {group: values for group, values in whole.items() if group != "defaults"} == tables, "compare sees all"


# --- The documentation ---


def setting_tables() -> str:
    """Return the tables of docs/configuration.md: what most runs need first, advanced settings below."""
    return "\n".join([*_tables(advanced=False), "## Advanced settings\n", *_tables(advanced=True)])


def _tables(*, advanced: bool) -> Iterator[str]:
    roots = (("The run", TrainConfig), ("`evaluate.py`", EvaluateConfig), ("`python -m agentft.export`", ExportConfig))
    for title, root in roots:
        rows = {key: setting for key, setting in settings(root).items() if "." not in key and key not in SCHEMAS}
        yield from _table(f"### {title}", rows, advanced)
        for group, schemas in SCHEMAS.items() if root is TrainConfig else ():
            of_each = {
                name: {
                    key: setting
                    for key, setting in settings(root, {group: name}).items()
                    if key.startswith(f"{group}.")
                }
                for name in schemas
            }
            first, *others = of_each.values()
            common = {
                key: setting for key, setting in first.items() if all(each.get(key) == setting for each in others)
            }
            yield from _table(f"### `{group}`", common, advanced)
            for name, rows in of_each.items():
                own = {key: setting for key, setting in rows.items() if key not in common}
                yield from _table(f"### `{group}`: {schemas[name].__name__}", own, advanced)


def _table(title: str, rows: dict[str, Setting], advanced: bool) -> list[str]:
    lines = [title, "", "| setting | default | meaning |", "|---|---|---|"]
    shown = {key: setting for key, setting in rows.items() if setting.is_value and setting.advanced == advanced}
    for key, setting in shown.items():
        match setting.default:
            case dataclasses._MISSING_TYPE():
                default = ""
            case None:
                default = "null"
            case bool():
                default = str(setting.default).lower()
            case enum.Enum():
                default = setting.default.name
            case _:
                default = str(setting.default)
        words = [" ".join(setting.doc.split())]
        if names := members(setting.hint):
            words.append(f"One of {', '.join(f'`{name}`' for name in names)}.")
        if setting.number is not None:
            words.append(f"Range: {setting.number}.")
        lines.append(f"| `{key}` | {f'`{default}`' if default else ''} | {' '.join(words)} |")
    return [*lines, ""] if shown else []


def test_an_old_name_is_taken_with_one_line(root):
    words = [sys.executable, "train.py", "dataset=local", "dataset.path=x.jsonl", "dataset.form=openai", "--cfg", "job"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 0
    assert "\n  format: openai\n" in done.stdout
    assert done.stderr == "train.py: dataset.form is dataset.format now; the old name is taken for this version\n"


def test_old_names_in_files_are_taken_and_all_of_a_command_are_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {
        "mine.yaml": "defaults: [train, _self_]\ntraining: {micro_batch: 2}\n"
        "hydra: {mode: MULTIRUN, launcher: {_target_: hydra._internal.core_plugins.basic_launcher.BasicLauncher}, "
        "sweeper: {params: {evaluation.draws: '7,9'}}}\n",
        "experiment/old.yaml": "# @package _global_\ntraining: {accumulation: 3}\n",
        "dataset/rows.yaml": "defaults: [schema_local, _self_]\nname: rows\npath: x.jsonl\nform: openai\n"
        "span_weights: {frame: 2}\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    typed = ("--config-dir", ".", "--config-name", "mine", "experiment=old", "dataset=rows", "evaluation.steps=4")
    first, second = run(monkeypatch, *typed, "hydra/launcher=basic")
    assert (first.training.per_device_batch_size, first.training.gradient_accumulation_steps) == (2, 3)
    assert (first.dataset.format, first.dataset.span_weights.call_syntax) == ("openai", 2)
    assert first.evaluation.eval_steps == 4
    assert [config.evaluation.bootstrap_samples for config in (first, second)] == [7, 9]
    assert [Path(config.run_dir).name for config in (first, second)] == [
        "0_bootstrap_samples-7",
        "1_bootstrap_samples-9",
    ]
    (line,) = capsys.readouterr().err.splitlines()
    old = ["evaluation.steps", "training.micro_batch", "evaluation.draws", "dataset.form", "training.accumulation"]
    old += ["dataset.span_weights.frame"]
    assert sorted(re.findall(r"([a-z_.]+) is [a-z_.]+ now", line)) == sorted(old)


def test_a_saved_config_with_an_old_name_is_read():
    text = config_to_yaml(composed("dataset=local", "dataset.path=x.jsonl"))
    old = re.sub(r"(?m)^  format: auto$", "  form: auto", text)
    assert old != text
    assert config_from_yaml(old, TrainConfig) == config_from_yaml(text, TrainConfig)


def test_every_setting_is_documented() -> None:
    path = REPOSITORY / "docs" / "configuration.md"
    begin, end = "<!-- settings: begin -->\n", "<!-- settings: end -->"
    before, _, rest = path.read_text(encoding="utf-8").partition(begin)
    found, _, after = rest.partition(end)
    if os.environ.get("AGENTFT_UPDATE_DOCS") == "1":
        path.write_text(before + begin + setting_tables() + end + after, encoding="utf-8")
        return
    assert found == setting_tables(), "run AGENTFT_UPDATE_DOCS=1 pytest tests/test_config.py -k every_setting"
    undocumented = [
        key
        for root in (TrainConfig, EvaluateConfig, ExportConfig)
        for key, setting in settings(root).items()
        if not setting.doc and key not in SCHEMAS
    ]
    assert undocumented == []


def test_help_lists_every_option_and_gives_examples() -> None:
    text = help_text("train.py", "train")
    for group, option in EVERY_OPTION:
        assert option in text
        assert group in text
    for part in ("sft_type.rank=16", "experiment=msagent_7b_lora", "--config-name lora_rank_lr", "docs/"):
        assert part in text
    assert max(map(len, text.splitlines())) <= 120


def test_composing_leaves_the_dataclasses_alone() -> None:
    first = composed("sft_type.rank=3")
    assert composed() != first
    assert OmegaConf.is_config(compose("train", []))
