"""What the fault experiments share: the forking process, the undisturbed runs, and a ledger of what was tried."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.harness import Result, Zygote, log_of, result_of

LEDGER = "--faults-ledger"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(LEDGER, metavar="FILE", help="append one JSON line for each trial, for tests/faults/table.py")


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    process = Zygote()
    yield process
    process.close()


@pytest.fixture(scope="session")
def golden(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Result]:
    """Return the result of an undisturbed run with the given settings; each is computed once."""
    known: dict[tuple[str, ...], Result] = {}

    def make(*settings: str) -> Result:
        if settings not in known:
            run = tmp_path_factory.mktemp("golden") / "run"
            assert zygote.run(run, settings=list(settings)) == 0, log_of(run).read_text()[-3000:]
            known[settings] = result_of(run)
        return known[settings]

    return make


@pytest.fixture
def ledger(request: pytest.FixtureRequest) -> Iterator[Callable[..., None]]:
    """Return `note(row, **figures)`; the trial is written down as passed or not when the test ends."""
    notes: list[dict] = []
    began = time.perf_counter()

    def note(row: str, **figures: object) -> None:
        notes.append({"row": row, **figures})

    yield note
    file = request.config.getoption(LEDGER)
    if file:
        passed = bool(getattr(request.node, "passed", False))
        seconds = (time.perf_counter() - began) / max(len(notes), 1)
        with Path(file).open("a", encoding="utf-8") as out:
            for each in notes or [{"row": request.node.name}]:
                line = {"test": request.node.name, "passed": passed, "seconds": round(seconds, 3), **each}
                out.write(json.dumps(line) + "\n")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    outcome = yield
    report = outcome.get_result()
    if report.when == "call":
        item.passed = report.passed  # type: ignore[attr-defined]
