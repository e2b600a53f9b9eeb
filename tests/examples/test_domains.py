"""The study of domains, on tiny sizes and tiny text."""

from __future__ import annotations

import importlib
import json
import math
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
WORDS = {"general": "river stone wind", "law": "shall hereby grant", "code": "def & return", "cells": "cell gene acid"}
CELLS = ["base", "own", "counts", "joint", "added", "removed", "lm_prefix", "shared", "posterior"]
SIZES: dict[str, Any] = {
    "tokens": 600, "dev_tokens": 60, "test_tokens": 100, "base_tokens": 800, "length": 20, "vocabulary": 300,
    "width": 32, "layers": 1, "rank": 2, "batch": 16, "base_rate": 1e-2,
}  # fmt: skip


def plain(
    model: Any, rows: Any, progress: Any, *, rate: float, epochs: float, batch: int, out: str, seed: int, **fields: int
) -> None:
    """A training without transformers' Trainer, which takes a second to begin; the test of the demo has that."""
    given = {name: torch.full((len(rows),), value) for name, value in fields.items()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], rate)
    for _ in range(round(12 * epochs)):
        optimizer.zero_grad()
        model(input_ids=rows, attention_mask=torch.ones_like(rows), labels=rows, **given).loss.backward()
        optimizer.step()
    model.eval()


@pytest.fixture(scope="module")
def study() -> Any:
    sys.path.insert(0, str(ROOT / "examples" / "studies"))
    try:
        module: Any = importlib.import_module("domains")
        module.train = plain
        yield module
    finally:
        sys.path.remove(str(ROOT / "examples" / "studies"))
        sys.path.remove(str(ROOT / "examples"))


@pytest.fixture(scope="module")
def given(study, tmp_path_factory) -> dict[str, Any]:
    """The arguments of a small run, on files of two domains, a later one and general text."""
    folder = tmp_path_factory.mktemp("domains")
    for kind, words in WORDS.items():
        draw = random.Random(kind)
        texts = [" ".join(draw.choices(words.split(), k=30)) + f" {i}" for i in range(40)]
        (folder / f"{kind}.txt").write_text("\n\n".join(texts), encoding="utf-8")
    few = {"expert": (5e-3, 1e-2), "temperature": (3.0,), "joint": (1e-2,), "twice": "joint", "shared": "expert",
           "gate": (1e-2,), "phatgoose": (1e-2,), "xlora": (1e-2,)}  # fmt: skip
    study.CHOICES.update(dict.fromkeys(study.KINDS, few))
    files = {kind: f"{kind}={folder}/{kind}.txt" for kind in WORDS}
    return {
        "out": str(folder / "out"), "domains": [files["law"], files["code"]], "later": files["cells"],
        "general": str(folder / "general.txt"), "seeds": [0], "cells": CELLS, **SIZES,
    }  # fmt: skip


@pytest.fixture(scope="module")
def made(study, given) -> dict[str, Any]:
    return study.main(study.Arguments(**given))


@pytest.mark.slow
def test_every_cell_of_both_kinds_is_run_and_told(made, given) -> None:
    assert made["missing"] == 0
    assert len(made["runs"]) == 2 * len(CELLS)
    runs = {(run["kind"], run["cell"]): run for run in made["runs"]}
    for kind in ("lora", "bottleneck"):
        own, base = runs[kind, "own"]["perplexity"], runs[kind, "base"]["perplexity"]
        assert all(own[name] < base[name] for name in ("law", "code", "cells"))
        assert own["general"] == base["general"]
        assert runs[kind, "added"]["perplexity"]["cells"] < runs[kind, "counts"]["perplexity"]["cells"]
        assert runs[kind, "removed"]["perplexity"]["code"] > runs[kind, "added"]["perplexity"]["code"]
        assert runs[kind, "lm_prefix"]["tokens"] == 3 * 600
        assert runs[kind, "base"]["tokens"] == 0
        assert runs[kind, "posterior"]["parameters"] == runs[kind, "counts"]["parameters"]
        assert math.isclose(runs[kind, "counts"]["parameters"], runs[kind, "joint"]["parameters"], rel_tol=0.1)
    assert set(made["choices"]["lora"]["tried"]["expert"]) == {"0.005", "0.01"}
    table = (Path(given["out"]) / "table.md").read_text(encoding="utf-8")
    assert "| lora | seeds | law | code | cells | general |" in table
    assert "| bottleneck | a domain that goes leaves the others alone |" in table
    assert json.loads((Path(given["out"]) / "results.json").read_text())["runs"] == made["runs"]


@pytest.mark.slow
def test_what_may_do_more(made, given, study) -> None:
    more = study.main(study.Arguments(**{**given, "kinds": ["lora"], "cells": ["counts", "shared", *study.MORE]}))
    runs = {run["cell"]: run for run in more["runs"]}
    counts, shared = runs["counts"], runs["shared"]
    assert [runs[cell]["tokens"] for cell in ("shared", "shared_half", "shared_quarter")] == [
        1800,
        900,
        460,
    ]  # in rows
    assert runs["shared_first"]["parameters"] == shared["parameters"] > counts["parameters"]
    assert runs["counts_twice"]["parameters"] == 1.5 * counts["parameters"]  # as joint_twice: rank 3 of two domains
    assert runs["counts_twice"]["tokens"] == 1200
    assert runs["shared_first_wide"]["parameters"] == 3 * counts["parameters"] / 2 + counts["parameters"] / 2
    assert runs["shared_first"]["tokens"] == shared["tokens"]
    added, removed = runs["added_first_wide"]["perplexity"], runs["removed_first_wide"]["perplexity"]
    assert added["cells"] < runs["shared_first_wide"]["perplexity"]["cells"]
    assert removed["code"] > added["code"]
    assert runs["added_first_wide"]["tokens"] == shared["tokens"] + 600
    assert all(runs["shared_first"]["perplexity"][name] < counts["perplexity"][name] for name in ("law", "code"))
    few, whole = runs["counts_few"]["perplexity"], counts["perplexity"]
    assert runs["product"]["perplexity"] != whole != few  # 24 of 30 rows
    assert all(few[name] == pytest.approx(whole[name], rel=0.05) for name in ("law", "code", "general"))


@pytest.mark.slow
def test_how_others_route_the_same_adapters(made, given, study, monkeypatch) -> None:
    trained = []

    def noted(model: Any, rows: Any, *others: Any, **options: Any) -> None:
        plain(model, rows, *others, **options)
        names = {name for name, p in model.named_parameters() if p.requires_grad}
        parts = {part for part in (".router.", ".internal_xlora_classifier.") if all(part in name for name in names)}
        trained.append((len(rows), options.get("expert_ids"), parts))

    monkeypatch.setattr(study, "train", noted)
    cells = ["uniform", *study.OTHERS]
    found = study.main(study.Arguments(**{**given, "kinds": ["lora"], "cells": cells}))
    chosen, trained = trained[:-3], trained[-3:]
    assert trained[:2] == [(30, 0, {".router."}), (30, 1, {".router."})]  # each vector on text of its domain
    assert trained[2] == (90, None, {".internal_xlora_classifier."})
    assert len(chosen) == 3  # the same of the seed that rates are chosen with
    runs = {run["cell"]: run for run in found["runs"]}
    assert [runs[cell]["tokens"] for cell in cells] == [0, 0, 0, 1200, 1800]
    assert len({run["parameters"] for run in found["runs"]}) == 1  # those of the domains' adapters
    assert len({run["perplexity"]["law"] for run in found["runs"]}) == len(cells)  # each routes in a way of its own


def test_experts_that_read_twice_have_the_rate_of_two_readings(study, given, monkeypatch) -> None:
    trial, asked = study.Trial(study.Arguments(**given), None, "lora", 0, {}), []
    monkeypatch.setattr(trial, "adapter", lambda name, kinds, what, epochs: asked.append((what, epochs)))
    trial.expert("law")
    trial.readings = 2
    trial.expert("law")
    assert asked == [("expert", 1), ("twice", 2)]


def test_a_product_of_gates_is_that_of_their_probabilities(study) -> None:
    from mixadapters.core.routing import Routing

    decided = Routing(weights=torch.tensor([[0.5, 0.2]]), probs=torch.tensor([[0.5, 0.2, 0.3]]))
    found = study.times(torch.tensor([[0.1, 0.5, 0.4]]), 2, decided)
    assert torch.allclose(found.probs, torch.tensor([[0.05, 0.10, 0.12]]) / 0.27)
    assert torch.equal(found.weights, found.probs[:, :2])


@pytest.mark.slow
def test_what_is_there_is_not_run_again_and_other_settings_are_refused(made, given, study, monkeypatch) -> None:
    monkeypatch.setattr(study, "one", None)
    assert study.main(study.Arguments(**given))["runs"] == made["runs"]
    with pytest.raises(ValueError, match=r"'batch': 16.*choose another out"):
        study.main(study.Arguments(**{**given, "batch": 8}))


@pytest.mark.slow
def test_what_has_no_time_is_missing_and_its_claims_are_not_run(made, given, study, tmp_path) -> None:
    found = study.main(study.Arguments(**{**given, "out": str(tmp_path), "cpu_minutes": 0.0}))
    assert (found["runs"], found["missing"]) == ([], 2 * len(CELLS))
    by = {(claim["kind"], claim["claim"]): claim for claim in made["claims"]}
    assert by["lora", "counts before features"]["as_expected"] == "not run"
    assert by["lora", "it leaves general text alone"]["as_expected"] != "not run"


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"cells": ["nonesuch"]}, "cells="),
        ({"cells": ["more"]}, "shared adapters first need --kinds lora"),
        ({"cells": ["arrow"]}, "'arrow'.* need --kinds lora"),
        ({"size": "huge"}, "size='huge' is unknown; choose from"),
        ({"rates": ["expert=0"]}, "expert=0.0 must be one of .* above 0"),
        ({"rates": ["nonesuch=1"]}, "nonesuch=1.0 must be one of"),
        ({"rates": ["expert"]}, "must be what=value, such as"),
        ({"seeds": [100]}, "seed that rates are chosen with"),
        ({"later": None}, "--later is missing"),
        ({"tokens": 60_000}, "there are only"),
    ],
)
def test_wrong_arguments_are_refused(given, study, wrong, match) -> None:
    with pytest.raises(ValueError, match=match):
        study.main(study.Arguments(**{**given, **wrong}))


def test_a_size_fills_in_what_is_not_given_and_rates_may_be_given(study, given, tmp_path) -> None:
    large = study.Arguments(size="large", base_tokens=5, cells=["main"])
    assert (large.tokens, large.base_tokens, large.cells) == (300_000, 5, list(study.MAIN))
    assert study.Arguments().choices("lora") == study.CHOICES["lora"] != large.choices("lora")
    assert "rates" not in study.Arguments().settings  # results that are there stay those of their settings
    rates = [f"{what}=0.5" for what in study.CHOICES["lora"]]
    args = study.Arguments(**{**given, "out": str(tmp_path), "rates": rates})
    assert set(study.choose(args, study.Texts(args), "lora").values()) == {0.5}


@pytest.mark.parametrize(
    ("gaps", "expected", "verdict"),
    [
        ([], (-1, 1), "not run"),
        ([-2.0, -2.1, -1.9], (-math.inf, 0), "yes"),
        ([-2.0, 1.0, -1.0], (-math.inf, 0), "in the mean"),  # the interval holds 0
        ([-2.0], (-math.inf, 0), "in the mean"),  # one seed tells nothing of others
        ([2.0, 2.1, 1.9], (-math.inf, 0), "no"),
        ([0.5, 0.6, 0.4], (1, math.inf), "no"),
    ],
)
def test_a_claim_holds_where_its_whole_interval_does(study, gaps, expected, verdict) -> None:
    claims = importlib.import_module("domains_claims")
    found = claims.judged("lora", claims.Claim("text", "one", "other", "all", expected), gaps)
    assert found["as_expected"] == verdict


def test_differences_are_paired_by_seed_and_in_per_cent(study) -> None:
    claims = importlib.import_module("domains_claims")

    def run(cell: str, seed: int, scale: float) -> dict[str, Any]:
        perplexity = {"a": 2 * scale, "b": 8 * scale, "later": 5.0, "general": 7.0}
        return {"kind": "lora", "cell": cell, "seed": seed, "perplexity": perplexity}

    runs = [
        run("counts", 0, 1.1),
        run("counts", 1, 2.4),
        run("joint", 1, 2.0),
        run("joint", 0, 1.0),
        run("joint", 2, 9),
    ]
    results = claims.Results(runs, ["a", "b"], "later", "b")
    claim = claims.Claim("text", "counts", "joint", "domains", (0, 1))
    gaps = results.differences(claim, results.by["lora"]["counts"], results.by["lora"]["joint"])
    assert gaps == pytest.approx([10.0, 20.0])
