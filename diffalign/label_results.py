"""What came of labelling: who said how much, how far people agree, and how good the models are; as numbers and as tables."""

from __future__ import annotations

import itertools
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from rich.markup import escape
from rich.table import Table

from diffalign.agreement import cohen_kappa, fleiss_kappa
from diffalign.arena import Ranking, Strengths, bradley_terry, skills_of, wins_of
from diffalign.labels import Answer, Labels

Verdict = Literal["first", "second", "tie"]
VERDICTS: tuple[Verdict, ...] = ("first", "second", "tie")


def verdicts(answer: Answer) -> dict[tuple[int, int], Verdict]:
    """What an answer says of every two media, the smaller number first; nothing where it was skipped."""
    found: dict[tuple[int, int], Verdict] = {}
    if answer.ranks is not None:
        ranks = dict(zip(answer.shown, answer.ranks, strict=True))
        for a, b in itertools.combinations(sorted(ranks), 2):
            found[a, b] = "first" if ranks[a] < ranks[b] else "second" if ranks[a] > ranks[b] else "tie"
    return found


class Agreement(NamedTuple):
    """Of `common` pairs of samples that several people judged in one comparison: the share of equal verdicts, and kappa.

    `kappa` is Cohen's of two people and Fleiss' of more, NaN where there is none; `between` has Cohen's of every two people who share
    some: (one, other, common, share, kappa).
    """

    common: int
    share: float
    kappa: float
    name: str
    between: list[tuple[str, str, int, float, float]]


def agreement(answers: Sequence[Answer]) -> Agreement:
    said: dict[tuple[int, tuple[int, int]], dict[str, Verdict]] = defaultdict(dict)
    for answer in answers:
        for pair, verdict in verdicts(answer).items():
            said[answer.comparison, pair][answer.rater] = verdict
    common = [by for by in said.values() if len(by) > 1]
    people = sorted({rater for by in common for rater in by})
    between = list[tuple[str, str, int, float, float]]()
    for one, other in itertools.combinations(people, 2):
        both = [(by[one], by[other]) for by in common if one in by and other in by]
        if both:
            share = sum(a == b for a, b in both) / len(both)
            between.append((one, other, len(both), share, cohen_kappa([a for a, _ in both], [b for _, b in both])))
    if not common:
        return Agreement(0, float("nan"), float("nan"), "Cohen's", between)
    counts = np.array([[list(by.values()).count(verdict) for verdict in VERDICTS] for by in common], dtype=np.float64)
    raters = counts.sum(1)
    share = float(np.mean((counts * (counts - 1)).sum(1) / (raters * (raters - 1))))
    if len(people) == 2:
        return Agreement(len(common), share, between[0][4], "Cohen's", between)
    return Agreement(len(common), share, fleiss_kappa(counts), "Fleiss'", between)


def rankings(labels: Labels, answers: Sequence[Answer]) -> list[Ranking]:
    """The answers as rankings of models, in the order in which they came, without the skipped ones."""
    media = labels.gathered.media
    return [Ranking(tuple(media[n].model for n in a.shown), tuple(map(float, a.ranks))) for a in answers if a.ranks is not None]


def strengths(labels: Labels, answers: Sequence[Answer]) -> tuple[Strengths, Any]:
    """Bradley-Terry strengths of the models, and the wins (M, M) that they come from.

    What several people said of one comparison counts as one comparison, with their mean verdict: they look at the same samples.
    """
    count = len(labels.gathered.models)
    by = defaultdict[int, list[Answer]](list)
    for answer in answers:
        if answer.ranks is not None:
            by[answer.comparison].append(answer)
    wins = np.zeros((count, count))
    for own in by.values():
        wins += wins_of(count, rankings(labels, own), 1 / len(own))
    return bradley_terry(wins), wins


def tables(labels: Labels) -> list[Table]:
    """What a person sees of a database."""
    answers = labels.answers()
    shown = [_raters(labels, answers)]
    if (found := agreement(answers)).common:
        shown.append(_agreement(found))
    if len(labels.gathered.models) > 1 and any(answer.ranks is not None for answer in answers):
        shown.append(_models(labels, answers))
    return shown


def _table(title: str, left: Sequence[str], right: Sequence[str]) -> Table:
    table = Table(title=escape(title), title_justify="left")
    for name in left:
        table.add_column(name, overflow="fold")
    for name in right:
        table.add_column(name, justify="right")
    return table


def _raters(labels: Labels, answers: Sequence[Answer]) -> Table:
    table = _table(f"{labels.path}: {len(labels.comparisons):,} comparisons", ("rater",), ("answers", "ties", "skipped", "median seconds"))
    for rater, count in sorted(Counter(answer.rater for answer in answers).items()):
        own = [answer for answer in answers if answer.rater == rater]
        skipped = sum(answer.ranks is None for answer in own)
        tied = sum(answer.ranks is not None and len(set(answer.ranks)) < len(answer.ranks) for answer in own)
        seconds = [answer.seconds for answer in own if answer.seconds is not None]
        table.add_row(escape(rater), f"{count:,}", f"{tied:,}", f"{skipped:,}", f"{statistics.median(seconds):.1f}" if seconds else "-")
    return table


def _agreement(found: Agreement) -> Table:
    table = _table("Agreement on pairs of samples that both have judged", ("rater", "and"), ("pairs", "equal", "Cohen's kappa"))
    for one, other, common, share, kappa in found.between:
        table.add_row(escape(one), escape(other), f"{common:,}", f"{share:.0%}", number(kappa))
    if found.name == "Fleiss'":
        table.add_section()
        table.add_row("all", "", f"{found.common:,}", f"{found.share:.0%}", f"{number(found.kappa)} (Fleiss')")
    return table


def _models(labels: Labels, answers: Sequence[Answer]) -> Table:
    """Best first."""
    (values, low, high), wins = strengths(labels, answers)
    skills = skills_of(len(values), rankings(labels, answers))
    title = "Bradley-Terry: log odds against the mean of the models; skill: mean and deviation of a Gaussian after each answer in turn"
    table = _table(title, ("model",), ("comparisons", "wins", "strength", "95% interval", "skill"))
    for i in sorted(range(len(values)), key=lambda i: -values[i]):
        games = wins[i].sum() + wins[:, i].sum()
        share, skill = f"{wins[i].sum() / games:.0%}" if games else "-", f"{skills[i].mean:.1f} ± {skills[i].deviation:.1f}"
        interval = f"[{low[i]:+.2f}, {high[i]:+.2f}]"
        table.add_row(escape(labels.gathered.models[i]), f"{games:,.1f}".removesuffix(".0"), share, f"{values[i]:+.2f}", interval, skill)
    return table


def number(value: float) -> str:
    return f"{value:.2f}" if np.isfinite(value) else "-"
