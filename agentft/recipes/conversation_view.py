"""One conversation with its labels, token by token: coloured in a terminal, and readable without colours too."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from agentft.comparison.render import visible
from agentft.data.audit import Seen
from agentft.data.render import Kind
from agentft.data.token_text import TokenText
from agentft.data.tokens import IGNORE_INDEX

if TYPE_CHECKING:
    from rich.console import Console

_STYLES: dict[Kind, tuple[str, str]] = {
    Kind.header: ("bright_black", "bright_black"),
    Kind.system: ("bright_black", "bright_black"),
    Kind.user: ("yellow", "yellow"),
    Kind.observation: ("magenta", "magenta"),
    Kind.reasoning: ("black on #d9c2f0", "black on #eadff7"),
    Kind.text: ("black on #8fc7ff", "black on #c4e2ff"),
    Kind.call: ("black on #7fd88f", "black on #b5ecc0"),
    Kind.frame: ("black on #d5e8d8", "black on #e6f3e8"),
    Kind.stop: ("white on #c04040", "white on #c04040"),
}
"""Kind -> styles of its tokens, in turn, so that the borders of trained tokens can be seen."""


@dataclass(slots=True)
class Run:
    """Neighbouring tokens of one kind and one fate."""

    kind: Kind
    trained: bool
    start: int
    """Position of the first token."""
    pieces: list[tuple[str, int]] = field(default_factory=list)
    """Text and number of tokens: one token each, several where they share a character."""

    @property
    def tokens(self) -> int:
        return sum(count for _, count in self.pieces)

    @property
    def title(self) -> str:
        """`+call 34`: trained or not, what it is, how many tokens."""
        return f"{'+' if self.trained else '-'}{self.kind.name} {self.tokens}"


def labelled_runs(seen: Seen, text: TokenText) -> Iterator[Run]:
    """A conversation as runs. Trained is what has a label; the kind is what the text under it is."""
    example = seen.example
    labelled = example.labels != IGNORE_INDEX
    kinds = text.kinds(example.input_ids, seen.segments)
    for span in example.spans:
        kinds[span.start : span.stop] = span.kind
    start = 0
    for stop in range(1, len(example) + 1):
        at_end = stop == len(example)
        if not at_end and (kinds[stop], labelled[stop]) == (kinds[start], labelled[start]):
            continue
        pieces = list(text.pieces(example.input_ids[start:stop]))
        yield Run(Kind(int(kinds[start])), bool(labelled[start]), start, pieces)
        start = stop


def print_conversation(seen: Seen, text: TokenText, console: Console, *, max_length: int) -> None:
    """Print every token, the trained ones on colour, with a margin that says the same in words."""
    from rich.table import Table
    from rich.text import Text

    conversation, example = seen.conversation, seen.example
    table = Table(show_header=False, box=None, padding=(0, 1), expand=True)
    table.add_column(justify="right", no_wrap=True, width=17)
    table.add_column(overflow="fold", ratio=1)
    trained = 0
    for run in labelled_runs(seen, text):
        line = Text()
        for number, (piece, _) in enumerate(run.pieces):
            shown = visible(piece).replace("\n", "⏎\n") if run.trained else visible(piece)
            line.append(shown, _STYLES[run.kind][number % 2] if run.trained else _STYLES[run.kind][0])
        trained += run.tokens if run.trained else 0
        table.add_row(Text(run.title, "bold" if run.trained else "bright_black"), line)
    console.print(f"{visible(conversation.id)}  {conversation.origin}", style="bold")
    console.print(table)
    length = len(example)
    over = f", over dataset.max_length={max_length}" if length > max_length else ""
    console.print(
        f"{length:,} tokens{over}, {trained:,} trained ({trained / max(length, 1):.0%}); {len(example.steps())} steps; "
        "+ is trained, - is masked"
    )
