"""Influence in domain spaces of a user's own: 7 merged and 200 split or clustered domains, without names or topics.

    python -m benchmarks.influence.spaces --data DATA --output benchmarks/results/influence_spaces.jsonl

In each space, the natural mix, measured influence, training clones and permuted scores are compared from the same base
model. A finished run is a line of the output; runs that are there are not run again. `--print` only shows the tables.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from benchmarks.comparison.policies import shuffled
from benchmarks.influence.environments import TOLD, Setting, base_weights, one_thread, setting
from benchmarks.influence.probes import CLONE_ROWS, mean_of_clones, trained_on_each
from benchmarks.influence.runs import STREAMS, run
from benchmarks.influence.table import REPEATS, ROWS
from benchmarks.records import add, lines
from dmagent_loader._files import write_atomically
from dmagent_loader.mixture.domains import FIELDS, NUM_CANONICAL, NUM_TOPICS, SOURCE, TARGET, DomainSpace
from dmagent_loader.mixture.history import History
from dmagent_loader.mixture.influence import Influence
from dmagent_loader.mixture.simplex import FloatArray, IntArray, effective_domains
from dmagent_loader.policies import INFLUENCE
from dmagent_loader.policies.influence import InfluencePolicy
from dmagent_loader.training.data.corpus import Corpus
from dmagent_loader.training.data.spaces import Documents, Space, SpaceRows, merged
from dmagent_loader.training.proxies.language_model import ProxyModel
from dmagent_loader.training.tasks.library import proxy_config
from dmagent_loader.training.tasks.simulator import PROBE_STREAMS

SIZE = "0.16M"
NATURAL, MEASURED, ONCE, CLONES, PERMUTED = "natural 30%", "influence", "influence, 32 rows", "clones", "permuted"
ALL_ROWS = 52 * ROWS
"""Rows of all domains in a measurement at least, as the callbacks read them."""


GROUPS = {SOURCE: 5, TARGET: 2}
CLUSTERS = {SOURCE: 130, TARGET: 70}
"""Of documents, in proportion to neither text nor topics; together 200."""
PARTS = 4
"""Random parts of each of the 50 or so domains with rows."""
KINDS = (
    ("Computers_and_Electronics", "Internet_and_Telecom", "Science", "Health"),
    ("Business_and_Industrial", "Finance", "Jobs_and_Education", "Law_and_Government", "News", "Real_Estate"),
    ("Adult", "Online_Communities", "People_and_Society", "Sensitive_Subjects"),
    ("Arts_and_Entertainment", "Books_and_Literature", "Games", "Hobbies_and_Leisure", "Sports"),
)
"""Source topics merged by kind; all others are the fifth group."""


class Compared:
    """The mixes that are compared in one space, environment and stream.

    Args:
        space: The space.
        found: The environment.
        weights: Of the base model.
        work: For probes.
        stream: Number of the repetition.
    """

    def __init__(self, space: Space, found: Setting, weights: dict[str, Tensor], work: Path, stream: int) -> None:
        self._space, self._found, self._weights, self._stream = space, found, weights, stream
        self._folder = work / "probes-spaces"

    def mixes(self) -> dict[str, Callable[[], FloatArray]]:
        """Name -> mix, (D,)."""
        return {
            NATURAL: lambda: self._space.natural(0.3),
            MEASURED: lambda: self._mix(self.measured),
            ONCE: lambda: self._mix(lambda repeat: self.measured(repeat, ROWS), max_measurements=1),
            CLONES: lambda: self._mix(lambda _: self._clones(), max_measurements=1),
            PERMUTED: lambda: self._mix(lambda repeat: shuffled(self.measured(repeat), self._stream)),
        }

    @property
    def key(self) -> dict[str, Any]:
        """Names of the environment and the space, and the stream."""
        return {"environment": self._found.name, "space": self._space.name, "stream": self._stream}

    def run(self, mix: FloatArray) -> dict[str, Any]:
        """Trains under a mix; the fields of a line of the output."""
        rows = SpaceRows(self._space, STREAMS + self._stream)
        result = run(self._found, self._weights, mix, size=SIZE, stream=self._stream, rows=rows)
        return {
            "objective": result.objective,
            "gains": result.gains.tolist(),
            "domains": len(mix),
            "effective_domains": round(float(effective_domains(mix)), 2),
        }

    def measured(self, repeat: int, rows: int | None = None) -> Influence:
        """The measurement that follows `repeat` others, on so many rows of each domain; None: as the callbacks do."""
        count = max(ROWS, ALL_ROWS // len(self._space.names)) if rows is None else rows
        stream = self._stream + REPEATS * repeat

        def measure() -> Any:
            listed = self._rows(count, stream)
            model = ProxyModel(proxy_config(SIZE), self._weights)
            return self._found.environment.influence(model, {name: list(r) for name, r in listed.items()}).to_json()

        return Influence.from_json(self._kept(f"{stream}-{count}", measure))

    def _clones(self) -> Influence:
        gains = []
        for stream in (100 + 2 * self._stream, 101 + 2 * self._stream):

            def train(stream: int = stream) -> Any:
                some = self._rows(CLONE_ROWS, stream).values()
                rows = [np.resize(listed, (CLONE_ROWS, *listed.shape[1:])) for listed in some]  # small ones repeat
                return trained_on_each(self._found, self._weights, rows, size=SIZE)

            gains.append(np.array(self._kept(f"{stream}-clone", train)))
        return mean_of_clones(self._found, list(self._space.names), gains[0], gains[1])

    def _mix(self, measure: Callable[[int], Influence], **settings: Any) -> FloatArray:
        """The mix of `policy="influence"` in this space, after as many measurements as it asks for."""
        policy = InfluencePolicy(self._space.domain_space, self._space.natural(), **settings)
        repeat = 0
        while INFLUENCE in policy.needed(0):
            policy.inform(INFLUENCE, measure(repeat))
            repeat += 1
        fields, domains = self._found.fields, self._space.names
        feedback = np.zeros((1, len(fields)))
        start = self._space.natural()[None]
        return policy.propose(History(domains=domains, fields=fields, mixes=start, feedback=feedback))

    def _rows(self, most: int, stream: int) -> dict[str, Any]:
        number = PROBE_STREAMS + stream
        return {name: self._space.rows(domain, most, number) for domain, name in enumerate(self._space.names)}

    def _kept(self, label: str, make: Callable[[], Any]) -> Any:
        path = self._folder / f"{self._found.name}-{self._space.name}-{label}.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(make()).encode())
        return json.loads(path.read_text())


def make(arguments: argparse.Namespace) -> None:
    """Runs what is missing from the output."""
    one_thread()
    made: dict[str, dict[str, Space]] = {}
    for stream in arguments.streams:
        for pair in TOLD:
            if arguments.only and "+".join(pair) not in arguments.only:
                continue
            found = setting(*pair, arguments.data, arguments.work)
            weights = base_weights(found.corpus, arguments.work, size=SIZE)
            if found.corpus.fingerprint not in made:
                made[found.corpus.fingerprint] = spaces(found.corpus, arguments.work)
            for name, space in made[found.corpus.fingerprint].items():
                if not arguments.spaces or name in arguments.spaces:
                    compared = Compared(space, found, weights, arguments.work, stream)
                    record(compared, arguments.output, arguments.policies or compared.mixes())


def record(compared: Compared, output: Path, names: Iterable[str]) -> None:
    """Runs the named mixes that are not in the output yet, and adds them there.

    Runs of one stream differ in their mix only: where evidence is lacking, a policy's run is that of the natural mix.
    """
    mixes = compared.mixes()
    for name in names:
        here = [line for line in lines(output) if all(line[part] == value for part, value in compared.key.items())]
        if name not in mixes or name in {line["policy"] for line in here}:
            continue
        mix = mixes[name]()
        rounded = [round(weight, 5) for weight in mix.tolist()]
        same = next((line for line in here if line["mix"] == rounded), None)
        line = {**(same or compared.run(mix)), **compared.key, "policy": name, "mix": rounded}
        add(output, line)
        print(f"{', '.join(map(str, compared.key.values()))}, {name}: {line['objective']:.2f}", flush=True)


def table(path: Path) -> str:
    """Objective of each mix by environment and space, and the part of the clones' gain that influence reaches."""
    cells: dict[tuple[str, str, str], dict[int, float]] = {}
    for line in lines(path):
        cells.setdefault((line["environment"], line["space"], line["policy"]), {})[line["stream"]] = line["objective"]
    names = (NATURAL, MEASURED, CLONES, ONCE, PERMUTED)
    rows = [f"| environment | space | {' | '.join(names)} | gain / clones' gain |", "|---|---|" + "---:|" * 6]
    for environment, space in sorted({(environment, space) for environment, space, _ in cells}):
        found = [cells.get((environment, space, name), {}) for name in names]
        streams = sorted(set.intersection(*(set(values) for values in found[:3])))
        if not streams:
            continue
        natural, measured, clones = (np.array([values[s] for s in streams]) for values in found[:3])
        gain = float(np.mean(clones - natural))
        part = f"{np.mean(measured - natural) / gain:.2f}" if gain > 0.1 else ""
        rows.append(f"| {environment} | {space} | {' | '.join(map(_cell, found))} | {part} |")
    return "\n".join(rows)


def _cell(by_stream: dict[int, float]) -> str:
    values = list(by_stream.values())
    error = f" ± {np.std(values, ddof=1) / len(values) ** 0.5:.2f}" if len(values) > 1 else ""
    return f"{np.mean(values):.2f}{error} ({len(values)})" if values else ""


def spaces(corpus: Corpus, work: Path) -> dict[str, Space]:
    """The spaces that are compared, by name; what takes long is kept in `work`."""
    rng = np.random.default_rng(7)
    arbitrary, kinds = np.zeros(NUM_CANONICAL, dtype=np.int64), np.zeros(NUM_CANONICAL, dtype=np.int64)
    by_kind = {f"{SOURCE}/{topic}": number for number, topics in enumerate(KINDS) for topic in topics}
    for number, name in enumerate(DomainSpace.canonical().names):
        kinds[number] = by_kind.get(name, len(KINDS))
    first = 0
    for position, field in enumerate(FIELDS):
        part = slice(position * NUM_TOPICS, (position + 1) * NUM_TOPICS)
        arbitrary[part] = first + rng.permutation(NUM_TOPICS) % GROUPS[field]
        if field == TARGET:
            kinds[part] = arbitrary[part]
        first += GROUPS[field]
    documents = Documents.of(corpus)
    clusters = _kept(work / f"clusters-{corpus.fingerprint[:8]}.npy", lambda: documents.clusters(CLUSTERS))
    return {
        "52": merged("52", corpus, np.arange(NUM_CANONICAL)),
        "7 arbitrary": merged("7 arbitrary", corpus, arbitrary),
        "7 kinds": merged("7 kinds", corpus, kinds),
        "200 clusters": documents.space("200 clusters", clusters),
        "200 parts": documents.space("200 parts", documents.parts(PARTS)),
    }


def _kept(path: Path, make: Callable[[], IntArray]) -> IntArray:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, make())
    return np.asarray(np.load(path), dtype=np.int64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--work", type=Path, default=Path("build/influence"), help="for corpora, base models, probes")
    parser.add_argument("--output", type=Path, default=Path("build/influence/spaces.jsonl"))
    parser.add_argument("--only", nargs="*", metavar="KEEP+ACQUIRE", help="these environments alone")
    parser.add_argument("--spaces", nargs="*", metavar="NAME", help="these spaces alone")
    parser.add_argument("--policies", nargs="*", metavar="NAME", help="these columns alone")
    parser.add_argument("--streams", nargs="*", type=int, default=[0, 1])
    parser.add_argument("--print", action="store_true", help="show the table of what is there, run nothing")
    arguments = parser.parse_args()
    if not arguments.print:
        if arguments.data is None:
            parser.error("--data is required unless --print is given")
        make(arguments)
    print(table(arguments.output))


if __name__ == "__main__":
    main()
