"""The complete script as a user runs it, but on a CPU: shards from the command line, the bundled agent, a run that goes
on, and another that begins with its checkpoint.
"""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path

import pytest
from launching import REPOSITORY, environment, python
from trainers.conformance.launch import TIMEOUT_SECONDS

EXAMPLE = REPOSITORY / "examples" / "nemo_pretrain.py"

if importlib.util.find_spec("nemo") is None or importlib.util.find_spec("nemo.collections.llm") is None:
    pytest.skip("NeMo 2 with LLM recipes has an environment of its own", allow_module_level=True)

from transformers import PreTrainedTokenizerFast  # noqa: E402


def run(work: Path, output: str, *options: str, processes: int = 1) -> list[tuple[int, float]]:
    """(step, logged feedback on math) of all decisions of the run so far."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(work / "tokenizer.json"), eos_token="<eos>")
    tokenizer.save_pretrained(work / "tokenizer")
    command = [*python(processes), "-m", "dmagent_loader.testing.on_cpu", str(EXAMPLE), "--cpu"]
    command += ["--shards", str(work / "shards")]
    command += ["--tokenizer", str(work / "tokenizer"), "--hidden-size", "16", "--layers", "1", "--seq-length", "16"]
    command += ["--environment", f"general={work / 'general.jsonl'}", f"math={work / 'math.jsonl'}"]
    command += ["--micro-batch-size", "2", "--global-batch-size", "4", "--samples-per-reweight", "16"]
    command += ["--save-steps", "4", "--output", str(work / output), *options]
    log = work / f"{output}.log"
    with log.open("w") as written:  # into a file: the helpers of distributed checkpointing would hold a pipe open
        done = subprocess.run(command, env=environment(), stdout=written, stderr=written, timeout=TIMEOUT_SECONDS)
    assert done.returncode == 0, log.read_text()[-4000:]
    return decisions(work / output)


def decisions(folder: Path) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = []
    for path in sorted(folder.rglob("events.out.tfevents.*")):
        events = EventAccumulator(str(path)).Reload()
        if "env/math" in events.Tags()["scalars"]:
            assert all(0 < event.value < 1 for event in events.Scalars("mix/target"))
            found += [(event.step, event.value) for event in events.Scalars("env/math")]
    return sorted(found)


def test_the_script_runs_and_goes_on_and_its_model_can_be_continued(work):
    first = run(work, "out", "--max-steps", "8", processes=2)
    assert [step for step, _ in first] == [0, 4, 8]
    whole = run(work, "out", "--max-steps", "12")
    assert [step for step, _ in whole] == [0, 4, 8, 12]
    assert whole[:3] == first
    newest = max((work / "out" / "run" / "checkpoints").glob("*-last"), key=lambda path: path.stat().st_mtime)
    other = run(work, "other", "--max-steps", "4", "--model", str(newest))
    assert [step for step, _ in other] == [0, 4]
    assert other[0][1] == pytest.approx(whole[-1][1], abs=1e-5), "the base model is not the checkpoint's"
