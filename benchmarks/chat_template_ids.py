"""How many prompts have training's ids when an inference server makes them from messages by the exported chat template.

    python -m benchmarks.chat_template_ids --data FILE.jsonl --rows 300

For each layout: prompts whose token ids equal the prefix of the training ids, of all, and of the first step of each
conversation. The text is equal but for white space (`tests/data/test_chat_templates.py`); what differs are pieces that a
tokenizer joins across the edge between context and the agent's words.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from agentft.data.chat_templates import chat_template

from agentft.config import compose, to_train_config
from agentft.data.conversation import Conversation, Origin
from agentft.data.records import read_record
from agentft.data.template_choice import choose_template
from agentft.data.tokens import SegmentEncoder, tokenize
from agentft.model.load import load_tokenizer, locate_model
from tests.data.chat_messages import before_steps, msagent_messages, native_messages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="conversations, one JSON object a line")
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--model", default="smollm2-135m")
    arguments = parser.parse_args()
    model = to_train_config(compose("train", [f"model={arguments.model}"])).model
    tokenizer = load_tokenizer(locate_model(model), model)
    lines = arguments.data.read_text(encoding="utf-8").splitlines()[: arguments.rows]
    read = [each for n, line in enumerate(lines) for each in read_record(json.loads(line), Origin("data", n))]
    conversations = [each for each in read if isinstance(each, Conversation)]
    for name in ("msagent", "native"):
        compare(name, tokenizer, conversations, model.stop_token)


def compare(name: str, tokenizer, conversations: list[Conversation], stop_token: str | None) -> None:
    template = choose_template(name, tokenizer, stop_token)
    encoder = SegmentEncoder(tokenizer)
    equal: list[bool] = []
    first: list[bool] = []
    for conversation in conversations:
        if template.problem(conversation):
            continue
        (example,) = tokenize([conversation], template, encoder)
        messages, tools = (msagent_messages(conversation), None) if name == "msagent" else native_messages(conversation)
        for number, ((start, _), history) in enumerate(zip(example.steps(), before_steps(messages), strict=False)):
            asked = tokenizer.apply_chat_template(
                history,
                tools=tools,
                chat_template=chat_template(template),
                add_generation_prompt=True,
                return_dict=True,
            )
            same = list(asked["input_ids"]) == example.input_ids[:start].tolist()
            equal.append(same)
            if number == 0:
                first.append(same)
    print(f"{name}: {sum(equal):,} of {len(equal):,} prompts, {sum(first):,} of {len(first):,} first ones")


if __name__ == "__main__":
    main()
