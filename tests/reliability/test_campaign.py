"""Random damages to shards of all layouts: none costs a row in silence, except where a tar cannot tell."""

from __future__ import annotations

import pytest

from benchmarks.reliability.campaign import CHANGED, DETECTED, LOST, Trial, needlessly_partial, run_campaign, unnoticed


def check(trials: list[Trial]) -> None:
    assert unnoticed(trials) == []
    detected = [trial for trial in trials if trial.outcome == DETECTED]
    assert all(trial.is_named for trial in detected)
    assert [trial for trial in trials if needlessly_partial(trial)] == []
    assert sum(trial.skipping.partial_rows > 0 for trial in trials) < len(trials) / 100
    assert [trial for trial in trials if trial.skipping.unreported_rows and not trial.is_known_limit] == []
    with_manifest = [trial for trial in trials if trial.moment == "with manifest"]
    assert {trial.outcome for trial in with_manifest} == {DETECTED}
    assert [trial for trial in with_manifest if trial.skipping.rows_lost != trial.skipping.rows_reported] == []
    assert [trial for trial in trials if trial.moment == "after" and trial.outcome in (LOST, CHANGED)] == []
    # The damages are real: a reader of streams loses rows to many of them without an error.
    assert sum(trial.webdataset in (LOST, CHANGED) for trial in trials) > len(trials) / 4


def test_no_damage_costs_rows_in_silence() -> None:
    trials = run_campaign(168, seed=1)
    check(trials)
    assert [trial for trial in trials if trial.skipping.partial_rows] == []


@pytest.mark.slow
def test_no_damage_among_thousands_costs_rows_in_silence() -> None:
    check(run_campaign(3000, seed=2))


def test_the_campaign_finds_a_reader_that_takes_all_zeros_for_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dmagent_loader.shards.tar.scanner.may_be_padding", lambda zeros, file_size: True)
    assert {trial.kind for trial in unnoticed(run_campaign(336, seed=1))} >= {"zeroed tail"}
