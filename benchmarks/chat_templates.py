"""What holds of published chat templates as layouts: a table family x (prompts equal, steps read back, reasoning kept).

    python -m benchmarks.chat_templates [NAME ...]

The templates are those of TRL's wheel that can say a conversation with tools. Each lays out the conversations of
`tests/data/chat_families.py`, with blanks at ends, control tokens, JSON, nested arguments, parallel calls, reasoning and
more. Counted are steps: those that the layout trains; of these, prompts whose ids are those of `apply_chat_template`, and
answers that are read back as the message; and of the steps that think, those whose reasoning is read back.
"""

from __future__ import annotations

import argparse

from agentft.data.chat_template import handed_over, server_messages
from agentft.data.response import choose_response, differs
from tests.data.chat_families import NO_TOOLS, VALUES, conversation, template_names
from tests.data.test_chat_template_layout import layout_of
from tests.evaluation.test_read_back import made_steps, read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="templates; all by default")
    names = parser.parse_args().names or [name for name in template_names() if name not in NO_TOOLS]
    print("| template | read by | steps trained | prompts equal | steps read back | reasoning kept |")
    print("|---|---|---|---|---|---|")
    for name in names:
        print(f"| {' | '.join((f'`{name}`', *row(name)))} |")


def row(name: str) -> tuple[str, ...]:
    layout = layout_of(name, "merging")
    response = choose_response(layout)
    steps = trained = equal = back = thinking = kept = 0
    for kind in VALUES:
        talk = conversation(kind, declared=layout.traits.declarations)
        steps += len(talk.steps)
        thinking += sum(bool(talk.messages[at].reasoning_content) for at in talk.steps)
        messages = server_messages(talk, layout.traits)
        reasons = any(message.reasoning_content for message in talk.messages)
        args = layout.args(reasoning=reasons)
        args.pop("strftime_now", None)
        for step, message in made_steps(layout, name, talk):
            served = layout.template.tokenizer.apply_chat_template(
                handed_over(messages[: talk.steps[step.index]], layout.traits),
                tools=list(talk.tools) or None,
                chat_template=layout.template.source,
                add_generation_prompt=True,
                return_dict=False,
                sanitize_control_tokens=any(t in str(messages) for t in layout.template.control_tokens),
                **args,
            )
            said = read(step)
            trained += 1
            equal += list(served) == step.input_ids[: step.start].tolist()
            back += not differs(said, message)
            kept += bool(message.reasoning_content) and said.reasoning == message.reasoning_content.strip()
    reasoning = f"{kept} of {thinking}" if layout.traits.reasoning else "none written"
    return (
        response.name if response is not None else "none",
        f"{trained} of {steps}",
        f"{equal} of {trained}",
        f"{back} of {trained}",
        reasoning,
    )


if __name__ == "__main__":
    main()
