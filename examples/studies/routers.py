"""Routers on toys whose right answer is known: what each costs in active experts, and what it buys.

    python examples/studies/routers.py  # all parts, eight seeds: 160 runs, about ten CPU minutes
    python examples/studies/routers.py --parts domains --arms top_1 top_2 --seeds 0 1  # a first look

A frozen linear layer reads rows of eight domains: 16 numbers of content, and a noisy code of the domain, rotated. A
teacher is a map of rank 2 from content to output. Each domain adds to the layer the sum of 0, 1 or 2 of six teachers
(two domains, three, three), so two experts, as large as a teacher each, are what the hardest domains need: top_1
cannot do them. Eight LoRA experts of rank 2 in a `MoAConfig` learn what is added. Error is the mean square of what is
missing over that of what is to be added (nmse: 1 is the frozen layer), on 4096 new rows; active is experts per row.
Pairs share the seed: teachers, training rows and test rows.

The balance loss has the weight 0.01, but for what papers have otherwise: null 0.02, from half-way 0.0001; tree none,
and 0.01 on its entropy; top_p 0.0001 on its entropy too. Steps and rate were set by how top_2 learns on seed 100,
which is no seed of the study; nothing was chosen on the seeds that are reported.

Expected, written before the run:

domains    top_1 worst of top_1, 2, 3 (by construction), and top_3 not much better than top_2. top_p 0.4 ends near one
           expert and the error of top_1, since with eight experts one of them soon has 0.4; 0.7 between top_1 and
           top_2. null between two and three active at about the error of top_3. dense_to_sparse between one and two
           active, and better than top_1; tree at 1.5 to 2 active, between top_1 and top_2. recurrent as top_2: with
           one layer there is nothing to remember.
difficulty null spends experts where they are needed: none or one where 0 teachers add, more where 1 or 2 do, with
           little between 1 and 2; correlation above 0.5. Renormalised over the chosen experts (the paper's form) it is
           worse, and adapts less: a row cannot say "little".
memory     the code is projected out after layer 1, where nothing is to be learned; layer 2 must know the domain. Only
           recurrent does; a linear gate, an MLP and a recurrent router at layer 2 alone stay near 0.8.
search     trained leaves before shuffled experts: search finds most of the match, and is ahead early on, less at the
           end, since experts can learn anew. All rows at one expert: search does not help, for no permutation of the
           experts makes two of one.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from study_arguments import check_numbers, read_arguments
from torch import Tensor, nn

from mixadapters import MoAConfig
from mixadapters.tasks.report import t_interval

CONTENT, DOMAINS, WIDTH, EXPERTS, RANK = 16, 8, 24, 8, 2
NEEDS = ((), (), (0,), (1,), (2,), (0, 3), (1, 4), (2, 5))  # teachers of each domain
ONE_EACH = tuple((i,) for i in range(DOMAINS))
NULL: dict[str, Any] = {"kind": "null", "k": 4, "null_arms": 8}
FALLING = {"balance_coef": [[0.0, 0.02], [0.5, 0.02], [0.5, 0.0001]]}
TREE: dict[str, Any] = {"kind": "tree", "k": 2, "entropy_coef": 0.01, "balance_coef": 0.0}
BALANCED = {"balance_coef": 0.01}
# part -> arm -> its router
ARMS: dict[str, dict[str, dict[str, Any]]] = {
    "domains": {
        **{f"top_{k}": {"kind": "top_k", "k": k, **BALANCED} for k in (1, 2, 3)},
        **{f"top_p_{p}": {"kind": "top_p", "p": p, "entropy_coef": 1e-4, **BALANCED} for p in (0.4, 0.7)},
        "null": NULL,
        "null_renormalised": {**NULL, "norm_topk_prob": True},
        "dense_to_sparse": {"kind": "dense_to_sparse", **BALANCED},
        "tree": TREE,
        "recurrent": {"kind": "recurrent", "k": 2, **BALANCED},
    },
    "memory": {
        "linear": {"kind": "top_k", "k": 1, **BALANCED},
        "mlp": {"kind": "top_k", "k": 1, "hidden": [128], **BALANCED},
        "recurrent_alone": {"kind": "recurrent", "k": 1, **BALANCED},
        "recurrent": {"kind": "recurrent", "k": 1, **BALANCED},
        "linear_sees_code": {"kind": "top_k", "k": 1, **BALANCED},
    },
    "search": {
        "kept": TREE,
        "shuffled": TREE,
        "shuffled_search": {**TREE, "learn_permutation": True},
        "one_expert": TREE,
        "one_expert_search": {**TREE, "learn_permutation": True},
    },
}
REFERENCE = {"domains": "top_2", "memory": "linear"}
SEARCH = 0.05  # share of the training, as in PermutationSearchCallback
LOOKS = (0.0, 0.1, 0.25, 0.5, 1.0)  # of the part "search"
PUSH = 8.0  # logit of the leaf that takes all rows


@dataclass
class Arguments:
    """What to run. The defaults are the evaluation."""

    out: str = field(default="runs/routers", metadata={"help": "Where results, table and picture go."})
    parts: list[str] = field(default_factory=lambda: list(ARMS))
    arms: list[str] | None = field(default=None, metadata={"help": "Arms of these parts. None: all."})
    seeds: list[int] = field(default_factory=lambda: list(range(8)))
    steps: int = field(default=600, metadata={"help": "Of each training."})
    rows: int = field(default=256, metadata={"help": "Rows of a step."})
    rate: float = field(default=2e-2, metadata={"help": "Adam's, falling to 0 in a line."})
    test_rows: int = 4096
    cpu_minutes: float = field(default=15.0, metadata={"help": "No run begins after these; run again to go on."})

    def __post_init__(self) -> None:
        check_numbers(self, zero=("cpu_minutes",))
        if unknown := set(self.parts) - ARMS.keys():
            raise ValueError(f"parts={sorted(unknown)} are unknown; choose from {list(ARMS)}")
        known = [arm for part in self.parts for arm in ARMS[part]]
        if unknown := set(self.arms or ()) - set(known):
            raise ValueError(f"arms={sorted(unknown)} are unknown; choose from {known}")

    @property
    def settings(self) -> dict[str, Any]:
        """What a result depends on."""
        return {name: getattr(self, name) for name in ("steps", "rows", "rate", "test_rows")}


# --- the toy ------------------------------------------------------------------------------------------------------


class World:
    """One seed: what each domain adds to a frozen layer."""

    def __init__(self, seed: int, needs: tuple[tuple[int, ...], ...]) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.needs = torch.tensor([len(teachers) for teachers in needs])
        self.rotation = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=draw)).Q
        down = torch.randn(DOMAINS, RANK, CONTENT, generator=draw) / CONTENT**0.5
        up = torch.randn(DOMAINS, WIDTH, RANK, generator=draw) / RANK**0.5
        read = self.rotation[:, :CONTENT].T
        teachers = up @ down @ read  # (D, d, d)
        self.maps = torch.stack([teachers[list(of)].sum(0) for of in needs])
        self.code = self.rotation[:, CONTENT:]  # (d, D), the directions of the code

    def rows(self, count: int, draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """x (N, 1, d), what is to be added (N, 1, d), and how many teachers that takes (N,)."""
        domain = torch.randint(DOMAINS, (count,), generator=draw)
        content = torch.randn(count, CONTENT, generator=draw)
        code = 2 * nn.functional.one_hot(domain, DOMAINS) + 0.5 * torch.randn(count, DOMAINS, generator=draw)
        x = torch.cat([content, code], 1) @ self.rotation.T
        added = torch.einsum("nij,nj->ni", self.maps[domain], x)
        return x.unsqueeze(1), added.unsqueeze(1), self.needs[domain]


class OneLayer(nn.Module):
    """Makes nothing: what a frozen layer makes would stand on both sides of the error."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Linear(WIDTH, WIDTH, bias=False)
        nn.init.zeros_(self.second.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(x)


class TwoLayers(OneLayer):
    """The same after a layer that passes all on, and a projection (d, d) of what that makes."""

    def __init__(self, projection: Tensor) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH, bias=False)
        nn.init.eye_(self.first.weight)
        self.register_buffer("projection", projection)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x) @ self.projection)


def adapted(net: nn.Module, router: dict[str, Any], targets: list[str]) -> Any:
    config = MoAConfig(
        num_experts=EXPERTS, r=RANK, lora_alpha=2 * RANK, target_modules=targets, router=dict(router),
        schedules=dict(FALLING) if router["kind"] == "null" else {},
    )  # fmt: skip
    return get_peft_model(net, config)


# --- training and evaluation --------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(model: Any, world: World, seed: int, rows: int) -> dict[str, Any]:
    """Error and active experts at the last layer, also by how many teachers rows need."""
    x, added, needs = world.rows(rows, torch.Generator().manual_seed(20_000 + seed))
    seen: list[Any] = []
    model.eval()
    model.base_model.context.observers.append(lambda key, routing, mask: seen.append(routing))
    try:
        output = model(x)
    finally:
        model.base_model.context.observers.pop()
    missing = output - added
    active = (seen[-1].indices >= 0).sum(1).float()
    loads = torch.stack([(seen[-1].indices == i).any(1).float().mean() for i in range(EXPERTS)])
    groups = {str(n): needs == n for n in needs.unique().tolist()}
    varies = len(groups) > 1 and bool(active.std() > 0)
    return {
        "nmse": (missing.square().sum() / added.square().sum()).item(),
        "active": active.mean().item(),
        "dead": int((loads < 0.01).sum()),
        "active_by_needs": {n: active[at].mean().item() for n, at in groups.items()},
        "missing_by_needs": {n: missing[at].square().mean().item() for n, at in groups.items()},
        "correlation": torch.corrcoef(torch.stack([active, needs.float()]))[0, 1].item() if varies else None,
    }


def train(
    model: Any,
    world: World,
    seed: int,
    args: Arguments,
    search: bool = False,
    look: Callable[[int], None] | None = None,
) -> None:
    """look: called with the number of steps done, before each step and at the end."""
    tuner, draw = model.base_model, torch.Generator().manual_seed(10_000 + seed)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], args.rate)
    for step in range(args.steps):
        if look is not None:
            look(step)
        tuner.set_progress(step / args.steps)
        model.train()
        if search:
            tuner.search_permutation(step / (SEARCH * args.steps))
        for group in optimizer.param_groups:
            group["lr"] = args.rate * (1 - step / args.steps)
        x, added, _ = world.rows(args.rows, draw)
        loss = (model(x) - added).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if look is not None:
        look(args.steps)


def domains(arm: str, seed: int, args: Arguments) -> dict[str, Any]:
    world = World(seed, NEEDS)
    model = adapted(OneLayer(), ARMS["domains"][arm], ["second"])
    train(model, world, seed, args)
    return evaluate(model, world, seed, args.test_rows)


def memory(arm: str, seed: int, args: Arguments) -> dict[str, Any]:
    world = World(seed, ONE_EACH)
    whole = torch.eye(WIDTH)
    net = TwoLayers(whole if arm == "linear_sees_code" else whole - world.code @ world.code.T)
    targets = ["second"] if arm == "recurrent_alone" else ["first", "second"]
    model = adapted(net, ARMS["memory"][arm], targets)
    for name, parameter in model.named_parameters():
        if ".first." in name and ".bank." in name:  # its experts stay as they begin: they add nothing
            parameter.requires_grad_(False)
    train(model, world, seed, args)
    return evaluate(model, world, seed, args.test_rows)


def search(arm: str, seed: int, args: Arguments) -> dict[str, Any]:
    """From a tree that has been trained, with its experts in place or shuffled; or from one that picks one expert."""
    world = World(seed, NEEDS)
    donor = None
    if not arm.startswith("one_expert"):
        donor = adapted(OneLayer(), TREE, ["second"])  # before what differs between arms: the same for all of a seed
        train(donor, world, seed, args)
    model = adapted(OneLayer(), ARMS["search"][arm], ["second"])
    (mixture,) = model.base_model.mixtures().values()
    if donor is None:
        with torch.no_grad():
            mixture.router.output.bias.view(mixture.router.k, -1)[:, 0] = PUSH
    else:
        (trained,) = donor.base_model.mixtures().values()
        mixture.router.load_state_dict(trained.router.state_dict(), strict=False)
        moved = 1 if arm.startswith("shuffled") else 0  # no expert stays where it was
        names = mixture.bank.names
        for i, name in enumerate(names):
            mixture.bank.experts[name].load_state_dict(trained.bank.experts[names[i - moved]].state_dict())
    looks = {round(share * args.steps): share for share in LOOKS}
    curve: dict[str, float] = {}

    def look(step: int) -> None:
        if step in looks:
            curve[str(looks[step])] = evaluate(model, world, seed, args.test_rows)["nmse"]

    train(model, world, seed, args, arm.endswith("_search"), look)
    return {**evaluate(model, world, seed, args.test_rows), "curve": curve}


PARTS: dict[str, Callable[[str, int, Arguments], dict[str, Any]]] = {
    "domains": domains, "memory": memory, "search": search,
}  # fmt: skip


def runs(args: Arguments) -> Iterator[dict[str, Any]]:
    """The result of each run, from its file where that is there already.

    Raises:
        ValueError: a file of other settings.
    """
    folder = Path(args.out) / "runs"
    folder.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        for part in args.parts:
            for arm in [a for a in ARMS[part] if args.arms is None or a in args.arms]:
                path = folder / f"{part}-{arm}-{seed}.json"
                if path.exists():
                    yield kept(path, args.settings)
                elif time.process_time() < 60 * args.cpu_minutes:
                    yield one(part, arm, seed, args, path)


def one(part: str, arm: str, seed: int, args: Arguments, path: Path) -> dict[str, Any]:
    start = time.process_time()
    torch.manual_seed(seed)
    result = {"part": part, "arm": arm, "seed": seed, "settings": args.settings, **PARTS[part](arm, seed, args)}
    result["cpu_seconds"] = time.process_time() - start
    path.with_suffix(".part").write_text(json.dumps(result))
    os.replace(path.with_suffix(".part"), path)
    print(f"{part} {arm} {seed}: nmse {result['nmse']:.3f}, active {result['active']:.2f}", flush=True)
    return result


# --- report -------------------------------------------------------------------------------------------------------


def spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values) if len(values) > 1 else 0:.3f}"


def interval(values: list[float]) -> str:
    """Mean of paired differences with the 95 % interval."""
    found = t_interval(values)
    mean = f"{statistics.mean(values):+.3f}"
    return mean if found is None else f"{mean} ({found[0]:+.3f} to {found[1]:+.3f})"


def kept(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """A result that is there already. Raises ValueError where it is of other settings."""
    found = json.loads(path.read_text())
    if found["settings"] != settings:
        raise ValueError(f"{path} is of {found['settings']}, not {settings}: choose another out")
    return found


def table(rows: list[list[str]]) -> str:
    """Markdown, of which the first row is the head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


Results = dict[str, dict[int, dict[str, Any]]]  # arm -> seed -> result


def against(results: Results, arm: str, other: str, value: Callable[[dict[str, Any]], float]) -> str:
    """The arm's value minus that of the other, over the seeds that both have."""
    seeds = results[arm].keys() & results.get(other, {}).keys()
    if arm == other or not seeds:
        return "-"
    return interval([value(results[arm][seed]) - value(results[other][seed]) for seed in sorted(seeds)])


def errors(part: str, results: Results) -> str:
    """Error, active experts, and the difference from the reference."""
    reference = REFERENCE[part]
    rows = [["router", "seeds", "nmse", "active", "idle experts", f"nmse against {reference}"]]
    for arm, by_seed in results.items():
        mine = list(by_seed.values())
        columns = [spread([run[name] for run in mine]) for name in ("nmse", "active")]
        idle = f"{statistics.mean(run['dead'] for run in mine):.1f}"
        rows.append([arm, str(len(mine)), *columns, idle, against(results, arm, reference, lambda run: run["nmse"])])
    return table(rows)


def difficulty(results: Results) -> str:
    """Active experts by how many teachers a row needs, for routers that can vary them."""
    rows = [["router", *(f"active where {n} add" for n in range(3)), "2 less 1 (interval)", "correlation"]]
    for arm, by_seed in results.items():
        mine = list(by_seed.values())
        if all(run["correlation"] is None for run in mine):
            continue
        by_needs = [spread([run["active_by_needs"][str(n)] for run in mine]) for n in range(3)]
        gap = interval([run["active_by_needs"]["2"] - run["active_by_needs"]["1"] for run in mine])
        rows.append([arm, *by_needs, gap, spread([run["correlation"] or 0.0 for run in mine])])
    return table(rows)


def error_at(share: float, run: dict[str, Any]) -> float:
    return run["curve"][str(share)]


def searches(results: Results) -> str:
    """The error along the training, and what search changes."""
    rows = [["start", *(f"nmse at {share:.0%}" for share in LOOKS)]]
    for arm, by_seed in results.items():
        rows.append([arm, *(spread([run["curve"][str(at)] for run in by_seed.values()]) for at in LOOKS)])
    for start in ("shuffled", "one_expert"):
        if f"{start}_search" in results:
            arms = (f"{start}_search", start)
            gaps = [against(results, *arms, partial(error_at, share)) for share in LOOKS]
            rows.append([f"{start}: search less none", *gaps])
    return table(rows)


def report(found: list[dict[str, Any]]) -> str:
    parts: dict[str, Results] = {}
    for run in found:
        parts.setdefault(run["part"], {}).setdefault(run["arm"], {})[run["seed"]] = run
    texts = []
    for part in ("domains", "memory"):
        if part in parts:
            texts.append(f"{part}\n\n{errors(part, parts[part])}")
    if "domains" in parts:
        texts.append(f"difficulty\n\n{difficulty(parts['domains'])}")
    if "search" in parts:
        texts.append(f"search\n\n{searches(parts['search'])}")
    return "\n\n".join(texts) + "\n"


def plot(found: list[dict[str, Any]], path: Path) -> None:
    """Error against active experts of the part "domains": a point a seed, a larger one for the mean."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for i, arm in enumerate(ARMS["domains"]):
        points = [(run["active"], run["nmse"]) for run in found if (run["part"], run["arm"]) == ("domains", arm)]
        if points:
            active, nmse = zip(*points, strict=True)
            axes.plot(active, nmse, ".", color=f"C{i}", alpha=0.4)
            axes.plot(statistics.mean(active), statistics.mean(nmse), "o", color=f"C{i}", markersize=9, label=arm)
    axes.set(xlabel="active experts per row", ylabel="nmse", ylim=(0, None))
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(args: Arguments) -> dict[str, Any]:
    found = list(runs(args))
    wanted = len(args.seeds) * sum(args.arms is None or arm in args.arms for part in args.parts for arm in ARMS[part])
    cpu_minutes = sum(run["cpu_seconds"] for run in found) / 60
    made = {"settings": args.settings, "runs": found, "missing": wanted - len(found), "cpu_minutes": cpu_minutes}
    out, text = Path(args.out), report(found)
    (out / "results.json").write_text(json.dumps(made, indent=1))
    (out / "table.md").write_text(text)
    if any(run["part"] == "domains" for run in found):
        plot(found, out / "routers.png")
    print(f"{text}\n{len(found)} of {wanted} runs, {cpu_minutes:.1f} CPU minutes")
    return made


if __name__ == "__main__":
    main(read_arguments(Arguments))
