"""The mask law: what the agent must say is trained, and nothing else ever is."""

from __future__ import annotations

import json
import re
from itertools import groupby, takewhile
from pathlib import Path

import pytest

from agentft.data.calls import Call
from agentft.data.conversation import Conversation, Message, Observation, Origin, Text, chat_messages
from agentft.data.msagent import turn_messages
from agentft.data.render import TRAINED_KINDS, Rendering, SpanKind
from agentft.data.template_choice import choose_template, exported_template
from agentft.data.tokens import IGNORE_INDEX, SegmentEncoder
from agentft.data.truncation import make_examples
from agentft.errors import ConfigError
from agentft.model.sources import byte_tokenizer
from tests.data.chat_families import MISTRAL_FILES, mistral_tokenizer, sentencepiece_tokenizer
from tests.examples import tokenize

CASES = [
    "one_call",
    "no_tool_needed",
    "several_rounds",
    "several_executions_in_one_turn",
    "text_before_the_call",
    "parallel_calls",
    "parallel_calls_then_observations",
    "failing_tool_then_retry",
    "observation_without_summary",
    "chinese",
    "user_quotes_marks_and_control_tokens",
    "no_system",
]


def _readable(example, tokenizer) -> str:
    """One line a run of tokens with one fate: `+` and what it is where it is trained, `-context` elsewhere."""
    fates = ["-context"] * len(example)
    for span in example.spans:
        fates[span.start : span.stop] = [f"+{span.kind.name}"] * (span.stop - span.start)
    assert [fate[0] == "+" for fate in fates] == (example.labels != IGNORE_INDEX).tolist()
    lines = []
    position = 0
    for fate, group in groupby(fates):
        length = len(list(group))
        text = tokenizer.decode(example.input_ids[position : position + length], skip_special_tokens=False)
        lines += [f"{fate:<8} |{line}|" for line in text.split("\n")]
        position += length
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("name", CASES)
def test_labels_equal_the_golden_file(
    name, golden_conversations, golden_folder: Path, template, encoder, byte_tokenizer, update_golden
):
    (example,) = tokenize([golden_conversations[name]], template, encoder)
    text = _readable(example, byte_tokenizer)
    golden = golden_folder / "labels" / f"{name}.txt"
    if update_golden:
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(text, encoding="utf-8")
    assert text == golden.read_text(encoding="utf-8"), f"{golden} differs; if that is meant: pytest --update-golden"


def test_every_golden_conversation_has_a_case(golden_conversations):
    assert sorted(golden_conversations) == sorted(CASES)


def test_text_without_stops_is_the_original_layout_byte_for_byte(golden_conversations, template):
    for conversation in golden_conversations.values():
        text = "".join(segment.text for segment in template.render(conversation) if segment.kind is not SpanKind.stop)
        original = "\n\n".join(f"<|{turn.role}|>:{turn.text}" for turn in conversation.turns)
        assert text == original


def test_observations_users_and_systems_are_never_trained(golden_conversations, template):
    for conversation in golden_conversations.values():
        trained = "".join(segment.text for segment in template.render(conversation) if segment.trained)
        for message in conversation.messages:
            assert message.role == "assistant" or (message.source_text or message.text) not in trained


def test_every_call_and_every_word_of_the_agent_is_trained(golden_conversations, template):
    for conversation in golden_conversations.values():
        trained = "".join(segment.text for segment in template.render(conversation) if segment.trained)
        for message in conversation.messages:
            for part in message.source or ():
                if isinstance(part, Call | Text):
                    assert part.source.strip() in trained


def test_every_step_ends_with_one_trained_stop(golden_conversations, template, encoder):
    stop_id = encoder.special_id(template.stop_token)
    for example in tokenize(golden_conversations.values(), template, encoder):
        for start, stop in example.steps():
            step = example.input_ids[start:stop].tolist()
            assert step[-1] == stop_id
            assert step.count(stop_id) == 1


def test_parallel_calls_share_one_step(golden_conversations, template, encoder):
    (example,) = tokenize([golden_conversations["parallel_calls"]], template, encoder)
    assert len(example.steps()) == 1


def test_text_of_users_never_becomes_a_control_token(golden_conversations, template, encoder):
    conversation = golden_conversations["user_quotes_marks_and_control_tokens"]
    (example,) = tokenize([conversation], template, encoder)
    specials = {encoder.special_id(token) for token in ("<|im_end|>", "<|endoftext|>", "<|im_start|>")}
    found = [int(i) for i in example.input_ids if int(i) in specials]
    assert found == [encoder.special_id(template.stop_token)]


def test_generation_prompt_is_a_prefix_of_the_training_ids(golden_conversations, template, encoder):
    """Encoding the context alone, as a server would, gives the ids that training showed before the step."""
    for conversation in golden_conversations.values():
        (example,) = tokenize([conversation], template, encoder)
        segments = template.render(conversation)
        for number, (start, _) in enumerate(example.steps()):
            prompt = _context(segments, number)
            (((alone, _),),) = encoder.encode([("prompt", Rendering(tuple(prompt), by_chunks=True))])
            assert alone.input_ids.tolist() == example.input_ids[:start].tolist()


def _context(segments, number):
    steps_seen = 0
    for at, segment in enumerate(segments):
        if segment.trained and (at == 0 or not segments[at - 1].trained):
            if steps_seen == number:
                return segments[:at]
            steps_seen += 1
    raise AssertionError("no such step")


def test_white_space_at_the_edges_of_a_step_is_context(template):
    call = Call("<|startofthink|>{}<|endofthink|>", (), None)
    observation = Observation("<|startofexec|>1<|endofexec|>")
    turn = turn_messages((Text(" \n"), call, Text("\n \n"), observation, Text("\n")))
    conversation = Conversation("c", (Message("user", "u"), *turn), (), Origin("test", 1))
    segments = template.render(conversation)
    trained = [segment.text for segment in segments if segment.trained]
    assert trained == [call.source, template.stop_token]
    assert "".join(s.text for s in segments).endswith("<|endofthink|><|im_end|>\n \n<|startofexec|>1<|endofexec|>\n")


def test_no_special_token_is_added_at_chunk_borders(golden_conversations, template, encoder, byte_tokenizer):
    """A tokenizer that prepends a token to every text must not do so inside a conversation."""
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.from_str(byte_tokenizer.backend_tokenizer.to_str())
    backend.post_processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    adding = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    assert adding("x").input_ids[0] == 1
    conversations = list(golden_conversations.values())
    plain = [example.input_ids.tolist() for example in tokenize(conversations, template, encoder)]
    assert [e.input_ids.tolist() for e in tokenize(conversations, template, SegmentEncoder(adding))] == plain


def test_the_law_is_stated_once():
    """render.py alone says which kinds are trained. Reports may read the law; nothing that makes labels consults it again."""
    package = Path(__file__).resolve().parents[2] / "agentft"
    sources = {path.relative_to(package): path.read_text(encoding="utf-8") for path in package.rglob("*.py")}
    home = Path("data/render.py")
    assert [path for path, text in sources.items() if re.search(r"^TRAINED_KINDS\b.*=", text, re.MULTILINE)] == [home]
    makers = [path for path in sources if path.parts[0] in ("data", "training", "model") and path != home]
    assert len(makers) > 40
    assert [path for path in makers if "TRAINED_KINDS" in sources[path]] == []
    assert (
        frozenset({SpanKind.reasoning, SpanKind.text, SpanKind.call, SpanKind.call_syntax, SpanKind.stop})
        == TRAINED_KINDS
    )


def test_real_conversations_keep_every_byte_and_train_no_observation(shared_data: Path, template, encoder):
    from agentft.data.sources import read_conversations, read_local

    conversations = [
        c for c in read_conversations(read_local(shared_data / "dev.jsonl")) if isinstance(c, Conversation)
    ]
    assert len(conversations) == 303
    for conversation in conversations:
        segments = template.render(conversation)
        text = "".join(segment.text for segment in segments if segment.kind is not SpanKind.stop)
        assert text == "\n\n".join(f"<|{turn.role}|>:{turn.text}" for turn in conversation.turns)
        trained = "".join(segment.text for segment in segments if segment.trained)
        assert "<|startofexec|>" not in trained
        assert trained.count("<|startofthink|>") == len(conversation.tool_calls)


def test_a_text_begins_once_with_what_the_tokenizer_puts_before_every_text(golden_conversations):
    """As Llama's and Mistral's tokenizers do; the exported template writes the same ids."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer()
    tokenizer.bos_token = "<|im_start|>"
    bos = tokenizer.bos_token_id
    plain = choose_template("msagent", tokenizer)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", bos)]
    )
    template, encoder = choose_template("msagent", tokenizer), SegmentEncoder(tokenizer)
    assert (plain.beginning, template.beginning) == (None, "<|im_start|>")
    conversation = golden_conversations["one_call"]
    without, example = (next(tokenize([conversation], each, encoder)) for each in (plain, template))
    assert example.input_ids.tolist() == [bos, *without.input_ids.tolist()]
    assert example.labels.tolist() == [IGNORE_INDEX, *without.labels.tolist()]
    written = tokenizer.apply_chat_template(
        chat_messages(conversation.messages[:2]),
        chat_template=exported_template(template),
        add_generation_prompt=True,
        return_dict=False,
    )
    assert written == example.input_ids[: example.steps()[0][0]].tolist()


def _sentencepiece(blank: str):
    """A tokenizer that puts a blank before the first text, or before each between special tokens as Llama 2's does."""
    if blank in MISTRAL_FILES:
        made = mistral_tokenizer(blank)
        made.eos_token = "</s>"
        return made
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    backend = json.loads(sentencepiece_tokenizer().backend_tokenizer.to_str())
    if blank == "normalizer":
        replace = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
        backend["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, replace]}
        backend["pre_tokenizer"] = None
    else:
        backend["pre_tokenizer"]["prepend_scheme"] = blank
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(backend)), eos_token="</s>")
    assert made.convert_ids_to_tokens(made("High").input_ids)[0].startswith("\u2581")
    return made


@pytest.mark.parametrize(
    "blank",
    ["first", "always", "normalizer", *(pytest.param(f"mistral_v{n}", marks=pytest.mark.slow) for n in (1, 3))],
)
def test_a_tokenizer_that_puts_a_blank_before_a_text_puts_none_before_a_step(blank: str, golden_conversations):
    tokenizer = _sentencepiece(blank)
    template, encoder = choose_template("msagent", tokenizer), SegmentEncoder(tokenizer)
    steps = 0
    for made in make_examples(golden_conversations.values(), template, encoder):
        assert made.problem is None
        for piece in made.pieces:
            ids = piece.example.input_ids
            segments = template.render(piece.conversation)
            for number, (start, stop) in enumerate(piece.example.steps()):
                context = _context(segments, number)
                said = takewhile(lambda segment: segment.trained, segments[len(context) :])
                assert tokenizer.decode(ids[start:stop]) == "".join(segment.text for segment in said)
                prompt = tokenizer("".join(segment.text for segment in context), add_special_tokens=False).input_ids
                assert prompt == ids[:start].tolist(), "as a server encodes the prompt"
                steps += 1
    assert steps == 25


def test_a_value_that_spells_the_stop_is_letters_for_such_a_tokenizer_too(golden_conversations):
    tokenizer = _sentencepiece("first")
    template = choose_template("msagent", tokenizer)
    talk = Conversation(
        "c", (Message("user", "Is </s> a mark?"), Message("assistant", "No, </s> is.")), (), Origin("test", 1)
    )
    ((example,),) = [
        [piece.example for piece in made.pieces] for made in make_examples([talk], template, SegmentEncoder(tokenizer))
    ]
    assert example.input_ids.tolist().count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(example.input_ids) == " <|user|>:Is </s> a mark?\n\n<|assistant|>:No, </s> is.</s>"


def test_a_stop_that_only_text_reaches_is_refused_for_such_a_tokenizer():
    tokenizer = _sentencepiece("first")
    with pytest.raises(ConfigError, match="has to be a special token"):
        SegmentEncoder(tokenizer).special_id("tide")
