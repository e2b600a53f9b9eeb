"""What the study of domains claims, with what was expected before its first run; and its tables."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any

from demo_table import mean, percent

from mixadapters.tasks.report import t_interval

INFINITE = math.inf
Run = dict[str, Any]


@dataclass(frozen=True)
class Claim:
    """The perplexity of `one` against that of `other`, in per cent, over some kinds of text; below 0: `one` is ahead.

    over: "domains" (the first ones), "old" (with general text), "all" (with the later domain too), "later", "general",
        "removed", "others" (all but the removed one).
    expected: between which differences it was expected to lie.
    """

    text: str
    one: str
    other: str
    over: str
    expected: tuple[float, float]


CLAIMS = (
    Claim("the counts gate costs little against the domain's own adapter", "counts", "own", "domains", (-1, 4)),
    Claim("it leaves general text alone", "counts", "base", "general", (-1.5, 1.5)),
    Claim("a joint adapter of equal size is ahead on the domains", "counts", "joint", "domains", (0, 10)),
    Claim("with general text the mixture is ahead of it", "counts", "joint", "old", (-10, 0)),
    Claim("at equal active size the mixture is ahead", "counts", "joint_active", "domains", (-10, 0)),
    Claim("counts before features", "counts", "features", "old", (-INFINITE, 0)),
    Claim("counts before a prefix gate by the LM loss", "counts", "lm_prefix", "old", (-INFINITE, 0)),
    Claim("by the LM loss, prefix before token", "lm_prefix", "lm_token", "old", (-INFINITE, 0)),
    Claim("counts before a uniform mean", "counts", "uniform", "old", (-INFINITE, -5)),
    Claim("the posterior is as good as the own adapter", "posterior", "own", "domains", (-2, 1.5)),
    Claim("the posterior is a little before counts", "posterior", "counts", "old", (-5, 0)),
    Claim("with a shared adapter before a joint one that reads twice", "shared", "joint_twice", "domains",
          (-INFINITE, 0)),
    Claim("and with general text", "shared", "joint_twice", "old", (-INFINITE, 0)),
    Claim("a domain that comes leaves the others alone", "added", "counts", "old", (-1, 1)),
    Claim("so it does beside a shared adapter", "added_shared", "shared", "old", (-1, 1)),
    Claim("it is nearly as good as its own adapter", "added", "own", "later", (-1, 6)),
    Claim("the mixture is before a joint adapter made anew", "added", "joint_anew", "all", (-10, 0)),
    Claim("and before one that goes on with replay", "added", "joint_replay", "all", (-INFINITE, 0)),
    Claim("a joint adapter that goes on with new text alone forgets", "joint_new_alone", "joint", "old",
          (30, INFINITE)),
    Claim("a warm start from the nearest domain helps the new one", "added_warm", "added", "later", (-INFINITE, 0)),
    Claim("features, fitted anew, stay behind counts", "added_features", "added", "all", (0, INFINITE)),
    Claim("with one more arm the posterior is before counts", "posterior_added", "added", "all", (-5, 0)),
    Claim("a domain that goes leaves the others alone", "removed", "added", "others", (-1, 1)),
    Claim("and its text is the base model's again", "removed", "added", "removed", (50, INFINITE)),
    Claim("half of the stream is enough for the shared adapter", "shared_half", "shared", "domains", (0, 2)),
    Claim("a quarter of it is better than no shared adapter", "shared_quarter", "counts", "domains", (-INFINITE, 0)),
    Claim("shared first and experts after is at least as good", "shared_first", "shared", "domains", (-4, 1)),
    Claim("and before a joint one that reads twice", "shared_first", "joint_twice", "domains", (-INFINITE, 0)),
    Claim("better with 3/5 of the size first", "shared_first_wide", "shared_first", "domains", (-INFINITE, 0)),
    Claim("and no worse than a joint one that reads twice", "shared_first_wide", "joint_twice", "domains", (-6, 3)),
    Claim("under it a domain that comes leaves the others alone", "added_first_wide", "shared_first_wide", "old",
          (-1, 1)),
    Claim("it is nearly a joint adapter made anew", "added_first_wide", "joint_anew", "all", (-2, 6)),
    Claim("a domain that goes leaves the others alone", "removed_first_wide", "added_first_wide", "others", (-1, 1)),
    Claim("what the shared adapter learned of it stays", "removed_first_wide", "added_first_wide", "removed", (5, 40)),
    Claim("experts that read twice are behind it", "counts_twice", "joint_twice", "domains", (0, 10)),
    Claim("counts times features is counts", "product", "counts", "old", (-1, 1)),
    Claim("3,000 counted tokens of each kind are nearly enough", "counts_few", "counts", "old", (0, 3)),
    Claim("counts before Arrow", "counts", "arrow", "old", (-40, -5)),
    Claim("counts before PHATGOOSE", "counts", "phatgoose", "old", (-35, -5)),
    Claim("counts before PEFT's X-LoRA", "counts", "xlora", "old", (-20, -2)),
    Claim("Arrow is before a uniform mean", "arrow", "uniform", "old", (-20, 5)),
    Claim("over the text so far and with all experts it is", "arrow_prefix", "uniform", "old", (-6, 0)),
    Claim("X-LoRA, which reads the last states, before a gate for each layer", "xlora", "lm_token", "old", (-20, 0)),
)  # fmt: skip
BETWEEN_KINDS = Claim("LoRA is the better kind", "own", "own", "domains", (-INFINITE, 0))


class Results:
    """The runs by kind of adapters, cell and seed."""

    def __init__(self, runs: list[Run], domains: list[str], later: str, removed: str) -> None:
        self.by: dict[str, dict[str, dict[int, Run]]] = {}
        for run in runs:
            self.by.setdefault(run["kind"], {}).setdefault(run["cell"], {})[run["seed"]] = run
        old = [*domains, "general"]
        everything = [*domains, later, "general"]
        self.texts = {
            "domains": domains, "old": old, "all": everything, "later": [later], "general": ["general"],
            "removed": [removed], "others": [kind for kind in everything if kind != removed],
        }  # fmt: skip

    def over(self, run: Run, over: str) -> float:
        return mean([run["perplexity"][kind] for kind in self.texts[over]])

    def differences(self, claim: Claim, one: dict[int, Run], other: dict[int, Run]) -> list[float]:
        """In per cent, by seed."""
        seeds = sorted(one.keys() & other.keys())
        return [percent(self.over(one[seed], claim.over), self.over(other[seed], claim.over)) for seed in seeds]

    def tested(self) -> list[dict[str, Any]]:
        """Each claim of each kind: its differences, mean, interval, and whether it is as expected."""
        found = []
        for kind, cells in self.by.items():
            pairs = [(claim, cells.get(claim.one, {}), cells.get(claim.other, {})) for claim in CLAIMS]
            found += [judged(kind, claim, self.differences(claim, one, other)) for claim, one, other in pairs]
        if len(self.by) == 2:
            one, other = (self.by[kind].get("own", {}) for kind in ("lora", "bottleneck"))
            found.append(judged("both", BETWEEN_KINDS, self.differences(BETWEEN_KINDS, one, other)))
        return found


def judged(kind: str, claim: Claim, gaps: list[float]) -> dict[str, Any]:
    low, high = claim.expected
    interval = t_interval(gaps)
    if not gaps:
        verdict = "not run"
    elif not low <= statistics.mean(gaps) <= high:
        verdict = "no"
    elif interval is not None and low <= interval[0] and interval[1] <= high:
        verdict = "yes"
    else:
        verdict = "in the mean"
    return {
        "kind": kind, "claim": claim.text, "one": claim.one, "other": claim.other, "over": claim.over,
        "expected": [str(low), str(high)], "differences": gaps, "interval": interval, "as_expected": verdict,
    }  # fmt: skip


def told(claim: dict[str, Any]) -> list[str]:
    """One row of the table of claims."""
    gaps, interval = claim["differences"], claim["interval"]
    low, high = map(float, claim["expected"])
    bounds = (
        f"below {high:g}" if low == -INFINITE else f"above {low:g}" if high == INFINITE else f"{low:g} to {high:g}"
    )
    measured = f"{statistics.mean(gaps):+.1f}" if gaps else "-"
    if interval is not None:
        measured += f" ({interval[0]:+.1f} to {interval[1]:+.1f})"
    compared = f"`{claim['one']}` - `{claim['other']}`, {claim['over']}"
    return [claim["kind"], claim["claim"], compared, bounds, measured, claim["as_expected"]]


def markdown(rows: list[list[str]]) -> str:
    """Of which the first row is the head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def perplexity_table(results: Results, kind: str) -> str:
    """Geometric means over seeds, by kind of text; the means over kinds with the deviation between seeds."""
    texts = results.texts
    head = [kind, "seeds", *texts["all"], "domains", "with general", "all", "adds", "reads besides"]
    rows = [head]
    for cell, by_seed in results.by[kind].items():
        runs = list(by_seed.values())
        some = runs[0]["perplexity"]
        row = [cell, str(len(runs))]
        row += [
            f"{mean([run['perplexity'][name] for run in runs]):.1f}" if name in some else "" for name in texts["all"]
        ]
        for over in ("domains", "old", "all"):
            values = [results.over(run, over) for run in runs]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            row.append(f"{mean(values):.1f}{spread}")
        rows.append([*row, f"{runs[0]['parameters']:,}", f"{runs[0]['tokens']:,}"])
    return markdown(rows)


def report(runs: list[Run], domains: list[str], later: str, removed: str) -> tuple[list[dict[str, Any]], str]:
    """The claims with their intervals, and all tables in Markdown."""
    results = Results(runs, domains, later, removed)
    claims = results.tested()
    tables = [perplexity_table(results, kind) for kind in results.by]
    head = ["kind", "claim", "difference, %", "expected", "measured (95 %)", "as expected"]
    return claims, "\n\n".join([*tables, markdown([head, *map(told, claims)])]) + "\n"
