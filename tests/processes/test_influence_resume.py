"""A run that measures influence and is killed outright resumes with the same decisions, without measuring again."""

from __future__ import annotations

import io
import json
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
from launching import REPOSITORY, environment, python

from dmagent_loader.shards.writing.tar_writer import TarWriter

PROGRAM = """
import json, os, signal, sys
from pathlib import Path
import torch
from torch import nn
from dmagent_loader import AgentWeightedSampler, Environment, Mixing, load_state, save_state
from dmagent_loader.transforms import packed_tokens

shards, state_path, log_path = json.loads(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
die_after, decided_by = int(sys.argv[4]), json.loads(sys.argv[5])
torch.manual_seed(0)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(256, 16), nn.Linear(16, 256)

    def forward(self, input_ids, attention_mask=None):
        return self.head(self.embedding(input_ids))


model = Model()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
text = lambda words: list(words.encode())
questions = {"keep": [("@", "A"), ("B", "CD"), ("E", "F")], "acquire": [("!", '"'), ("%", "&'"), ("(", ")")]}
questions = Environment.from_pairs(questions, text, progress=False, separator="")
sampler = AgentWeightedSampler(shards, samples_per_reweight=16, transform=packed_tokens, **decided_by)
mixing = Mixing(sampler, questions)
weights = state_path.with_suffix(".pt")
if state_path.exists():
    saved = load_state(state_path)
    mixing.load_state_dict(saved)
    tensors = torch.load(weights, weights_only=True)
    model.load_state_dict(tensors["model"])
    optimizer.load_state_dict(tensors["optimizer"])
mixing.begin()
measured = []


def measure(environment, rows, settings):
    measured.append(mixing.consumed)
    return environment.influence(model, rows, optimizer=optimizer, **settings)


def decide():
    if mixing.due():
        report = mixing.reweight(lambda environment: environment.evaluate(model), measure=measure)
        line = {"consumed": mixing.consumed, "mix": report.decision.proposed, "measured": measured,
                "seconds": report.full.get("dmagent/influence_seconds"), "pid": os.getpid()}
        with log_path.open("a") as file:
            file.write(json.dumps(line) + "\\n")


decide()
batch = []
for sample in sampler:
    batch.append(sample["input_ids"])
    if len(batch) < 4:
        continue
    rows = torch.stack(batch)
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten()).backward()
    optimizer.step()
    batch = []
    mixing.consumed += 4
    decide()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, weights)
    save_state(state_path, mixing.state_dict())
    if mixing.consumed == die_after:
        os.kill(os.getpid(), signal.SIGKILL)
    if mixing.consumed >= 96:
        break
"""


def train(folder: Path, name: str, decided_by: dict[str, str], die_after: int = 0) -> subprocess.CompletedProcess[str]:
    shards = json.dumps(json.loads((folder / "shards.json").read_text()))
    command = [*python(), str(folder / "program.py"), shards, str(folder / f"{name}.json"), str(folder / f"{name}.log")]
    return subprocess.run(
        [*command, str(die_after), json.dumps(decided_by)],
        env=environment(),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=200,
    )


def decisions(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.log").read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Domains whose bytes count upwards from different letters: some lead to the answers, others do not."""
    folder = tmp_path_factory.mktemp("resume")
    shards = {}
    for name, first in (("source/letters", 60), ("source/noise", 0), ("target/signs", 30), ("target/noise", 1)):
        home = folder / name
        home.mkdir(parents=True)
        rng = np.random.default_rng(first)
        for number in range(120):
            if number % 40 == 0:
                writer = TarWriter(home / f"{home.name}-{number // 40:06d}.tar")
            start = rng.integers(first, first + 8)
            row = np.arange(start, start + 24) if first > 1 else rng.integers(100, 256, 24)
            row = np.append(row, rng.integers(100, 256, 2))  # no row is a copy of another
            data = io.BytesIO()
            np.save(data, row.astype(np.uint16))
            writer.add(f"{number:09d}", {"input_ids.npy": data.getvalue()})
            if number % 40 == 39:
                writer.close()
        shards[name] = sorted(str(path) for path in home.glob("*.tar"))
    (folder / "shards.json").write_text(json.dumps(shards))
    (folder / "program.py").write_text(PROGRAM)
    return folder


POLICIES = {
    "influence": {"policy": "influence"},
    "agent-and-influence": {"agent": "dmagent-rl", "topics": "influence"},
    "plus": {"agent": "dmagent-plus"},
}


@pytest.mark.parametrize("policy", POLICIES)
def test_a_killed_run_decides_as_if_it_had_not_been_killed(folder: Path, policy: str) -> None:
    decided_by = POLICIES[policy]
    whole = train(folder, f"{policy}-whole", decided_by)
    assert whole.returncode == 0, whole.stderr[-2000:]
    assert train(folder, f"{policy}-killed", decided_by, die_after=36).returncode == -signal.SIGKILL
    resumed = train(folder, f"{policy}-killed", decided_by)
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    one, two = decisions(folder, f"{policy}-whole"), decisions(folder, f"{policy}-killed")
    assert [line["consumed"] for line in one] == list(range(0, 97, 16))
    assert [(line["consumed"], line["mix"]) for line in one] == [(line["consumed"], line["mix"]) for line in two]
    assert len({line["pid"] for line in two}) == 2
    assert one[-1]["measured"] == [0]
    assert two[-1]["measured"] == []  # the second process measured nothing: the state told it
    assert one[0]["seconds"] > 0
    first = one[0]["mix"]
    assert first["source/letters"] > 2 * first["source/noise"]
    assert first["target/signs"] > 2 * first["target/noise"]
    # The agents decide on the target's share again at each step, influence once for the run.
    shares = {round(line["mix"]["target/signs"] + line["mix"]["target/noise"], 9) for line in one}
    assert (len(shares) > 1) == (policy != "influence")
