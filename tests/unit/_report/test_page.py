"""The page about a run: complete, self-contained, and readable whatever the run."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from dmagent_loader._loading.config import LoaderSettings
from dmagent_loader._report.history import RunHistory, read_history
from dmagent_loader._report.page import LISTED, RunReport, write_report
from dmagent_loader._run.decisions import Decider, DecisionConfig, Measurement
from dmagent_loader._run.segments import SegmentWriter
from dmagent_loader._run.settings import RunSettings
from dmagent_loader._run.state import write_state
from dmagent_loader.mixture.domains import Domain, DomainSpace
from dmagent_loader.mixture.influence import Influence, Score
from dmagent_loader.mixture.ledger import LedgerEntry
from dmagent_loader.mixture.plan import Plan
from dmagent_loader.policies import GuardConfig, InfluencePolicy, StaticPolicy
from dmagent_loader.policies.base import Policy

pytest.importorskip("matplotlib")

NAMES = ("source/web", "source/books", "target/math", "target/code")


def history(
    names: tuple[str, ...] = NAMES,
    *,
    decisions: int = 3,
    policy: Policy | None = None,
    consumed: int | None = None,
    rules: str = "repeat",
    last_sample: int | None = None,
    samples_per_step: int | None = None,
) -> RunHistory:
    """A run with a decision at every 100 samples, whose mix changes each time."""
    space = DomainSpace(tuple(Domain(name=name, field=name.split("/")[0]) for name in names))
    rows = 50 + 10 * np.arange(len(names))
    plan = Plan(space, [np.array([count]) for count in rows], seed=0, exhausted=rules)
    mix = plan.natural_mix
    plan.append(LedgerEntry(start=0, mix=tuple(mix.tolist()), decided_by="initial", decided_at=0))
    policy = policy or StaticPolicy(mix)
    decider = Decider.configured(DecisionConfig(), policy, plan, mix)
    for number in range(decisions):
        feedback = {"general": -2.0 - number / 10, "math": -3.0 + number / 10}
        decider.measurements.append(Measurement(100 * number, feedback))
        mix = np.roll(mix, 1)
        plan.append(
            LedgerEntry(
                start=100 * number,
                mix=tuple(mix.tolist()),
                decided_by=policy.name,
                decided_at=100 * number,
                feedback=feedback,
                accepted=number != 1,
                note="" if number != 1 else "policy 'static' failed at step 2: it returned <nothing>",
            )
        )
    settings = RunSettings(
        seed=0,
        domains=names,
        domain_fields=tuple(domain.field for domain in space.domains),
        exhausted=plan.rules,
        shuffle_window=64,
        shuffle_shards=4,
        packing=None,
        fingerprint="ab" * 32,
        samples_per_reweight=100,
        policy=policy.name,
        guard=GuardConfig(),
        shadow=False,
        history_mix="achieved",
        on_bad_row="raise",
        start_state="0123456789abcdef",
        own_shards=False,
        world_size=1,
        loader=LoaderSettings(batch_size=4, samples_per_fetch=4),
    )
    segments = {**SegmentWriter(plan, None).to_json(), "first_fingerprint": settings.fingerprint}
    trained = 100 * max(1, decisions) if consumed is None else consumed
    state = write_state(settings, decider, trained, segments, {"counts": {}, "replaced": []})
    return read_history(state, name="my run", last_sample=last_sample, samples_per_step=samples_per_step)


def report(**settings: Any) -> RunReport:
    return write_report(history(**settings), source="runs/my-run/state.json")


class _Reader(HTMLParser):
    """The text of each table row, the headings, and the tags that were not closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.headings: list[str] = []
        self._open: list[str] = []
        self.feed(page)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img"):
            self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] in ("td", "th"):
            self.rows[-1][-1] += data
        elif self._open and self._open[-1] == "h2":
            self.headings.append(data)

    def row(self, name: str) -> list[str]:
        return next(row for row in self.rows if row and row[0] == name)


def test_a_page_stands_alone():
    page = report().page
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) == 4  # two mixes, two feedbacks
    assert all(source.startswith("data:image/png") for source in sources)
    for foreign in ("<script", "<link", "@import", "url(", "http"):
        assert foreign not in page


def test_a_run_that_its_data_ended_is_over_whatever_the_trainer_has_planned():
    page = report(rules="stop", consumed=200, decisions=2, last_sample=600, samples_per_step=100).page
    assert "The run has ended:" in page
    assert "due now" not in page
    assert "The trainer stops" not in page


def test_a_page_has_all_parts_of_a_run():
    written = report(last_sample=600)
    read = _Reader(written.page)
    assert read.headings == [
        "Now and next",
        "The mix and the feedback over the run",
        "Domains",
        "Decisions",
        "Settings",
    ]
    assert "300 samples trained on, from 4 domains in 2 fields: source (2), target (2)." in written.page
    assert "3 decisions, of which 1 left the previous mix in force. The next decision is due now." in written.page
    assert "Feedback math: -2.800 nats per answer token (+0.200 since the base model)" in written.page
    assert "The trainer stops after 600 samples (300 from now), by its number of steps." in written.page
    web = read.row("source/web")
    assert web[1] == "50"
    assert web[-1] == "repeats"
    assert float(web[-2]) > float(web[5])  # more passes at the end than now
    assert read.row("state")[1] == "runs/my-run/state.json"
    assert written.picture is not None
    assert written.picture.startswith(b"\x89PNG")
    assert written.lines[0] in written.page


def test_names_and_notes_are_escaped():
    page = report(names=("source/<b>", "target/x&y")).page
    assert "source/&lt;b&gt;" in page
    assert "target/x&amp;y" in page
    assert "it returned &lt;nothing&gt;" in page
    assert "<b>" not in page
    assert "<nothing>" not in page


def test_the_end_of_the_data_is_forecast():
    written = report(rules="stop", decisions=1, consumed=100)
    assert re.search(r"the data last for \d+ samples \(\d+ from now\): then .* used up\.", written.page)
    assert re.search(r"Next to run out under the present mix: \S+ after \d+ samples", written.page)


def test_a_run_that_has_ended_says_so():
    plan = history(rules="stop", decisions=1, consumed=100).plan
    written = report(rules="stop", decisions=1, consumed=plan.end)
    assert "The run has ended: " in written.page
    assert "passes\nat the end" not in written.page
    assert "is due" not in written.page


def test_a_run_that_will_fail_says_so():
    assert "used up, and the rule is &#x27;error&#x27;" in report(rules="error", decisions=1, consumed=100).page


def test_a_run_without_decisions_has_a_report():
    written = report(decisions=0)
    assert "There is no feedback yet." in written.page
    assert "0 decisions" in written.page
    assert len(re.findall("<img", written.page)) == 2
    assert [row[-1] for row in _Reader(written.page).rows].count("the mix at the start") == 1


def test_a_run_before_its_first_sample_has_a_report():
    written = report(decisions=1, consumed=0)
    assert written.picture is None
    assert "nothing to draw" in written.page
    assert _Reader(written.page).row("source/web")[2:4] == ["0", "–"]


def test_measured_influence_is_shown_as_the_policy_compares_it():
    space = DomainSpace.from_names(NAMES)
    policy = InfluencePolicy(space, np.full(4, 0.25))
    values = dict(zip(NAMES, (0.001, 0.002, 0.003, 0.004), strict=True))
    scores = {"math": {name: Score(value, 0.0005) for name, value in values.items()}}
    policy.needed(0)
    policy.inform("influence", Influence(scores=scores, way="gradient", rows=dict.fromkeys(NAMES, 8)))
    written = report(policy=policy)
    read = _Reader(written.page)
    assert "Measured influence" in read.headings
    spread = float(np.std(list(values.values())))
    begin = read.rows.index(["domain", "math"])
    listed = read.rows[begin + 1 : begin + 5]
    half = f"{0.0005 / spread:+.2f} ± {0.0005 / spread:.2f}"
    assert listed == [
        ["source/books", half],  # against the mean of its own field, not of all
        ["target/code", half],
        ["source/web", half.replace("+", "-")],
        ["target/math", half.replace("+", "-")],
    ]
    assert "on 32 rows" in written.page


def test_a_thousand_domains_stay_readable():
    """The largest are listed, the rest summed, and all of them one click away."""
    names = tuple(f"{('source', 'target')[i % 2]}/topic-{i:04d}" for i in range(1000))
    written = report(names=names, decisions=40)
    before, after = written.page.split("<summary>All 1,000 domains</summary>")
    listed = [row for row in _Reader(written.page).rows if row and row[0].startswith(("source/", "target/"))]
    assert len(listed) == LISTED + 1000
    assert before.count('<th scope="row">source') + before.count('<th scope="row">target') == LISTED + 2
    assert re.search(r'<th scope="row">target: \d+ other domains</th>', before)
    assert "<details>" in before
    assert "All 40 mixes" in after
    assert len(written.page) < 800_000
