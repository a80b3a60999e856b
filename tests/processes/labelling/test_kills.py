"""`dmagent label` and `filter` are killed, run again, and give what an undisturbed run gives."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

from launching import environment
from shard_fixtures import files_under, write_jsonl

from dmagent_loader.labelling.files import PART_DOCUMENTS

TEXTS = (
    "The goalkeeper saved a penalty in the last minute and the team won the league match",
    "Simmer the onions in butter, add garlic and stock, and season the soup with salt",
    "zzzz qqqq",
)


def start(web: Path, output: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "dmagent_loader", "label", "--domain", f"source/web={web}", "--split"]
    return subprocess.Popen(
        [*command, "--output", str(output), "--no-progress"],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(run: subprocess.Popen[str]) -> str:
    out, errors = run.communicate(timeout=200)
    assert run.returncode == 0, errors
    return out


def kill_when_there_is(part: Path, run: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 100
    while not part.exists():
        assert run.poll() is None, run.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.001)
    run.send_signal(signal.SIGKILL)
    run.communicate()


def contents(output: Path) -> dict[Path, bytes]:
    return {path.relative_to(output): path.read_bytes() for path in files_under(output)}


def test_a_killed_job_continues_after_its_last_part(tmp_path: Path) -> None:
    count = 4 * PART_DOCUMENTS + 100
    web = write_jsonl(tmp_path / "web.jsonl", [{"text": f"{TEXTS[n % 3]} {n}", "id": n} for n in range(count)])
    whole = finished(start(web, tmp_path / "whole"))
    killed = start(web, tmp_path / "killed")
    labels = tmp_path / "killed" / "labels" / "source" / "web"
    kill_when_there_is(labels / "part-000000-000000.jsonl.gz", killed)
    written = {path: path.stat().st_mtime_ns for path in labels.glob("part-*")}
    assert len(written) < 5, "it was done before it was killed"
    again = finished(start(web, tmp_path / "killed"))
    assert again.replace(str(tmp_path / "killed"), str(tmp_path / "whole")) == whole
    assert all(path.stat().st_mtime_ns == changed for path, changed in written.items())
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_a_killed_filter_continues_after_its_last_part(tmp_path: Path) -> None:
    """Of repeats on both sides of the kill, the first is kept, by its exact text and by its shingles."""
    texts = [f"{TEXTS[0]} n{n % 6000} {TEXTS[1]} n{n % 6000}" for n in range(3 * PART_DOCUMENTS)]
    web = write_jsonl(tmp_path / "web.jsonl", [{"text": text, "id": n} for n, text in enumerate(texts)])
    more = write_jsonl(tmp_path / "more.jsonl", [{"text": text} for text in (texts[5], "zzzz " * 30, texts[-1] + " a")])

    def begin(output: Path, *other: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "dmagent_loader", "filter", "--domain", f"source/web={web}", "--no-progress"]
        command += ["--domain", f"source/more={more}", "--near-duplicates", "0.9", "--output", str(output), *other]
        return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    whole = finished(begin(tmp_path / "whole"))
    assert "6,000 of 12,288 kept; dropped: 6,288 exact duplicate" in whole
    killed = begin(tmp_path / "killed")
    parts = tmp_path / "killed" / ".filtering" / "found"
    kill_when_there_is(parts / "part-000000-000000.safetensors", killed)
    written = {path: path.stat().st_mtime_ns for path in parts.glob("part-*")}
    assert len(written) < 3, "it was done before it was killed"
    assert not (tmp_path / "killed" / "source").exists()
    _, errors = begin(tmp_path / "killed", "--min-characters", "9").communicate(timeout=200)
    assert "holds unfinished work with other min_characters: run that command again" in errors
    assert {path: path.stat().st_mtime_ns for path in parts.glob("part-*")} == written
    again = finished(begin(tmp_path / "killed"))
    assert again.replace(str(tmp_path / "killed"), str(tmp_path / "whole")) == whole
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
