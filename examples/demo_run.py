"""The demo's run: the story by seeds, and what is written of it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from demo_arguments import Arguments
from demo_files import Documents
from demo_models import load_base, perplexities, routing
from demo_pictures import coloured_page, plot_bars, plot_routing
from demo_setup import Setup
from demo_story import SAVED, Story
from demo_table import JOINT, MIXTURE, SHARED, TWICE, mean, over_seeds, percent, table, verdict
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import logging as transformers_logging

DEMO = Path(__file__).with_name("demo.py")


class Demo:
    """The story by seeds, and what is written of it."""

    def __init__(self, setup: Setup) -> None:
        self.args, self.out, self.setup = setup.args, setup.out, setup
        self.started = time.perf_counter()

    def main(self) -> dict[str, Any]:
        setup, stories = self.setup, []
        for seed in range(self.args.seeds):
            setup.progress.expect(Story(setup, seed).reads())
        setup.progress.say(
            f"{setup.sizes()}\n{setup.progress.bar.total:,} tokens of training in all, fewer by --tokens; the bar "
            "says how long they take"
        )
        setup.train_base()
        base = perplexities(setup.base(), setup.tests)
        for seed in range(self.args.seeds):
            story = Story(setup, seed)
            story.tell(base)
            stories.append(story)
            if seed == 0:
                self.draw(story, base)
                same = self.fresh_process(story.saved)
            report = self.report(stories, same)  # after each seed: what is there stays, whatever ends the next one
        setup.progress.bar.close()
        return report

    def draw(self, story: Story, base: dict[str, float]) -> None:
        """Three pictures, and the page, of one seed."""
        setup = self.setup
        mixed = PeftModel.from_pretrained(setup.base(), self.out / "mixture").eval()
        texts: dict[str, tuple[Tensor, Tensor]] = {}
        self.weights: dict[str, dict[str, float]] = {}  # kind of text -> arm -> mean weight
        for kind, rows in setup.tests.items():
            arms, weights = routing(mixed, rows)
            texts[kind] = rows[:3], weights[:3]
            self.weights[kind] = dict(zip(arms, weights.mean((0, 1)).tolist(), strict=True))
        plot_routing(self.weights, self.out / "routing.png")
        (self.out / "adding.png").unlink(missing_ok=True)  # of an earlier run, which had a later domain
        old = [kind for kind in setup.kinds if kind != setup.later]
        found = {system["name"]: system["perplexity"] for system in story.systems}
        bars = {
            name: {kind: percent(found[name][kind], base[kind]) for kind in old}
            for name in (MIXTURE, JOINT, SHARED, TWICE)
        }
        plot_bars(bars, self.out / "perplexity.png", "Perplexity against the base model", "%")
        if story.change:
            plot_bars(story.change, self.out / "adding.png", f"After {setup.later} came: change of the others", "%")
        coloured_page(setup.tokenizer, arms, texts, self.out / "text.html")

    def fresh_process(self, expected: dict[str, dict[str, float]]) -> bool:
        """Whether another process finds the same perplexities in the saved mixtures."""
        self.setup.progress.step("a fresh process")
        command = [sys.executable, str(DEMO), "--check", "True", "--out", str(self.out)]
        command += ["--base", self.args.base] if self.args.base else []
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{run.stderr[-2000:]}")
        return json.loads(run.stdout.splitlines()[-1]) == expected

    def report(self, stories: list[Story], same: bool) -> dict[str, Any]:
        setup = self.setup
        report = {
            "arguments": asdict(self.args), "kinds": setup.kinds, "domains": setup.domains, "later": setup.later,
            "systems": over_seeds([story.systems for story in stories], setup.domains),
            "own_adapter": {kind: mean([story.own[kind] for story in stories]) for kind in stories[0].own},
            "routing": self.weights, "seconds": time.perf_counter() - self.started,
            "cpu_seconds": time.process_time(), "gate_seconds": stories[0].gate_seconds,
            "equal_in_a_fresh_process": same,
            "versions": {name: version(name) for name in ("torch", "transformers", "peft", "mixadapters")},
        }  # fmt: skip
        (self.out / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
        (self.out / "table.md").write_text(f"{table(report)}\n\n{verdict(report)}\n", encoding="utf-8")
        return report


def run(args: Arguments, text: tuple[list[str], str | None, Documents]) -> dict[str, Any]:
    """Everything, from the text to the last line. Raises ValueError before anything is trained; see `Setup`."""
    quieten()
    setup = Setup(args, text)
    try:
        report = Demo(setup).main()
    except ValueError as error:  # not of what was given: its place is to be seen
        raise RuntimeError(f"the demo has failed: {error}") from error
    written = (setup.out / "table.md").read_text(encoding="utf-8")
    print(f"\n{written}\nThe gate counted in {report['gate_seconds']:.1f} s. A fresh process found "
          f"{'the same' if report['equal_in_a_fresh_process'] else 'OTHER'} perplexities. "
          f"{report['seconds']:.0f} s in all; see {args.out}/ for pictures and text.html.")  # fmt: skip
    return report


def check(args: Arguments) -> None:
    """In a fresh process: the saved mixtures' perplexities, as JSON."""
    quieten()
    out, found = Path(args.out), {}
    if lacking := [name for name in (*SAVED, "tests.safetensors") if not (out / name).exists()]:
        raise ValueError(
            f"--check: --out {args.out} lacks {lacking[0]}: it holds no demo; run it without --check first"
        )
    for name in SAVED:
        model = PeftModel.from_pretrained(load_base(args.base or out / "base"), out / name).eval()
        found[name] = perplexities(model, load_file(out / "tests.safetensors"))
    print(json.dumps(found))


def quieten() -> None:
    """No bar but the demo's."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
