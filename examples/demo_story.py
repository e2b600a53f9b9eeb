"""What the demo does with one seed of adapters: domains side by side, one comes, one goes; and joint adapters."""

from __future__ import annotations

import time
from typing import Any

import torch
from demo_models import lora, mixture, perplexities, size
from demo_setup import Setup
from demo_table import ANEW, JOINT, MIXTURE, SHARED, TWICE, percent

Perplexities = dict[str, float]  # by kind of text
SAVED = ("mixture", "mixture_shared")  # folders
LEAST_GAIN = 0.98  # of the base's perplexity, by a domain's own adapter; where it is less, a user hears of it


class Story:
    """The systems of one seed, in the order of the table."""

    def __init__(self, setup: Setup, seed: int) -> None:
        self.setup, self.seed = setup, seed
        self.out = setup.out / f"seed{seed}" if seed else setup.out
        self.count = {kind: rows.numel() for kind, rows in setup.rows.items()}
        self.systems: list[dict[str, Any]] = []
        self.base: Perplexities = {}
        self.own: Perplexities = {}  # domain -> that of its own adapter
        self.folders: dict[str, str] = {}  # domain -> its adapter
        self.saved: dict[str, Perplexities] = {}  # folder of a mixture -> what it has
        self.change: dict[str, Perplexities] = {}  # system -> how others changed when a domain came, in per cent

    def reads(self) -> int:
        """How many tokens all adapters read; no step has fewer rows than a batch."""
        rows, args = self.setup.rows, self.setup.args

        def read(*kinds: str) -> int:
            return sum(len(rows[kind]) for kind in kinds) // args.batch * args.batch * args.length

        old, new = self.setup.domains, self.setup.later
        total = sum(map(read, old)) + 4 * read(*old, "general")
        return total + (2 * read(new) + read(*old, new, "general") if new else 0)

    def tell(self, base: Perplexities) -> None:
        self.base, old, new = base, self.setup.domains, self.setup.later
        self.measure("base model", None, 0, base)
        for name in [*old, new] if new else old:
            self.domain(name)
        joint_reads = sum(self.count[kind] for kind in (*old, "general"))
        self.apart(joint_reads)
        self.share(joint_reads)

    def apart(self, joint_reads: int) -> None:
        """The domains' adapters under a gate, against one joint adapter; a domain comes, and one goes.

        No more than two models at a time: a base may be large.
        """
        setup, old = self.setup, self.setup.domains
        mixed = self.mixture(shared=False)
        found = before = self.measure(MIXTURE, mixed, joint_reads)
        joint = self.joint("joint adapter", setup.args.rank * len(old), [*old, "general"])
        joint_before = self.measure(JOINT, joint, joint_reads)
        if setup.later:
            found = self.add_to_mixture(mixed)
            alone = self.add_to_joint(joint)
            del joint
            anew = self.train_anew(joint_reads)
            others = [kind for kind in setup.kinds if kind != setup.later]
            self.change = {
                f"mixture + {setup.later}": {kind: percent(found[kind], before[kind]) for kind in others},
                f"joint, {setup.later} alone": {kind: percent(alone[kind], joint_before[kind]) for kind in others},
                "joint, anew": {kind: percent(anew[kind], joint_before[kind]) for kind in others},
            }
        self.save("mixture", mixed, found)
        self.remove(old[0], mixed, MIXTURE)

    def share(self, joint_reads: int) -> None:
        """One more adapter, always on, reads all text under the gate; against a joint adapter that reads it twice."""
        setup, old = self.setup, self.setup.domains
        mixed = self.mixture(shared=True)
        text = [*old, "general"]
        setup.train(mixed, torch.cat([setup.rows[kind] for kind in text]), "shared adapter", seed=self.seed)
        found = self.measure(SHARED, mixed, 2 * joint_reads)
        twice = self.joint("joint adapter, two readings", setup.args.rank * (len(old) + 1), text, epochs=2)
        self.measure(TWICE, twice, 2 * joint_reads)
        if setup.later:
            self.add(mixed)
            found = self.measure(f"{SHARED} + {setup.later}", mixed, self.count[setup.later])
        self.save("mixture_shared", mixed, found)
        self.remove(old[0], mixed, SHARED)

    # --- adapters -----------------------------------------------------------------------------------------------

    def domain(self, name: str) -> None:
        """A LoRA adapter that has read this domain's text alone."""
        setup = self.setup
        model = lora(setup.base(), setup.args.rank, self.seed)
        setup.train(model, setup.rows[name], f"domain {name}", seed=self.seed)
        self.own[name] = own = perplexities(model, {name: setup.tests[name]})[name]
        if own > LEAST_GAIN * self.base[name]:
            other = "a smaller" if own > self.base[name] else "a larger"
            setup.progress.say(
                f"note: on {name} its own adapter is at {own:.1f}, and the base model at {self.base[name]:.1f}: try "
                f"{other} --rate than {setup.args.rate:g}, or more --tokens"
            )
        self.folders[name] = str(self.out / "domains" / name)
        model.save_pretrained(self.folders[name])

    def mixture(self, shared: bool) -> Any:
        """The adapters of the first domains under a gate that has counted their text."""
        setup = self.setup
        folders = {name: self.folders[name] for name in setup.domains}
        model = mixture(setup.base(), folders, setup.args.rank if shared else 0, self.seed)
        started = time.perf_counter()
        model.base_model.fit_gate({name: setup.rows[name] for name in folders}, setup.rows["general"])
        self.gate_seconds = time.perf_counter() - started
        return model

    def joint(self, what: str, rank: int, kinds: list[str], epochs: int = 1) -> Any:
        """One LoRA adapter that reads all text of `kinds`."""
        setup = self.setup
        rows = torch.cat([setup.rows[kind] for kind in kinds])
        return setup.train(lora(setup.base(), rank, self.seed), rows, what, epochs=epochs, seed=self.seed)

    def add(self, mixed: Any) -> None:
        """The later domain comes into a mixture by its own adapter and its own text."""
        new = self.setup.later
        mixed.base_model.add_expert(new, self.folders[new])
        mixed.base_model.fit_gate({new: self.setup.rows[new]})

    def add_to_mixture(self, mixed: Any) -> Perplexities:
        """A domain comes into a mixture, by its own text alone."""
        self.add(mixed)
        return self.measure(f"{MIXTURE} + {self.setup.later}", mixed, self.count[self.setup.later])

    def add_to_joint(self, joint: Any) -> Perplexities:
        """A domain comes into the joint adapter, by its own text alone."""
        setup, new = self.setup, self.setup.later
        setup.train(joint, setup.rows[new], f"joint adapter, {new} alone", seed=self.seed)
        return self.measure(f"joint adapter, gone on with {new} alone", joint, self.count[new])

    def train_anew(self, joint_reads: int) -> Perplexities:
        """A joint adapter that reads everything from the start."""
        setup, domains = self.setup, [*self.setup.domains, self.setup.later]
        anew = self.joint("joint adapter, anew", setup.args.rank * len(domains), [*domains, "general"])
        return self.measure(ANEW, anew, joint_reads + self.count[setup.later])

    def remove(self, name: str, mixed: Any, system: str) -> None:
        """A domain goes, without training."""
        mixed.base_model.remove_expert(name)
        self.measure(f"{system}, without {name}", mixed, 0)

    # --- what is kept -------------------------------------------------------------------------------------------

    def measure(self, name: str, model: Any, tokens: int, found: Perplexities | None = None) -> Perplexities:
        """Note the perplexities of a system on every kind of text."""
        self.setup.progress.step(f"measure {name}")
        found = found or perplexities(model, self.setup.tests)
        added = 0 if model is None else size(model)
        self.systems.append({"name": name, "parameters": added, "tokens": tokens, "perplexity": found})
        return found

    def save(self, folder: str, mixed: Any, found: Perplexities) -> None:
        mixed.save_pretrained(self.out / folder)
        self.saved[folder] = found
