"""An export, loaded by transformers and peft alone, says what the evaluation of its run said, and stops where it stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from agentft.config import ExportConfig, compose, register_schemas, to_train_config
from agentft.errors import ConfigError, RunError
from agentft.model.config import ModelConfig, ModelSource
from agentft.model.sources import ModelFiles
from agentft.recipes.export import base_name, export
from agentft.recipes.train import train
from agentft.runs import read_json
from tests.data.chat_messages import before_steps, msagent_messages, native_messages

QUICK = [
    *("model=tiny", "model.shape.hidden=32", "model.shape.intermediate=64", "dataset.conversations=12"),
    *(
        "dataset.heldout=3",
        "training.gradient_accumulation_steps=4",
        "training.max_steps=3",
        "training.logging_steps=1",
    ),
    *(
        "training.learning_rate=0.03",
        "evaluation.eval_steps=0",
        "evaluation.max_new_tokens=12",
        "evaluation.bootstrap_samples=20",
    ),
    *("evaluation.before=false", "tracking=disabled", "threads=1"),
]


def run_of(folder, *overrides: str):
    register_schemas()
    config = to_train_config(compose("train", [*QUICK, *overrides, f"run_dir='{folder}'"]))
    return train(config).run_dir, config


def heldout(config):
    """The held-out conversations as any client would read them."""
    from agentft.data.prepare import prepare_data
    from agentft.data.template_choice import choose_template
    from agentft.data.tokens import SegmentEncoder
    from agentft.model.load import load_tokenizer
    from agentft.model.sources import locate_model

    tokenizer = load_tokenizer(locate_model(config.model), config.model)
    template = choose_template(config.model.template, tokenizer, config.model.stop_token)
    data = prepare_data(config.dataset, template, SegmentEncoder(tokenizer))
    chosen = data.heldout[: config.evaluation.conversations] if config.evaluation.conversations > 0 else data.heldout
    return {conversation.id: conversation for conversation in chosen}


def says_what_the_evaluation_said(model, folder, run, config) -> int:
    """Ask every held-out step by chat template and `generate`; return how many ended by themselves."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    settings = GenerationConfig.from_pretrained(folder)
    conversations = heldout(config)
    rows = [json.loads(line) for line in (run / "predictions" / "after.jsonl").read_text("utf-8").splitlines()]
    assert len(rows) > 3
    ended = 0
    for row in rows:
        conversation = conversations[row["conversation_id"]]
        if config.model.template in ("auto", "msagent"):  # the tokenizer has no chat template
            messages, tools = msagent_messages(conversation), None
        else:
            messages, tools = native_messages(conversation)
        inputs = tokenizer.apply_chat_template(
            before_steps(messages)[row["step"]],
            tools=tools,
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        with torch.no_grad():
            output = model.generate(**inputs, generation_config=settings, max_new_tokens=12)
        said = output[0, inputs["input_ids"].shape[1] :].tolist()
        assert len(said) == row["tokens"]
        if row["finish"] == "stop":
            assert said.pop() in (
                settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
            )
            ended += 1
        assert tokenizer.decode(said, skip_special_tokens=False) == row.get("raw", row["prediction"])
    return ended


def assert_servers_read_msagent_calls(tokenizer) -> None:
    call = '<|startofthink|>```JSON\n{"api_name": "tide", "parameters": {"at": "Kiel"}}\n```<|endofthink|>'
    read = tokenizer.parse_response(f"I look.\n{call}\n{call}<|im_end|>", prefix="<|user|>:q\n\n<|assistant|>:")
    function = {"name": "tide", "arguments": {"at": "Kiel"}}
    assert read["tool_calls"] == [{"type": "function", "function": function}] * 2
    assert read["content"] == "I look."
    prompt = f"<|user|>:q\n\n<|assistant|>:{call}\n\n<|startofexec|>high<|endofexec|>\n"
    assert tokenizer.parse_response("High.<|im_end|>", prefix=prompt) == {"role": "assistant", "content": "High."}


RUNS = {
    "pissa": ["sft_type.start=pissa", "sft_type.targets=[all-linear]"],
    "full": ["sft_type=full"],
    "qlora": ["sft_type=qlora"],
    "dora": ["sft_type.dora=true"],
    "freeze": ["sft_type=freeze", "sft_type.layers=1"],
    "chatml": ["model.template=chatml"],
}
BY_DEFAULT = ("pissa", "full")


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=[] if name in BY_DEFAULT else [pytest.mark.slow]) for name in RUNS]
)
def test_plain_transformers_says_what_the_evaluation_said(method: str, tmp_path, monkeypatch):
    if method == "qlora":
        pytest.importorskip("bitsandbytes", reason="the extra `quantization` is not installed")
    monkeypatch.setenv("SOME_API_TOKEN", "not-to-be-seen-anywhere")
    run, config = run_of(tmp_path / "run", *RUNS[method], "model.notes='of not-to-be-seen-anywhere'")
    out = export(ExportConfig(run=str(run)))
    assert out == run / "export"
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype is torch.float32
    assert (
        model.generation_config.eos_token_id
        == model.config.eos_token_id
        == AutoTokenizer.from_pretrained(out).convert_tokens_to_ids("<|im_end|>")
    )
    says_what_the_evaluation_said(model, out, run, config)
    if config.model.template != "chatml":
        assert_servers_read_msagent_calls(AutoTokenizer.from_pretrained(out))
    text = "".join(path.read_text("utf-8", errors="replace") for path in out.iterdir())
    assert str(tmp_path) not in text
    assert "not-to-be-seen-anywhere" not in text
    card = (out / "README.md").read_text("utf-8")
    assert card.startswith('---\nbase_model: "tiny"\n')
    assert "| arg_f1 |" in card or "Measured" not in card
    assert sorted(path.name for path in out.iterdir()) == [
        *("README.md", "chat_template.jinja", "config.json", "configuration.json", "generation_config.json"),
        *("model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    ]


def test_weights_have_the_mode_that_the_umask_gives(tmp_path):
    before = os.umask(0o027)
    try:
        run, _ = run_of(tmp_path / "run", *RUNS["pissa"])
        export(ExportConfig(run=str(run)))
        export(ExportConfig(run=str(run), merge=False, out=str(tmp_path / "adapter")))
    finally:
        os.umask(before)
    weights = [
        *run.glob("final/*.safetensors"),
        *run.glob("export/*.safetensors"),
        *tmp_path.glob("adapter/*.safetensors"),
    ]
    assert [file.stat().st_mode & 0o777 for file in weights] == [0o640] * 3


def test_the_adapter_alone_says_what_the_evaluation_said(tmp_path):
    from peft import AutoPeftModelForCausalLM

    run, config = run_of(tmp_path / "run", "sft_type.start=pissa", "sft_type.rslora=true")
    out = export(ExportConfig(run=str(run), merge=False, out=str(tmp_path / "mine")))
    assert out == tmp_path / "mine"
    assert not (out / "model.safetensors").exists()
    model = AutoPeftModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    says_what_the_evaluation_said(model, out, run, config)
    with pytest.raises(RunError, match="is there already"):
        export(ExportConfig(run=str(run), merge=False, out=str(out)))


def test_a_converted_model_is_exported_as_what_it_became(tmp_path):
    from tests.model.test_conversion_qwen import old_folder, old_settings, random_state

    settings = old_settings(seq_length=2048)
    source = old_folder(tmp_path / "old", settings, random_state(settings))
    of_old = ["model=auto", "model.source=local", f"model.path='{source}'", f"model.cache_dir='{tmp_path}/cache'"]
    of_old += [
        "model.context=2048",
        "model.dtype=fp32",
        "model.lora_targets=[q_proj,k_proj,v_proj]",
        "dataset.heldout=4",
    ]
    overrides = [override for override in QUICK if not override.startswith("model")]
    register_schemas()
    config = to_train_config(compose("train", [*overrides, *of_old, f"run_dir='{tmp_path}/run'"]))
    run = train(config).run_dir
    out = export(ExportConfig(run=str(run)))
    model = AutoModelForCausalLM.from_pretrained(out)
    assert type(model).__name__ == "Qwen2ForCausalLM"
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert (
        tokenizer("你好 <|im_start|>1234").input_ids
        == AutoTokenizer.from_pretrained(run / "final")("你好 <|im_start|>1234").input_ids
    )


def test_what_cannot_be_exported_is_said(tmp_path):
    run, _ = run_of(tmp_path / "run", "sft_type=full", "evaluation.after=false")
    with pytest.raises(ConfigError, match="there is no adapter"):
        export(ExportConfig(run=str(run), merge=False))
    for odd in ("owner/name", "modelscope:name", "huggingface:../name", "elsewhere:owner/name"):
        with pytest.raises(ConfigError, match="expected modelscope:owner/name"):
            export(ExportConfig(run=str(run), push=odd))
    record = read_json(run / "run.json") | {"model_fingerprint": "another"}
    (run / "run.json").write_text(json.dumps(record))
    with pytest.raises(RunError, match="has changed since"):
        export(ExportConfig(run=str(run)))
    assert not (run / "export").exists()


def test_the_card_of_an_earlier_checkpoint_does_not_show_what_the_last_was_measured_at(tmp_path):
    run, _ = run_of(tmp_path / "run", "training.save_steps=2", "evaluation.bootstrap_samples=20")
    cards = {}
    for checkpoint in ("2", "last"):
        out = export(ExportConfig(run=str(run), checkpoint=checkpoint, out=str(tmp_path / checkpoint)))
        cards[checkpoint] = (out / "README.md").read_text("utf-8")
    assert "Measured on held-out conversations" in cards["last"]
    assert "Measured" not in cards["2"]
    assert "step 2 of a run" in cards["2"]


@pytest.mark.parametrize(
    ("settings", "base"),
    [
        ({"source": "modelscope"}, ("hf/known", None)),
        ({"source": "wheel"}, ("/cache/model", None)),
        ({"source": "modelscope", "id": "owner/other"}, ("/cache/model", None)),
        ({"source": "local", "path": "/my/model"}, ("/cache/model", None)),
        ({"source": "huggingface"}, ("hf/known", "c0ffee")),
        ({"source": "huggingface", "id": "owner/other"}, ("owner/other", "c0ffee")),
    ],
)
def test_an_adapter_names_the_base_that_it_was_trained_on(settings, base):
    source = ModelSource(settings["source"])
    model = ModelConfig(name="m", huggingface_id="hf/known", **(settings | {"source": source}))
    commit = "c0ffee" if source is ModelSource.huggingface else None
    files = ModelFiles(Path("/cache/model"), "fingerprint", commit)
    assert base_name(model, files) == base


def test_the_command_line_refuses_a_typo_before_anything_is_loaded(tmp_path):
    command = [sys.executable, "-X", "importtime", "-m", "agentft.export", f"run={tmp_path}", "marge=false"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "marge: no such setting; did you mean merge?" in done.stderr
    assert "torch" not in {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
