"""Other trainers' own preparation of a dataset, each run by an interpreter that has it installed.

    python benchmarks/preprocessing.py --data FILE --peer trl=VENV/bin/python --peer llamafactory=VENV/bin/python

`write_for_peers`, run by ours, lays conversations out in each peer's own format: what the agent says, tool calls included,
is the text of an assistant message in the native ChatML layout, and a tool's result the user message of that layout, so that
nobody converts calls and all train the same text. The rest of the file runs under the peer's interpreter and imports nothing
of agentft: it calls the peer's public way from the file to labelled tokens and prints what it cost. Imports, the tokenizer and
the making of the trainer are not timed, here as for agentft; writing the files is not timed either.

| peer | what is timed |
|---|---|
| `trl` | `load_dataset("json")` and `SFTTrainer`'s preparation (`_prepare_dataset`) with `assistant_only_loss`, a template with generation marks, `dataset_num_proc` = cores |
| `llamafactory` | `get_dataset(stage="sft")` with `preprocessing_num_workers` = cores: loading, its alignment, tokenising |

Both cut a conversation at `max_length` wherever that falls; they divide nothing, check no grammar and keep no account.
"""  # noqa: E501

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

TOKENIZER = "tokenizer"
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}"
    "{% endif %}{{ '\n' }}{% endfor %}"
)
_DATASET = "conversations"


def write_for_peers(records: Iterable[Any], tokenizer: Any, folder: Path) -> int:
    """Write the files of all peers and return how many conversations they hold; run by agentft's interpreter."""
    from agentft.data.conversation import Origin
    from agentft.data.records import Rejection, read_record
    from agentft.data.template_choice import choose_template
    from agentft.data.tokens import SegmentEncoder
    from agentft.data.truncation import make_examples

    layout, encoder = choose_template("chatml", tokenizer), SegmentEncoder(tokenizer)
    tokenizer.save_pretrained(folder / TOKENIZER)
    count = 0
    with (folder / "trl.jsonl").open("w") as trl, (folder / "llamafactory.jsonl").open("w") as llamafactory:
        for number, value in enumerate(records, 1):
            read = read_record(value, Origin("", number))
            if isinstance(read, Rejection):
                continue
            (made,) = make_examples([read[0]], layout, encoder)
            if not made.pieces:
                continue
            messages = list(_messages(made.pieces[0].segments, tokenizer.eos_token))
            trl.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
            llamafactory.write(json.dumps(_sharegpt(messages), ensure_ascii=False) + "\n")
            count += 1
    columns = {"messages": "conversations", "system": "system"}
    named = {_DATASET: {"file_name": "llamafactory.jsonl", "formatting": "sharegpt", "columns": columns}}
    (folder / "dataset_info.json").write_text(json.dumps(named))
    return count


def _messages(segments: Iterable[Any], stop_token: str) -> Iterator[dict[str, str]]:
    """The turns of the ChatML layout: between the mark that begins one and the mark that ends it."""
    turn: list[str] = []
    for segment in segments:
        if segment.special and segment.text == "<|im_start|>":
            turn = []
        elif segment.special and segment.text == stop_token:
            role, _, content = "".join(turn).partition("\n")
            yield {"role": role, "content": content}
        else:
            turn.append(segment.text)


def _sharegpt(messages: list[dict[str, str]]) -> dict[str, Any]:
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    names = {"user": "human", "assistant": "gpt"}
    turns = [{"from": names[m["role"]], "value": m["content"]} for m in messages if m["role"] in names]
    return {"system": system, "conversations": turns}


# --- Below runs under the interpreter of a peer ---


def run_trl(folder: Path, processes: int, max_length: int) -> dict[str, float]:
    """TRL's way; the model is as small as one can be, since the trainer wants one."""
    from datasets import load_dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(folder / TOKENIZER)
    tokenizer.chat_template = CHAT_TEMPLATE
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **size))
    arguments = SFTConfig(
        output_dir=str(folder / "trl"),
        assistant_only_loss=True,
        max_length=max_length,
        dataset_num_proc=processes,
        use_cpu=True,
        bf16=False,
        report_to=[],
    )
    spent: list[dict[str, float]] = []
    made: list[Any] = []
    prepare = SFTTrainer._prepare_dataset

    def timed(self: Any, *given: Any, **named: Any) -> Any:
        with _Clock() as clock:
            made.append(prepare(self, *given, **named))
        spent.append(clock.spent)
        return made[-1]

    SFTTrainer._prepare_dataset = timed
    with _Clock() as clock:
        dataset = load_dataset("json", data_files=str(folder / "trl.jsonl"), split="train")
    SFTTrainer(model, args=arguments, train_dataset=dataset, processing_class=tokenizer)
    return _report(made[0], [clock.spent, *spent])


def run_llamafactory(folder: Path, processes: int, max_length: int) -> dict[str, float]:
    """LLaMA-Factory's way."""
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import DataArguments, ModelArguments
    from transformers import AutoTokenizer, Seq2SeqTrainingArguments

    tokenizer = AutoTokenizer.from_pretrained(folder / TOKENIZER)
    data = DataArguments(
        template="smollm2",
        dataset=_DATASET,
        dataset_dir=str(folder),
        cutoff_len=max_length,
        preprocessing_num_workers=processes,
        overwrite_cache=True,
    )
    template = get_template_and_fix_tokenizer(tokenizer, data)
    model = ModelArguments(model_name_or_path=str(folder / TOKENIZER))
    training = Seq2SeqTrainingArguments(output_dir=str(folder / "llamafactory"), use_cpu=True, report_to=[])
    with _Clock() as clock:
        module = get_dataset(template, model, data, training, stage="sft", tokenizer=tokenizer)
    return _report(module["train_dataset"], [clock.spent])


class _Clock:
    """Wall and CPU seconds of this process and of those it has waited for."""

    def __enter__(self) -> _Clock:
        self._before = time.perf_counter(), _cpu()
        return self

    def __exit__(self, *_: object) -> None:
        self.spent = {"wall": time.perf_counter() - self._before[0], "cpu": _cpu() - self._before[1]}


def _cpu() -> float:
    of = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(used.ru_utime + used.ru_stime for used in of)


def _report(dataset: Any, spent: list[dict[str, float]]) -> dict[str, float]:
    """Costs, and what came out: it is looked at after the clock has stopped."""
    columns = dataset.with_format("numpy")
    tokens = sum(len(row["input_ids"]) for row in columns)
    labelled = sum(int((row["labels"] != -100).sum()) for row in columns)
    totals = {key: sum(each[key] for each in spent) for key in ("wall", "cpu")}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"count": len(dataset), "tokens": tokens, "labelled": labelled, "peak": peak, **totals}


RUNS: dict[str, Callable[[Path, int, int], dict[str, float]]] = {"trl": run_trl, "llamafactory": run_llamafactory}


def main() -> None:
    """Run one peer on a folder that `write_for_peers` wrote: NAME FOLDER MAX_LENGTH."""
    name, folder, max_length = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / f"cache-{name}"), "WANDB_MODE": "disabled"}
    figures = RUNS[name](folder, os.cpu_count() or 1, max_length)
    print("\n" + json.dumps(figures))


if __name__ == "__main__":
    main()
