"""The demo's table, and who is ahead."""

from __future__ import annotations

import math
from statistics import fmean, stdev
from typing import Any

MIXTURE, JOINT, ANEW = "mixture", "joint adapter", "joint adapter, trained anew on everything"
SHARED, TWICE = "mixture + shared adapter", "joint adapter of that size, two readings"


def percent(new: float, old: float) -> float:
    return 100 * (new / old - 1)


def mean(values: list[float]) -> float:
    """Geometric mean."""
    return math.exp(fmean(map(math.log, values)))


def over(kinds: list[str], seeds: list[dict[str, float]]) -> list[float]:
    """Geometric means over kinds of text, by seed."""
    return [mean([one[kind] for kind in kinds]) for one in seeds]


def over_seeds(runs: list[list[dict[str, Any]]], domains: list[str]) -> list[dict[str, Any]]:
    """The systems of several seeds: by seed (`seeds`), and geometric means over them.

    `domains` and `all` are those over the first domains and over all kinds of text.
    """
    found = []
    for same in zip(*runs, strict=True):
        seeds = [system["perplexity"] for system in same]
        means = {kind: mean([one[kind] for one in seeds]) for kind in seeds[0]}
        both = {"domains": mean(over(domains, seeds)), "all": mean(over(list(means), seeds))}
        found.append({**same[0], "perplexity": means, **both, "seeds": seeds})
    return found


def table(report: dict[str, Any]) -> str:
    """The systems by kind of text, in Markdown; of several seeds with the deviation of the two means."""
    kinds = report["kinds"]
    lines = [f"| perplexity | {' | '.join(kinds)} | first domains | all | adds | tokens read |"]
    lines.append("|---" * (len(kinds) + 5) + "|")
    for system in report["systems"]:
        cells = [f"{system['perplexity'][kind]:.1f}" for kind in kinds]
        for some in (report["domains"], kinds):
            by_seed = over(some, system["seeds"])
            cells.append(f"{mean(by_seed):.1f}" + (f" ± {stdev(by_seed):.1f}" if len(by_seed) > 1 else ""))
        cells += [f"{system['parameters']:,}", f"{system['tokens']:,}"]
        lines.append(f"| {system['name']} | {' | '.join(cells)} |")
    own = " | ".join(f"{report['own_adapter'][kind]:.1f}" if kind in report["own_adapter"] else "" for kind in kinds)
    return "\n".join([*lines, f"| each domain's own adapter | {own} | | | | |"])


def verdict(report: dict[str, Any]) -> str:
    """Who is ahead, whoever it is; of several seeds by how much in each."""
    systems = {system["name"]: system["seeds"] for system in report["systems"]}
    domains, later = report["domains"], report["later"]
    lines = []
    for what, one, other in (("", MIXTURE, JOINT), ("With a shared adapter: ", SHARED, TWICE)):
        lines.append(f"{what}{ahead('on the domains', domains, systems[one], systems[other])}")
        lines.append(f"{what}{ahead('with general text', [*domains, 'general'], systems[one], systems[other])}")
        if later and one == MIXTURE:
            everything = [*domains, later, "general"]
            lines.append(ahead(f"with {later} added", everything, systems[f"{MIXTURE} + {later}"], systems[ANEW]))
    return "\n".join(line[0].upper() + line[1:] for line in lines)


def ahead(where: str, kinds: list[str], mixed: list[dict[str, float]], joint: list[dict[str, float]]) -> str:
    """One line on two systems, by seed: geometric means over `kinds` of text, and the paired differences."""
    ours, theirs = over(kinds, mixed), over(kinds, joint)
    first, best, rest = "the mixture", ours, theirs
    if mean(theirs) < mean(ours):
        first, best, rest = "the joint adapter", theirs, ours
    by = percent(mean(rest), mean(best))
    gains = [percent(behind, leading) for behind, leading in zip(rest, best, strict=True)]
    line = f"{where} {first} is ahead: {mean(ours):.1f} (mixture), {mean(theirs):.1f} (joint), {by:.1f} %"
    if len(gains) > 1:
        wins = sum(gain > 0 for gain in gains)
        line += f"; paired by seed {fmean(gains):+.1f} ± {stdev(gains):.1f} %, ahead in {wins} of {len(gains)}"
    return f"{line}."
