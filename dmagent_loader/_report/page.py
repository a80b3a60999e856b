"""The report about one run: a page and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dmagent_loader._report import html
from dmagent_loader._report.charts import TEXT, draw_feedback, draw_mixes, new_figure, png_bytes
from dmagent_loader._report.decisions import DecisionTables, decision_tables, signed
from dmagent_loader._report.history import RunHistory
from dmagent_loader._report.selection import Groups, by_field, largest
from dmagent_loader._report.tables import Table
from dmagent_loader._version import __version__
from dmagent_loader.mixture.domains import DomainSpace
from dmagent_loader.mixture.simplex import IntArray

AREAS = 12
"""Domains that stand alone in a chart, the largest ones."""
LISTED = 25
"""Domains in the tables that readers see first, the largest ones."""
_SAMPLES, _SHARE = "samples trained on", "share of the samples"
_WIDTH, _HEIGHT, _DOTS_PER_INCH = 4.7, 3.5, 190
"""Of a picture in the page, in inches: small enough for its text to be legible on a telephone."""


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """A report.

    Attributes:
        page: The HTML page.
        picture: The charts as one PNG; None: no sample was trained on, so there is nothing to draw.
        lines: The summary, for a terminal.
    """

    page: str
    picture: bytes | None
    lines: list[str]


def write_report(history: RunHistory, *, source: str) -> RunReport:
    """A report about a run.

    Args:
        history: The run.
        source: Description of the file that it was read from.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    decisions = decision_tables(history)
    facts = [*_progress(history, decisions), *_forecast(history)]
    domains = largest(history.plan.space, history.counts.astype(np.float64), AREAS)
    sections = [html.notes_section("Now and next", facts), *_pictures(history, domains), _domain_section(history)]
    if history.influence is not None:
        sections.append(_influence_section(history))
    sections += [_decision_section(decisions), html.table_section("Settings", _settings(history, source))]
    return RunReport(
        page=html.page(f"Data mixing: {history.name}", sections, summary=_summary(history)),
        picture=_overview(history, domains) if history.consumed else None,
        lines=[_summary(history), *facts],
    )


def _summary(history: RunHistory) -> str:
    space = history.plan.space
    fields = ", ".join(f"{field} ({len(space.members(field)):,})" for field in space.fields)
    return (
        f"{history.consumed:,} samples trained on, from {len(space):,} domain{'s' * (len(space) != 1)} in "
        f"{len(space.fields)} field{'s' * (len(space.fields) != 1)}: {fields}."
    )


def _progress(history: RunHistory, decisions: DecisionTables) -> list[str]:
    facts = []
    measured = history.run.measurements
    if history.policy is None:
        facts.append("There is no policy; the mix changes only by hand.")
    else:
        refused = f", of which {decisions.refused:,} left the previous mix in force" if decisions.refused else ""
        text = f"Policy {history.policy}: {decisions.made:,} decision{'s' * (decisions.made != 1)}{refused}."
        last = history.forecast.last_sample
        following = history.next_decision
        if following is not None and (last is None or max(following, history.consumed) < last):
            is_due = following <= history.consumed
            text += " The next decision is due now." if is_due else f" The next is due after {following:,} samples."
        facts.append(text)
    if not measured:
        facts.append("There is no feedback yet.")
    for field in measured[0].fields if measured else ():
        first, now = measured[0].feedback[field], measured[-1].feedback[field]
        change = f" ({signed(now - first)} since the base model)" if len(measured) > 1 else ""
        facts.append(f"Feedback {field}: {now:.3f} nats per answer token{change}; higher is better.")
    if history.consumed:
        most = int(np.argmax(history.passes))
        facts.append(
            f"Most repeated domain: {history.plan.space.names[most]}, {history.passes[most]:.2f} passes over its "
            f"rows ({history.plan.num_rows[most]:,})."
        )
    return facts


def _forecast(history: RunHistory) -> list[str]:
    """The end of the run, and the domains that run out before it."""
    plan, forecast, consumed = history.plan, history.forecast, history.consumed
    facts = []
    is_over = forecast.end is not None and forecast.end <= consumed and not forecast.fails
    if forecast.stop is not None and not is_over:
        facts.append(
            f"The trainer stops after {_when(forecast.stop, consumed)}, by its number of steps."
            if forecast.stop > consumed
            else f"The trainer has stopped, after its number of steps ({forecast.stop:,} samples)."
        )
    if forecast.end is None:
        facts.append("The data do not end the run: domains that are used up repeat, or others take their weight.")
    else:
        names, when = _some(forecast.used_up), _when(forecast.end, consumed)
        if is_over:
            facts.append(f"The run has ended: {names} used up.")
        elif forecast.fails:
            facts.append(f"Under the present mix the run fails after {when}: {names} used up, and the rule is 'error'.")
        else:
            facts.append(f"Under the present mix the data last for {when}: then {names} used up.")
    last = forecast.last_sample
    soon = [(int(at), name) for at, name in zip(forecast.runs_out, plan.space.names, strict=True) if at > consumed]
    soon = sorted((at, name) for at, name in soon if last is None or at < last)
    if soon:
        texts = [f"{name} after {at:,} samples" for at, name in soon[:3]]
        facts.append(f"Next to run out under the present mix: {', '.join(texts)}.")
    return facts


def _when(sample: int, consumed: int) -> str:
    return f"{sample:,} samples ({sample - consumed:,} from now)"


def _some(names: Sequence[str], most: int = 4) -> str:
    """The first names, with the verb."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more} {'is' if len(names) == 1 else 'are'}"


def _pictures(history: RunHistory, domains: Groups) -> list[str]:
    if not history.consumed:
        return [html.notes_section("Charts", ["No sample was trained on, so there is nothing to draw."])]
    pictures, fields = [], by_field(history.plan.space)
    for groups, name in ((fields, "by field"), (domains, "by domain")):
        figure = new_figure(_WIDTH, _HEIGHT + 0.2 * max(0, (len(groups) + 1) // 2 - 1))
        _draw_mix(figure, history, groups, name, legend_below=True)
        pictures.append((_png(figure), f"Share of each {name.removeprefix('by ')} in the samples, over the run."))
    for field in history.run.measurements[0].fields if history.run.measurements else ():
        figure = new_figure(_WIDTH, _HEIGHT)
        draw_feedback(figure, [history.record(fields, "model")], x_label=_SAMPLES, fields=[field])
        pictures.append((_png(figure), f"Feedback {field} over the run."))
    return [html.pictures_section("The mix and the feedback over the run", pictures)]


def _png(figure: Any) -> bytes:
    return png_bytes(figure, dots_per_inch=_DOTS_PER_INCH)


def _draw_mix(figure: Any, history: RunHistory, groups: Groups, name: str, *, legend_below: bool) -> None:
    space = DomainSpace(tuple(domain for domain, _ in groups))
    draw_mixes(
        figure,
        [history.record(groups, name)],
        space,
        x_label=_SAMPLES,
        y_label=_SHARE,
        legend_below=legend_below,
    )


def _overview(history: RunHistory, domains: Groups) -> bytes:
    """All charts in one picture."""
    fields = by_field(history.plan.space)
    rows = 2 if history.run.measurements else 1
    figure = new_figure(11.5, 3.9 * rows)
    parts: Any = figure.subfigures(rows, 1, squeeze=False)[:, 0]
    figure.suptitle(f"Data mixing: {history.name}", x=0.012, ha="left", fontsize=13, fontweight="bold", color=TEXT)
    left, right = parts[0].subfigures(1, 2)
    _draw_mix(left, history, fields, "by field", legend_below=False)
    _draw_mix(right, history, domains, "by domain", legend_below=False)
    if history.run.measurements:
        draw_feedback(parts[1], [history.record(fields, "model")], x_label=_SAMPLES)
    return png_bytes(figure)


def _domain_section(history: RunHistory) -> str:
    space, counts = history.plan.space, history.counts
    order = np.argsort(-counts, kind="stable")
    last = history.forecast.last_sample
    at_end = None if last is None or last <= history.consumed else history.plan.counts(last)
    columns = ["domain", "rows", "samples", "share of\nsamples", "mix\nnow", "passes", "rows left\nin this pass"]
    columns += [] if at_end is None else ["passes\nat the end"]
    columns += ["runs out"]
    rows = [_domain_row(history, int(i), at_end) for i in order[:LISTED]]
    for field in space.fields if len(space) > LISTED else ():
        rest = [int(i) for i in order[LISTED:] if space.domains[int(i)].field == field]
        if rest:
            rows.append(_rest_row(history, field, rest, at_end))
    folded = None
    if len(space) > LISTED:
        folded = Table(columns=columns, rows=[_domain_row(history, int(i), at_end) for i in order])
    notes = ["A pass is one reading of all rows of a domain; 1.50 passes: half of the rows were trained on twice."]
    if at_end is not None:
        notes.append(f"The end: after {last:,} samples, if the present mix stays.")
    return html.table_section(
        "Domains",
        Table(columns=columns, rows=rows),
        notes=notes,
        folded=folded,
        folded_heading=f"All {len(space):,} domains",
    )


def _domain_row(history: RunHistory, i: int, at_end: IntArray | None) -> list[str]:
    plan = history.plan
    rows, count, out = int(plan.num_rows[i]), int(history.counts[i]), int(history.forecast.runs_out[i])
    if out >= 0:
        runs_out = f"used up at {out:,}" if out <= history.consumed else f"after {out:,} samples"
    else:
        runs_out = "repeats" if plan.rules[i] == "repeat" else "not before the end"
    return [
        plan.space.names[i],
        f"{rows:,}",
        f"{count:,}",
        _percent(count, history.consumed),
        _percent(history.mix_now[i], history.mix_now.sum()),
        f"{count / rows:.2f}",
        f"{history.rows_left[i]:,}",
        *([] if at_end is None else [f"{at_end[i] / rows:.2f}"]),
        runs_out,
    ]


def _rest_row(history: RunHistory, field: str, members: list[int], at_end: IntArray | None) -> list[str]:
    rows, count = int(history.plan.num_rows[members].sum()), int(history.counts[members].sum())
    return [
        f"{field}: {len(members):,} other domains",
        f"{rows:,}",
        f"{count:,}",
        _percent(count, history.consumed),
        _percent(history.mix_now[members].sum(), history.mix_now.sum()),
        f"{count / rows:.2f}",
        f"{history.rows_left[members].sum():,}",
        *([] if at_end is None else [f"{at_end[members].sum() / rows:.2f}"]),
        "",
    ]


def _percent(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "–"


def _influence_section(history: RunHistory) -> str:
    """Measured influence as the policy compares it: inside each field of the data, in units of its overall spread."""
    influence, space = history.influence, history.plan.space
    assert influence is not None
    values, errors = influence.values(), influence.errors()
    spread = values.std(axis=1, keepdims=True)
    spread[spread == 0] = 1.0
    for field in space.fields:
        names = [space.names[i] for i in space.members(field) if space.names[i] in influence.domains]
        if names:
            columns_of = [influence.domains.index(name) for name in names]
            values[:, columns_of], errors[:, columns_of] = influence.contrasts(names)
    values, errors = values / spread, errors / spread
    order = np.argsort(-values.mean(axis=0), kind="stable")
    columns = ["domain", *influence.fields]

    def rows(chosen: Sequence[int]) -> list[list[str]]:
        return [
            [
                influence.domains[i],
                *(f"{value:+.2f} ± {error:.2f}" for value, error in zip(values[:, i], errors[:, i], strict=True)),
            ]
            for i in chosen
        ]

    everything = order.tolist()
    few = everything if len(order) <= LISTED else [*everything[: LISTED - 5], *everything[-5:]]
    notes = [
        "How much training on the domain helps the feedback of each question field, to first order, compared with the "
        "mean of its own field of the data, with the standard error of the comparison. Unit: the standard deviation "
        "over all domains.",
        f"Measured by way '{influence.way}' on {sum(influence.rows.values()):,} rows and "
        f"{sum(influence.questions.values()):,} questions.",
    ]
    if len(order) > LISTED:
        notes.append(f"The {LISTED - 5} domains that help most on average, and the 5 that help least.")
    return html.table_section(
        "Measured influence",
        Table(columns=columns, rows=rows(few)),
        notes=[*notes, *influence.notes],
        folded=Table(columns=columns, rows=rows(everything)) if len(order) > LISTED else None,
        folded_heading=f"All {len(order):,} domains",
    )


def _decision_section(decisions: DecisionTables) -> str:
    return html.table_section(
        "Decisions",
        decisions.newest,
        notes=["Newest first. Changes of weight are in percentage points, since the mix before."],
        folded=decisions.all,
        folded_heading="" if decisions.all is None else f"All {len(decisions.all.rows):,} mixes",
    )


def _settings(history: RunHistory, source: str) -> Table:
    plan, interval = history.plan, history.samples_per_reweight
    rules = ", ".join(f"{rule} ({plan.rules.count(rule):,})" for rule in dict.fromkeys(plan.rules))
    return Table(
        columns=("setting", "value"),
        rows=[
            ("state", source),
            ("policy", history.policy or "none"),
            ("samples between two decisions", "not known yet" if interval is None else f"{interval:,}"),
            ("rule for used-up domains (number of domains)", rules),
            ("seed of the sample order", f"{plan.seed}"),
            ("rows per shuffle window", f"{plan.shuffle.window:,}"),
            ("shards per shuffle window", f"{plan.shuffle.shards:,}"),
            ("dmagent-loader", __version__),
        ],
        numeric=False,
    )
