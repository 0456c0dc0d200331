"""The comparison: only what differs is shown, what cannot be told from the best is called tied, unfinished sweeps are read."""

from __future__ import annotations

import csv
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from agentft.compare import main, write_sweep_tables
from agentft.comparison.page import fit_sample_curve
from agentft.comparison.ranking import csv_text, differing_settings, markdown, rank
from agentft.comparison.runs import read_run, read_runs
from agentft.errors import ConfigError, RunError
from agentft.evaluation.metrics import aggregate
from agentft.evaluation.steps import StepScore

REPOSITORY = Path(__file__).parent.parent

SETTINGS = {
    "defaults": ["schema_train"],
    "model": {"name": "tiny"},
    "sft_type": {"name": "lora", "rank": 8},
    "dataset": {"name": "synthetic", "max_samples": -1},
    "training": {"learning_rate": 1e-3},
    "tracking": {"mode": "disabled"},
    "seed": 42,
}


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


def make_run(
    folder: Path,
    settings: dict[str, Any] | None = None,
    *,
    right: Callable[[int], bool] | None = None,
    conversations: int = 60,
    state: str = "finished",
    loss: float = 1.0,
    exam: str = "a",
    predictions: bool = True,
    **status: Any,
) -> Path:
    """A run folder as train.py leaves it; `right` tells which of the conversations' calls are right."""
    tree = {group: dict(part) if isinstance(part, dict) else part for group, part in SETTINGS.items()}
    for key, value in (settings or {}).items():
        group, _, name = key.rpartition(".")
        (tree[group] if group else tree)[name] = value
    write(folder / "config.yaml", yaml.safe_dump(tree | {"run_dir": str(folder), "output_dir": "runs"}))
    write(folder / "status.json", {"state": state, "step": 5, "steps": 10, "eval_loss": loss, **status})
    if right is None:
        return folder
    scores = [
        StepScore(
            conversation_id=f"c{i}",
            step=0,
            reference_hash=f"{exam}{i}",
            is_action=True,
            predicts_call=True,
            reference_calls=1,
            attempts=1,
            wellformed=1,
            name_correct=1,
            exact=int(right(i)),
            argument_f1=float(right(i)),
        )
        for i in range(conversations)
    ]
    write(folder / "metrics" / "after.json", aggregate(scores, bootstrap_samples=200, seed=0))
    write(folder / "summary.json", {"steps": 10, "tokens": 1000, "best_loss": loss, "peak_memory_bytes": 2**30})
    if predictions:
        write(folder / "predictions" / "after.jsonl", "\n".join(json.dumps({"scores": s.to_json()}) for s in scores))
    return folder


def table(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(text.splitlines()))


def test_only_what_differs_is_shown(tmp_path: Path) -> None:
    make_run(tmp_path / "0_a", {"sft_type.rank": 4, "tracking.mode": "offline"})
    make_run(tmp_path / "1_b", {"sft_type.rank": 8, "dataset.max_samples": 100, "dataset.workers": 1})
    make_run(tmp_path / "2_c", {"training.logging_steps": 5, "experiment": "e", "dataset.name": "local"})
    assert differing_settings(read_runs([tmp_path])) == {
        "sft_type.rank": "rank",
        "dataset.name": "dataset",
        "dataset.max_samples": "max_samples",
    }


def test_what_follows_from_a_choice_is_left_out_and_equal_names_are_told_apart(tmp_path: Path) -> None:
    for i, (name, rank_, seed) in enumerate([("lora", 8, 1), ("full", None, 1), ("lora", 8, 2), ("full", None, 2)]):
        changes = {"sft_type.name": name, "sft_type.rank": rank_, "dataset.seed": seed, "seed": seed}
        make_run(tmp_path / f"{i}", changes)
    assert differing_settings(read_runs([tmp_path])) == {
        "sft_type.name": "sft_type",
        "dataset.seed": "dataset.seed",
        "seed": "seed",
    }


def test_a_setting_that_follows_a_swept_one_is_left_out(tmp_path: Path) -> None:
    for i, (rank_, seed) in enumerate([(4, 1), (8, 1), (4, 2), (8, 2)]):
        folder = make_run(tmp_path / f"{i}", {"sft_type.rank": rank_, "sft_type.alpha": 2 * rank_, "seed": seed})
        write(folder / "job.json", {"state": "finished", "swept": [f"sft_type.rank={rank_}", f"seed={seed}"]})
    assert differing_settings(read_runs([tmp_path])) == {"sft_type.rank": "rank", "seed": "seed"}
    write(
        tmp_path / "3" / "job.json", {"state": "finished", "swept": ["sft_type.rank=8", "sft_type.alpha=16", "seed=2"]}
    )
    assert "sft_type.alpha" in differing_settings(read_runs([tmp_path])), "somebody set it"


def test_a_page_by_loss_shows_the_loss_and_calls_the_least_the_best(tmp_path: Path) -> None:
    for i, loss in enumerate((3.0, 1.0, 2.0)):
        folder = make_run(tmp_path / "s" / f"{i}", {"sft_type.rank": 2**i}, right=lambda k: False, loss=loss)
        write(folder / "job.json", {"state": "finished", "seconds": 60.0 * (i + 1)})
    assert main([str(tmp_path / "s"), "--sort", "loss", "--html", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<h3>loss against rank</h3>" in page
    assert "<h3>loss against minutes of the whole run</h3>" in page
    places = {run: place for place, run in re.findall(r'class="dot" style="--s:([\d.]+)" data-run="(\d)"', page)}
    assert places == {"0": "0.00", "1": "1.00", "2": "0.50"}


def test_the_best_is_marked_and_so_is_what_cannot_be_told_from_it(tmp_path: Path) -> None:
    make_run(tmp_path / "0_good", {"sft_type.rank": 1}, right=lambda i: i % 10 != 0)
    make_run(tmp_path / "1_nearly", {"sft_type.rank": 2}, right=lambda i: i % 10 not in (0,) and i != 1)
    make_run(tmp_path / "2_bad", {"sft_type.rank": 3}, right=lambda i: i % 2 == 0)
    make_run(tmp_path / "3_other", {"sft_type.rank": 4}, right=lambda i: i % 3 != 0, exam="b")
    ranking = rank(read_runs([tmp_path]))
    assert [run.name for run in ranking.runs] == ["0_good", "1_nearly", "3_other", "2_bad"]
    assert ranking.marks == {"0_good": "best", "1_nearly": "tied", "2_bad": "", "3_other": "other data"}
    assert ranking.p["2_bad"] < 0.05 < ranking.p["1_nearly"]
    words = " ".join(ranking.notes)
    assert "paired test" in words
    assert "other held-out conversations" in words
    assert "60 conversations: the 95 % intervals are indicative" in words


def test_without_predictions_nothing_is_tested_and_the_table_says_so(tmp_path: Path) -> None:
    make_run(tmp_path / "a", right=lambda i: i % 5 != 0, predictions=False)
    make_run(tmp_path / "b", right=lambda i: i % 4 != 0, predictions=False)
    ranking = rank(read_runs([tmp_path]))
    assert ranking.marks == {"a": "best"}
    assert "1 run(s) not tested: their predictions, or those of the best run, are missing" in ranking.notes


def test_equal_scores_are_ordered_by_loss(tmp_path: Path) -> None:
    make_run(tmp_path / "a", right=bool, loss=2.0)
    make_run(tmp_path / "b", right=bool, loss=1.0)
    make_run(tmp_path / "c", loss=0.5, state="running", pid=os.getpid(), host=socket.gethostname())
    assert [run.name for run in rank(read_runs([tmp_path])).runs] == ["b", "a", "c"]
    assert [run.name for run in rank(read_runs([tmp_path]), "loss").runs] == ["c", "b", "a"]
    with pytest.raises(ConfigError, match="--sort nonsense"):
        rank(read_runs([tmp_path]), "nonsense")


def test_a_half_finished_sweep_is_read_with_the_state_of_each_job(tmp_path: Path) -> None:
    me = {"pid": os.getpid(), "host": socket.gethostname()}
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    make_run(tmp_path / "0", {"sft_type.rank": 1}, right=bool)
    make_run(tmp_path / "1", {"sft_type.rank": 2}, state="running", **me)
    make_run(tmp_path / "2", {"sft_type.rank": 3}, state="running", pid=gone.pid, host=socket.gethostname())
    make_run(tmp_path / "3", {"sft_type.rank": 4}, state="running", **me)
    write(tmp_path / "3" / "job.json", {"state": "failed", "reason": "killed by SIGKILL (out of memory?)"})
    settings = {key: value for key, value in SETTINGS.items() if key != "defaults"} | {
        "sft_type": {"name": "lora", "rank": 5}
    }
    write(tmp_path / "4" / "job.json", {"state": "waiting", "settings": settings, "swept": ["sft_type.rank=5"]})
    make_run(tmp_path / "5", {"sft_type.rank": 6}, right=bool)
    write(tmp_path / "5" / "job.json", {"state": "failed", "reason": "it was run again by hand since"})
    runs = read_runs([tmp_path])
    assert [run.state for run in runs] == ["finished", "running", "died", "failed", "waiting", "finished"]
    assert runs[3].reason == "killed by SIGKILL (out of memory?)"
    assert differing_settings(runs) == {"sft_type.rank": "rank"}
    text = markdown(rank(runs))
    assert "| running 5/10 | 2 |" in text
    assert "| waiting | 5 |" in text
    assert "1 died, 1 failed, 2 finished, 1 running, 1 waiting" in text


def test_csv_holds_every_number_in_full(tmp_path: Path) -> None:
    make_run(tmp_path / "0_a", {"sft_type.rank": 4}, right=lambda i: i % 3 == 0)
    make_run(tmp_path / "1_b", {"sft_type.rank": 8}, right=bool)
    best, other = table(csv_text(rank(read_runs([tmp_path]))))
    assert (best["run"], best["mark"], best["sft_type.rank"], best["state"]) == ("1_b", "best", "8", "finished")
    run = read_run(tmp_path / "0_a")
    assert float(other["arg_f1"]) == run.scores["arg_f1"].value == 20 / 60
    assert float(other["arg_f1_low"]) == run.scores["arg_f1"].low
    assert other["tokens"] == "1000"


def test_the_best_value_of_a_column_is_bold(tmp_path: Path) -> None:
    make_run(tmp_path / "0_a", {"sft_type.rank": 4}, right=lambda i: i % 3 == 0, loss=0.5)
    make_run(tmp_path / "1_b", {"sft_type.rank": 8}, right=bool, loss=0.7)
    lines = markdown(rank(read_runs([tmp_path])), "a title").splitlines()
    assert lines[0] == "# a title"
    best, other = (next(line for line in lines if name in line) for name in ("1_b", "0_a"))
    assert "**98.3 [" in best
    assert "**0.5000**" in other


def test_the_command_reads_sweeps_and_runs_and_writes_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "sweep" / "0_a", {"sft_type.rank": 4}, right=bool)
    make_run(tmp_path / "sweep" / "1_b", {"sft_type.rank": 8}, right=bool)
    make_run(tmp_path / "other" / "0_a", {"sft_type.rank": 16}, right=bool)
    files = ["--csv", str(tmp_path / "t.csv"), "--markdown", str(tmp_path / "out" / "t.md")]
    assert main([str(tmp_path / "sweep"), str(tmp_path / "other" / "0_a"), *files]) == 0
    assert {row["run"] for row in table((tmp_path / "t.csv").read_text())} == {"sweep/0_a", "1_b", "other/0_a"}
    assert (tmp_path / "out" / "t.md").read_text().startswith("# sweep 0_a")
    assert "rank" in capsys.readouterr().out
    assert main([str(tmp_path / "nowhere")]) == 1
    assert "no such folder" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match="no run there"):
        read_runs([tmp_path / "empty"])


def test_jobs_of_a_sweep_are_read_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number in (10, 9, 1):
        make_run(tmp_path / f"{number}_rank-{number}")
    assert [run.name for run in read_runs([tmp_path])] == ["1_rank-1", "9_rank-9", "10_rank-10"]


def test_a_sweep_without_any_job_has_no_table(tmp_path: Path) -> None:
    write_sweep_tables(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_page_needs_no_network_and_shows_every_run_in_every_chart(tmp_path: Path) -> None:
    for i, size in enumerate((60, 120, 240, 480)):
        for j, rank_ in enumerate((4, 64)):
            folder = tmp_path / "sweep" / f"{2 * i + j}_rank-{rank_}_sample-{size}"
            changes = {"sft_type.rank": rank_, "dataset.max_samples": size, "model.name": "<b>&"}
            make_run(folder, changes, right=lambda k, n=size: k % 60 < 60 - 200 / n**0.5, loss=2 / (i + 1))
            write(folder / "data" / "manifest.json", {"train": {"conversations": size}})
            write(folder / "job.json", {"state": "finished", "seconds": 60.0 + size + rank_})
            lines = [{"step": step, "train/loss": 2 - step / 10, "eval/loss": "nan"} for step in range(1, 5)]
            write(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    make_run(tmp_path / "sweep" / "8_<b>&\"'", {"sft_type.rank": 8}, state="failed")
    assert main([str(tmp_path / "sweep"), "--html", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|src=|@import|url\(", page)
    assert "<b>" not in page
    for heading in (
        *("Training loss", "arg_f1 against max_samples", "arg_f1 against rank"),
        *("arg_f1 against sample size", "arg_f1 against minutes of the whole run"),
    ):
        assert f"<h3>{heading}</h3>" in page
    assert "Held-out loss</h3>" not in page, "it was never measured"
    assert page.count('data-run="7_rank-64_sample-480"') >= 10
    assert "nan" not in re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL).replace("tenant", "")
    drawings = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(drawings) == page.count("<h3>")
    for svg in drawings:
        ElementTree.fromstring(svg)


def test_means_are_drawn_only_where_every_value_met_the_same_other_settings(tmp_path: Path) -> None:
    for rank_, rate in ((4, 1e-3), (4, 1e-2), (64, 1e-3)):
        make_run(
            tmp_path / "s" / f"{rank_}_{rate}", {"sft_type.rank": rank_, "training.learning_rate": rate}, right=bool
        )
    assert main([str(tmp_path / "s"), "--html", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("No means: not every value") == 2
    assert page.count('class="line join"') == 2, "one pair differs in the rank alone, one in the rate alone"
    assert 'class="line mean"' not in page
    make_run(tmp_path / "s" / "whole", {"sft_type.rank": 64, "training.learning_rate": 1e-2}, right=bool)
    assert main([str(tmp_path / "s"), "--html", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "No means" not in page
    assert page.count("Thick line: means.") == page.count('class="line mean"') == 2


def test_a_click_on_a_heading_sorts_by_numbers_and_not_by_their_words(tmp_path: Path) -> None:
    for name, seconds in (("0_a", 5400.0), ("1_b", 95.0)):
        make_run(tmp_path / name, {"sft_type.rank": len(name) + int(name[0])}, right=bool)
        write(tmp_path / name / "job.json", {"state": "finished", "seconds": 1.0, "seconds_in_all": seconds})
    assert main([str(tmp_path), "--html", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert '<td class="" data-value="5400.0">90.0 min</td>' in page
    assert '<td class="" data-value="95.0">95 s</td>' in page
    assert re.search(r'data-value="98.3">98.3 <small>\[\d', page)


def test_a_page_is_made_of_whatever_there_is(tmp_path: Path) -> None:
    make_run(tmp_path / "only", state="waiting")
    assert main([str(tmp_path), "--html", str(tmp_path / "page.html")]) == 0
    make_run(tmp_path / "second", {"seed": 1}, right=bool)
    assert main([str(tmp_path), "--html", str(tmp_path / "page.html"), "--sort", "loss"]) == 0


def test_the_fit_finds_the_law_it_was_drawn_from() -> None:
    sizes = [50.0, 100.0, 200.0, 400.0, 800.0]
    fit = fit_sample_curve(sizes, [0.9 - 3 * n**-0.5 for n in sizes])
    assert fit is not None
    assert fit.value(3200) == pytest.approx(0.9 - 3 * 3200**-0.5, abs=1e-6)
    assert fit.residual < 1e-9
    assert fit_sample_curve([10, 20], [0.1, 0.2]) is None
    three = fit_sample_curve([10, 20, 40], [0.1, 0.2, 0.3])
    assert three is not None
    assert three.words == "+10.0 points with each doubling"
    falling = fit_sample_curve(sizes, [0.5, 0.4, 0.3, 0.2, 0.1])
    assert falling is not None
    assert falling.words.startswith("-")


def test_comparing_starts_without_torch_and_transformers() -> None:
    code = (
        "import agentft.compare, sys; sys.exit(' '.join({'torch', 'transformers', 'hydra'} & set(sys.modules)) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("output", ["closed pipe", "full disk"])
def test_a_table_that_nobody_reads_costs_nothing_else(tmp_path: Path, output: str) -> None:
    """As of `| head`: no traceback, exit code 0, and the files are written."""
    make_run(tmp_path / "runs" / "one", right=lambda i: True)
    command = [sys.executable, "-m", "agentft.compare", str(tmp_path / "runs"), "--csv", str(tmp_path / "table.csv")]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") if output == "closed pipe" else Path("/dev/full").open("wb") as out:
        done = subprocess.run(
            command, cwd=REPOSITORY, env=buffered, stdout=out, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "table.csv").read_text()
