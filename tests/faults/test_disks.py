"""Disks that are full, read-only, failing or rotten: the last whole checkpoint stays, loudly (rows F07 to F10, F20)."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from agentft.errors import CheckpointError
from agentft.training.checkpoint import find_damage, list_checkpoints, newest_whole
from tests.faults.harness import assert_equal, finish, log_of, seeds, whole_checkpoints


def _stopped_at(zygote, run: Path, step: int) -> None:
    """A run that was killed after the checkpoint of `step`."""
    assert zygote.run(run, sabotage=[f"die_at_step:{step + 1}"]) == -signal.SIGKILL
    assert max(whole_checkpoints(run)) == step


def _digests(run: Path) -> dict[str, str]:
    return {
        str(file.relative_to(run)): hashlib.sha256(file.read_bytes()).hexdigest()
        for path in list_checkpoints(run / "checkpoints")
        for file in path.iterdir()
    }


@contextmanager
def _mounted(folder: Path, *options: str) -> Iterator[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["mount", *options, str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"mounting needs a privilege that this process lacks: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def _tmpfs(folder: Path, size: str):
    return _mounted(folder, "-t", "tmpfs", "-o", f"size={size}", "tmpfs")


@pytest.mark.parametrize("seed", seeds(sample=1, full=12))
def test_f07_a_full_disk_costs_the_run_and_no_checkpoint(zygote, golden, ledger, tmp_path, seed):
    """A file system of its own, filled up to a few random kilobytes before a resume."""
    draw = random.Random(f"F07-{seed}")
    with _tmpfs(tmp_path / "small", "8m") as disk:
        run = disk / "run"
        _stopped_at(zygote, run, 6)
        before = _digests(run)
        pages = [-(-file.stat().st_size // 4096) for file in list_checkpoints(run / "checkpoints")[-1].iterdir()]
        room = 4096 * (draw.randrange(0, sum(pages)) if seed else sum(pages) // 2)
        filler = disk / "filler"
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        filler.write_bytes(b"x" * max(0, free - room))
        printed = tmp_path / "printed"  # what a terminal shows is not on the full disk
        code = zygote.run(run, log=str(printed))
        said = printed.read_text() + (run / "train.log").read_text()
        assert code == 1, said[-3000:]
        assert re.search(r"(It needs [\d,]+ bytes|[\d,]+ bytes are free|No space left on device)", said)
        assert before.items() <= _digests(run).items(), "a checkpoint that was whole is gone or changed"
        assert whole_checkpoints(run)
        filler.unlink()
        ledger("F07", seed=seed, room_bytes=room, loadable=1)
        assert_equal(finish(zygote, run), golden())


def test_f07_a_limit_on_file_sizes_names_the_bytes(zygote, golden, ledger, tmp_path):
    """Without a privilege: the system refuses files beyond a size, as a quota does."""
    run = tmp_path / "run"
    _stopped_at(zygote, run, 6)
    before = _digests(run)
    largest = max(file.stat().st_size for file in list_checkpoints(run / "checkpoints")[-1].iterdir())
    assert zygote.run(run, sabotage=[f"limit_file_size:{largest - 100}"]) == 1
    assert re.search(r"step-000009: cannot write the checkpoint: .*It needs [\d,]+ bytes", log_of(run).read_text())
    assert before.items() <= _digests(run).items()
    assert not list((run / "checkpoints").glob(".step-*"))
    ledger("F07", loadable=1)
    assert_equal(finish(zygote, run), golden())


@pytest.mark.parametrize("seed", seeds(sample=1, full=28))
def test_f08_an_error_of_the_system_at_any_call_of_a_save(zygote, golden, ledger, tmp_path, seed):
    """EIO, EACCES, EROFS, EDQUOT before each sync, file, rename and deletion of the third save in turn."""
    names = ["EIO", "EACCES", "EROFS", "EDQUOT"]
    call, name = 28 + seed // 2 if seed else 34, names[seed % 4]
    run = tmp_path / "run"
    code = zygote.run(run, sabotage=[f"fail_in_save:{call}:{name}"])
    said = log_of(run).read_text()
    if code == 0:  # a deletion failed, of an old checkpoint or of what is not there: that costs nothing
        assert f"[Errno {getattr(errno, name)}]" not in said or "cannot be deleted" in said
    else:
        assert code == 1, said[-3000:]
        assert os.strerror(getattr(errno, name)) in said
        assert "earlier checkpoints are intact" in said
        assert whole_checkpoints(run)
    ledger("F08", seed=seed, error=name, call=call, loadable=int(bool(whole_checkpoints(run))))
    assert_equal(finish(zygote, run), golden())


def test_f08_a_read_only_folder_is_refused_before_anything_is_loaded(zygote, ledger, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    with _mounted(tmp_path / "run", "--bind", str(source)):
        subprocess.run(["mount", "-o", "remount,ro,bind", str(tmp_path / "run")], check=True)
        assert zygote.run(tmp_path / "run") == 1
    assert (
        "nothing can be written there: Read-only file system; choose another run_dir"
        in log_of(tmp_path / "run").read_text()
    )
    ledger("F08", error="EROFS")


@pytest.fixture(scope="module")
def broken_run(zygote, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("rot") / "run"
    _stopped_at(zygote, run, 9)
    return run


def _flip(file: Path, draw: random.Random) -> None:
    content = bytearray(file.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(bytes(content))


def _damage(path: Path, kind: str, draw: random.Random) -> str:
    files = sorted(path.iterdir())
    file = files[draw.randrange(len(files))]
    match kind:
        case "bit":
            _flip(file, draw)
        case "truncate":
            os.truncate(file, draw.randrange(file.stat().st_size))
        case "zero tail":
            content = file.read_bytes()
            cut = draw.randrange(1, min(len(content), 4096))
            zeroed = content[:-cut] + bytes(cut)
            file.write_bytes(zeroed if zeroed != content else content[:-1] + bytes([content[-1] ^ 255]))
        case "swap":
            other = files[(files.index(file) + 1) % len(files)]
            left, right = file.read_bytes(), other.read_bytes()
            file.write_bytes(right)
            other.write_bytes(left)
        case "delete":
            file.unlink()
        case "append":
            with file.open("ab") as out:
                out.write(b"\0")
    return file.name


@pytest.mark.parametrize("seed", seeds(sample=1, full=10))
def test_f09_every_damage_is_found(broken_run, ledger, tmp_path, seed):
    """20 flipped bits and 5 each of other damage for each seed; the checkpoint before is taken, with a warning."""
    draw = random.Random(f"F09-{seed}")
    kinds = ["bit"] * 20 + [kind for kind in ("truncate", "zero tail", "swap", "delete", "append") for _ in range(5)]
    silent = []
    for kind in kinds:
        root = tmp_path / "checkpoints"
        shutil.copytree(broken_run / "checkpoints", root)
        newest = list_checkpoints(root)[-1]
        file = _damage(newest, kind, draw)
        if find_damage(newest) is None or newest_whole(root) == newest:
            silent.append((kind, file))
        assert newest_whole(root) == list_checkpoints(root)[-2]
        with pytest.raises(CheckpointError, match=r"is damaged \(.*training.fallback=true resumes"):
            newest_whole(root, fallback=False)
        shutil.rmtree(root)
    ledger("F09", seed=seed, injected=len(kinds), detected=len(kinds) - len(silent), silent=len(silent))
    assert not silent


@pytest.mark.parametrize("seed", seeds(sample=1, full=4))
def test_f09_a_damaged_newest_falls_back_by_one_and_ends_the_same(zygote, golden, ledger, tmp_path, seed):
    draw = random.Random(f"F09-run-{seed}")
    run = tmp_path / "run"
    _stopped_at(zygote, run, 9)
    _damage(list_checkpoints(run / "checkpoints")[-1], "bit", draw)
    if seed == 0:
        assert zygote.run(run, settings=["training.fallback=false"]) == 1
        assert "training.fallback=true resumes from the checkpoint before it" in log_of(run).read_text()
    ledger("F09", seed=seed, injected=1, detected=1, silent=0)
    assert_equal(finish(zygote, run), golden())
    said = log_of(run).read_text()
    assert "is damaged" in said
    assert f"resuming from {run}/checkpoints/step-000006" in said


def test_f10_with_every_checkpoint_damaged_nothing_starts_afresh(zygote, ledger, tmp_path):
    run = tmp_path / "run"
    _stopped_at(zygote, run, 6)
    paths = list_checkpoints(run / "checkpoints")
    for path in paths:
        _flip(path / "state.json", random.Random(0))
    lines = (run / "metrics.jsonl").read_text()
    assert zygote.run(run) == 1
    assert (
        f"all {len(paths)} checkpoints are damaged; to start afresh, choose another run folder"
        in log_of(run).read_text()
    )
    assert (run / "metrics.jsonl").read_text() == lines, "nothing was trained"
    ledger("F10", injected=len(paths), detected=len(paths), silent=0)


@pytest.mark.parametrize("seed", seeds(sample=0, full=4))
def test_f20_a_clock_that_jumps_and_shuffled_file_times_choose_no_other_checkpoint(
    zygote, golden, ledger, tmp_path, seed
):
    draw = random.Random(f"F20-{seed}")
    run = tmp_path / "run"
    assert zygote.run(run, sabotage=["die_at_step:11", "clock_set_back:0"]) == -signal.SIGKILL
    for file in sorted((run / "checkpoints").rglob("*")):
        os.utime(file, (draw.uniform(0, 2e9), draw.uniform(0, 2e9)))
    ledger("F20", seed=seed)
    assert_equal(finish(zygote, run, sabotage=["clock_set_back:86400000"]), golden())
    # Step 10 was the best, so it was saved beside step 9: by name or by time another would come first.
    assert f"resuming from {run}/checkpoints/step-000010" in log_of(run).read_text()
