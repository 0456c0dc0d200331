"""Hold the pages to the program: commands run, files and links exist, pages are short and in plain words.

By default every command is taken apart and checked without training: settings are composed and checked, options looked up,
and what only reads runs is run for real on the two runs that the Python page makes. `-m slow` runs the README for real.
"""

from __future__ import annotations

import ast
import importlib
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from agentft.config import AuditConfig, EvaluateConfig, ExportConfig, TrainConfig, compose, to_config

ROOT = Path(__file__).resolve().parent.parent
GENERATED = ROOT / "docs" / "configuration.md"
KEPT = {ROOT / "docs" / "log.md", GENERATED, ROOT / "docs" / "sweep_example" / "table.md"}
"""History, the page of settings that tests/test_config.py makes, and a table as `agentft.compare` writes it."""

FRONT = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
FIGURES = sorted((ROOT / "benchmarks").glob("*.md"))
PAGES = [page for page in FRONT if page.is_file()] + [page for page in DOCS if page not in KEPT]
"""Pages that people write, without the tables of figures beside the benchmarks."""

MOST_WORDS, MOST_WORDS_OF_ALL, MOST_LINES_OF_README = 700, 14_000, 100
NOT_OUR_WORDS = re.compile(r"\b(houses?|rooms?|floors?|laws?|exams?)\b", re.IGNORECASE)

NOT_RUN = {
    "vllm serve": "vLLM is not installed here; tests/evaluation/test_openai_engine.py asks a server of our own",
    "wandb sync": "needs W&B's server and a key",
    "wandb leet": "an interactive terminal program",
    "wandb sweep": "needs W&B's server and a key",
    "wandb agent": "needs a sweep on W&B's server",
    "python -m agentft.dashboard --project": "saves on W&B's server; tests/test_dashboard.py plays one",
    "python train.py -m hydra/sweeper=optuna": "the plugin needs an old optuna, which the test environment does not have",
    "srun": "needs a SLURM cluster; `make cluster` runs where there is one",
    "torchrun": "needs two machines; tests/distributed/test_job.py runs it with two agents on one",
    "pip install": "changes the environment; the extras it names are looked up in pyproject.toml",
}
"""Beginning of a command -> why no test runs it."""

HYDRA_PROGRAMS = {
    "train.py": ("train", TrainConfig),
    "agentft.recipes.minimal": ("train", TrainConfig),
    "evaluate.py": ("evaluate", EvaluateConfig),
    "agentft.audit": ("audit", AuditConfig),
    "agentft.export": ("export", ExportConfig),
}
READERS = ("agentft.compare", "agentft.score", "agentft.read", "agentft.dashboard")

PLACES = {
    "compare runs/lora_rank ": "compare runs ",
    "compare runs/lora_grid ": "compare runs ",
    "runs/<sweep>": "runs",
    "runs/<run>": "runs/first",
    "runs/<a>": "runs/first",
    "runs/<b>": "runs/second",
    "runs/mine": "runs/first",
    "<id>": "synthetic-0",
    "<name>": "model",
    "owner/name": "owner/name",
}
"""What pages write for a reader's own -> what there is in the folder that the commands run in."""


@dataclass(frozen=True)
class Command:
    """One command of a page."""

    page: str
    text: str

    @property
    def words(self) -> list[str]:
        text = f"{self.text} "
        for placeholder, there in PLACES.items():
            text = text.replace(placeholder, there)
        return shlex.split(text)

    def __str__(self) -> str:
        return f"{self.page}: {self.text[:70]}"


def fences(page: Path, *languages: str) -> list[str]:
    """Return the fenced blocks of a page in these languages."""
    text = page.read_text(encoding="utf-8")
    return [body for language, body in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S) if language in languages]


def commands(pages: list[Path]) -> Iterator[Command]:
    for page in pages:
        for block in fences(page, "sh", "bash", "shell"):
            for line in block.replace("\\\n", " ").splitlines():
                for part in line.split(" && "):
                    words = " ".join(part.split("  #")[0].split())
                    if words and not words.startswith("#"):
                        yield Command(page.relative_to(ROOT).as_posix(), words)


COMMANDS = list({command.text: command for command in reversed([*commands([*PAGES, GENERATED, *FIGURES])])}.values())[
    ::-1
]
"""Each once, with the first page that has it."""


def of_program(command: Command) -> tuple[str, list[str]] | None:
    """Return the Python program of a command, `train.py` or `agentft.score`, with its arguments."""
    match command.words:
        case ["python", "-m", module, *arguments]:
            return module, arguments
        case ["python", script, *arguments]:
            return script, arguments
    return None


def not_run(command: Command) -> str | None:
    return next((why for beginning, why in NOT_RUN.items() if command.text.startswith(beginning)), None)


def chosen(*programs: str) -> list[Command]:
    found = [(command, of_program(command)) for command in COMMANDS if not_run(command) is None]
    return [command for command, program in found if program is not None and program[0] in programs]


# --- The Python page, whose runs the commands read ---


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Run the Python page from top to bottom and return the folder with its two runs and a reader's own files."""
    place = tmp_path_factory.mktemp("reader")
    before = Path.cwd()
    os.chdir(place)
    try:
        namespace: dict[str, object] = {"__name__": "python_api"}
        for number, block in enumerate(fences(ROOT / "docs" / "python_api.md", "python"), 1):
            exec(compile(block, f"docs/python_api.md, block {number}", "exec"), namespace)
        for name in ("predictions.jsonl", "FILE.jsonl"):
            shutil.copy(place / "runs" / "first" / "predictions" / "after.jsonl", place / name)
        for name in ("my.jsonl", "a.jsonl", "b.jsonl"):
            shutil.copy(ROOT / "tests" / "golden" / "conversations.jsonl", place / name)
        yield place
    finally:
        os.chdir(before)


def test_the_python_page_runs(workplace: Path):
    assert (workplace / "runs" / "first" / "final").is_dir()
    assert (workplace / "runs" / "second" / "final").is_dir()


# --- Commands ---


def test_few_commands_are_not_run_and_each_has_its_reason():
    assert len(NOT_RUN) <= 10
    for beginning in NOT_RUN:
        assert any(command.text.startswith(beginning) for command in COMMANDS), f"no page has {beginning!r}: drop it"


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_every_command_has_a_test(command: Command):
    """Each is of a kind that one of the tests below takes."""
    program = of_program(command)
    if not_run(command) is None and not command.text.startswith("make "):
        assert program is not None, "no test runs this command: add it to NOT_RUN with its reason, or leave it out"
        ours = program[0] in (*HYDRA_PROGRAMS, *READERS, "pytest")
        assert ours or re.fullmatch(r"benchmarks[./]\w+(\.py)?", program[0]), program[0]


def parsed(arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    """Split the flags from the settings; flags stand first, as the programs want it."""
    flags: dict[str, str] = {}
    rest = list(arguments)
    while rest and rest[0].startswith("-"):
        flag = rest.pop(0)
        flags[flag] = rest.pop(0) if flag in ("--config-dir", "--config-name", "--cfg") else ""
    assert not [word for word in rest if word.startswith("-")], "flags stand before all settings"
    return flags, rest


def each_job(settings: list[str], *, sweep: bool) -> Iterator[list[str]]:
    """Yield settings in which every value of a sweep occurs; of a single run those given."""
    parser = OverridesParser.create()
    choices: list[list[str]] = []
    for line in settings:
        override = parser.parse_override(line)
        assert sweep or not override.is_sweep_override(), f"{line}: several values need -m"
        values = override.sweep_string_iterator() if override.is_sweep_override() else ()
        choices.append([f"{line.partition('=')[0]}={value}" for value in values] or [line])
    for turn in range(max(map(len, choices), default=1)):
        yield [lines[min(turn, len(lines) - 1)] for lines in choices]


@pytest.mark.parametrize("command", chosen(*HYDRA_PROGRAMS), ids=str)
def test_settings_of_a_command_compose(command: Command, workplace: Path):
    """Every job's settings are composed and checked, as the program does before it imports torch."""
    program, arguments = of_program(command) or ("", [])
    primary, root = HYDRA_PROGRAMS[program]
    flags, settings = parsed(arguments)
    if "--help" in flags:
        done = subprocess.run([sys.executable, ROOT / program, "--help"], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "training" in done.stdout
        return
    folder = flags.get("--config-dir")
    if folder is not None and not Path(folder).is_dir():
        folder = str(ROOT / folder)
    if program == "evaluate.py" and any(s.startswith("evaluation.") for s in settings) and "--cfg" not in flags:
        settings = ["evaluation=default", *settings]
    name = flags.get("--config-name", primary)
    for job in each_job(settings, sweep="-m" in flags or name != primary):
        composed = compose(name, job, folder)
        assert "--cfg" in flags or isinstance(to_config(composed, root), root)  # a look may lack values


@pytest.mark.parametrize("command", chosen(*READERS), ids=str)
def test_what_only_reads_runs(command: Command, workplace: Path, capsys: pytest.CaptureFixture[str]):
    module, arguments = of_program(command) or ("", [])
    if module == "agentft.dashboard":
        pytest.importorskip("wandb_workspaces")
    code = importlib.import_module(module).main(arguments)
    assert not code, capsys.readouterr().err
    written = [Path(word) for flag, word in itertools.pairwise(arguments) if flag in ("--json", "--html", "--write")]
    assert all(path.is_file() for path in written if path.suffix)


MISTAKES = re.findall(r"^\$ python (train\.py .*)\n(.*)$", fences(GENERATED, "console")[0], re.M)


@pytest.mark.parametrize(("command", "answer"), MISTAKES)
def test_a_mistake_is_answered_as_the_page_shows(command: str, answer: str, tmp_path: Path):
    program, *arguments = command.split()
    start = [sys.executable, ROOT / program, *arguments]
    done = subprocess.run(start, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stderr[: len(answer)]) == (2, answer)
    assert list(tmp_path.iterdir()) == []


BENCHMARKS = [c for c in COMMANDS if (p := of_program(c)) is not None and p[0].startswith("benchmarks")]


@pytest.mark.parametrize("command", BENCHMARKS, ids=str)
def test_a_benchmark_has_the_options_that_are_named(command: Command):
    program, arguments = of_program(command) or ("", [])
    script = ROOT / f"{program.removesuffix('.py').replace('.', '/')}.py"
    assert script.is_file()
    known = {
        node.args[0].value
        for node in ast.walk(ast.parse(script.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument"
        and isinstance(node.args[0], ast.Constant)
    }  # fmt: skip
    assert {word for word in arguments if word.startswith("--")} <= known


def test_targets_of_make_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.M))
    named = {command.text.split()[1] for command in COMMANDS if command.text.startswith("make ")}
    for page in [*PAGES, *FIGURES]:
        named |= set(re.findall(r"`make ([a-z-]+)`", page.read_text(encoding="utf-8")))
    assert named
    assert named <= targets


def test_extras_that_are_installed_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for page in PAGES:
        for names in re.findall(r"pip install (?:--\S+ )*-e '\.\[([\w,]+)\]'", page.read_text(encoding="utf-8")):
            assert set(names.split(",")) <= extras.keys(), page


TINY = {
    "train.py": ["model=tiny", "training.max_steps=1", "training.epochs=1", "evaluation.max_new_tokens=4",
                 "evaluation.conversations=2", "evaluation.bootstrap_samples=100", "training.warmup=0"],
    "evaluate.py": ["evaluation=default", "evaluation.max_new_tokens=4", "evaluation.conversations=2"],
    "agentft.recipes.minimal": [],
    "agentft.audit": ["model=tiny"],
    "agentft.export": ["out=exported"],
}  # fmt: skip
"""What makes a command of the README a matter of seconds."""


ON_THE_README = [c for c in chosen(*HYDRA_PROGRAMS) if c.page == "README.md" and "experiment=msagent_7b" not in c.text]
"""All but the old script's 7B model and data set, which are on a hub and are composed above only."""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("command", ON_THE_README, ids=str)
def test_a_command_of_the_readme_runs(command: Command, workplace: Path):
    """The command itself, on the tiny model and for a step, as a program of its own."""
    program, arguments = of_program(command) or ("", [])
    start = [sys.executable, ROOT / program] if program.endswith(".py") else [sys.executable, "-m", program]
    flags, settings = parsed(arguments)
    given = [word for flag in flags.items() for word in flag if word]
    if "--help" not in flags and not any(word.startswith("run_dir=") for word in settings):
        replaced = {setting.partition("=")[0] for setting in settings}
        settings += [word for word in TINY[program] if word.partition("=")[0] not in replaced - {"training.epochs"}]
        if not any(word.startswith("dataset=") for word in settings):
            settings += ["dataset.conversations=8", "dataset.heldout=2"] if program == "train.py" else []
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*start, *given, *settings], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


# --- Files, links, words ---


def slugs(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [*FRONT, *DOCS, *FIGURES], ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{target}: not there"
        assert not anchor or anchor in slugs(there), f"{target}: no such heading"


NAMED_FILE = re.compile(r"(?<![\w/.<])((?:agentft|tests|conf|sweeps|benchmarks|docs)/[\w./-]*\w)")


@pytest.mark.parametrize("page", [*PAGES, *FIGURES], ids=lambda page: page.relative_to(ROOT).as_posix())
def test_files_that_are_named_exist(page: Path):
    if page.name == "CHANGELOG.md":
        return  # it names what is gone
    text = re.sub(r"\]\([^)]*\)", "]", page.read_text(encoding="utf-8"))
    for name in NAMED_FILE.findall(text):
        assert (ROOT / name).exists() or (ROOT / f"{name}.py").exists(), f"{name}: not there"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_a_page_is_short_and_in_plain_words(page: Path):
    text = page.read_text(encoding="utf-8")
    assert len(text.split()) <= MOST_WORDS or page == ROOT / "README.md"
    assert max(map(len, text.splitlines())) < 1000
    found = NOT_OUR_WORDS.search(text)
    assert found is None, f"{found[0]}: say it in the field's words"


def test_all_pages_together_are_short():
    assert sum(len(page.read_text(encoding="utf-8").split()) for page in PAGES) <= MOST_WORDS_OF_ALL
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= MOST_LINES_OF_README


def test_the_index_lists_every_page():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    for page in [*(page for page in DOCS if page in PAGES), *KEPT - {ROOT / "docs" / "sweep_example" / "table.md"}]:
        assert page.name == "README.md" or f"({page.relative_to(ROOT / 'docs').as_posix()})" in index, page
    figures = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    for page in FIGURES:
        assert page.name == "README.md" or f"({page.name}" in figures, page
