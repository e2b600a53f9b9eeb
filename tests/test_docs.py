"""The documentation is true: its code runs, its tables name every field, its links, targets and files exist."""

from __future__ import annotations

import ast
import inspect
import json
import re
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

import peft.mapping
import pytest
import torch
import transformers
from peft import PeftConfig, get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mixadapters import (
    ROUTERS,
    AGDConfig,
    BottleneckConfig,
    MixDAConfig,
    MixtureModel,
    MoAConfig,
    MoSAConfig,
    PILLConfig,
    Router,
)
from mixadapters.core.adapter import Adapter
from mixadapters.core.config import MixtureConfig
from mixadapters.core.context import Objective
from mixadapters.core.routing import Routing
from mixadapters.kernels import lowrank

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    str(p.relative_to(ROOT)): p.read_text(encoding="utf-8")
    for p in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "kernels" / "README.md"]
}
FENCE = re.compile(r"^```(\w*) ?([\w-]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = {
    page: [(kind, note, code) for kind, note, code in FENCE.findall(text) if kind] for page, text in PAGES.items()
}
# Pages whose code runs; these have tests of their own.
RUN = [
    page
    for page in PAGES
    if page not in ("README.md", "docs/architecture.md", "docs/two-stages.md")
    and any(kind == "python" and note != "no-run" for kind, note, _ in BLOCKS[page])
]

# What the pages load by name -> kind of tiny model, its configuration, its first tokens.
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<mask>")
NAMES: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "FacebookAI/roberta-base": ("roberta", {"num_hidden_layers": 12}, ("<s>", "<pad>", "</s>", "<unk>", "<mask>")),
    "sentence-transformers/all-MiniLM-L6-v2": ("bert", {"num_hidden_layers": 6}, SPECIAL),
    "Qwen/Qwen3-0.6B": ("qwen3", {}, SPECIAL),
}
HEADS = {
    "AutoModel": "base",
    "AutoModelForCausalLM": "causal_lm",
    "AutoModelForMaskedLM": "masked_lm",
    "AutoModelForSequenceClassification": "sequence_classification",
}
# What the pages take as given.
GIVEN = {
    "biomed": [f"the cell number {i} grows" for i in range(9)],
    "reviews": [f"the film number {i} is dull" for i in range(9)],
    "general": [f"there are {i} rivers" for i in range(12)],
    "labelled": [(f"the cell number {i} grows", i % 2) for i in range(8)],
}
GIVEN |= {"law": GIVEN["biomed"], "code": GIVEN["general"], "films": GIVEN["reviews"]}


def tiny_tokenizer(first: tuple[str, ...], **options: Any) -> PreTrainedTokenizerFast:
    texts = [GIVEN[name] for name in ("biomed", "reviews", "general", "labelled")]
    words = sorted({w for texts in texts for t in texts for w in (t if isinstance(t, str) else t[0]).split()})
    vocabulary = {token: i for i, token in enumerate([*first, *words])}
    assert len(vocabulary) <= 96
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {f"{token}_token": name for token, name in zip(("pad", "bos", "eos", "unk", "mask"), SPECIAL, strict=True)}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=32, **names, **options)


@pytest.fixture
def offline(tiny, tmp_path, monkeypatch) -> Iterator[None]:
    """`from_pretrained` makes tiny random models, in an empty folder; what a page registers is forgotten."""

    def load(cls: Any, name: str, **options: Any) -> Any:
        kind, config, _ = NAMES[name]
        model = tiny(kind, HEADS[cls.__name__], **config, **options)
        model.name_or_path = model.config._name_or_path = name
        return model

    for auto in HEADS:
        monkeypatch.setattr(getattr(transformers, auto), "from_pretrained", classmethod(load))
    monkeypatch.setattr(
        transformers.AutoTokenizer,
        "from_pretrained",
        lambda name, **options: tiny_tokenizer(NAMES[name][2], **options),
    )
    # A random head is refused in earnest.
    monkeypatch.setattr("mixadapters.training.callbacks.require_pretrained_head", lambda model, batch: 0.0)
    for table in ("CONFIG", "TUNER", "PREFIX"):
        whole = getattr(peft.mapping, f"PEFT_TYPE_TO_{table}_MAPPING")
        for name in ("TOPK",):
            monkeypatch.setitem(whole, name, None)
            del whole[name]
    monkeypatch.chdir(tmp_path)
    for folder in ("runs/law", "runs/code", "runs/chat", "runs/all", "user/chat"):
        lora = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        model = peft.get_peft_model(load(transformers.AutoModelForCausalLM, "Qwen/Qwen3-0.6B"), lora)
        model.save_pretrained(folder)
    save_as_moe_peft(Path("user/chat"), Path("runs/mola"))
    with ROUTERS.temporarily():
        yield


def save_as_moe_peft(lora: Path, folder: Path) -> None:
    """Two experts in one file, as MoE-PEFT writes them."""
    folder.mkdir()
    weights = load_file(lora / "adapter_model.safetensors")
    saved = {"mola.layers.0.self_attn.q_proj.moe_gate.weight": torch.zeros(2, 32)}
    for expert in range(2):
        for key, tensor in weights.items():
            path, _, part = key.removeprefix("base_model.model.model.").partition(".lora_")
            saved[f"mola.{path}.experts.{expert}.lora_{part}"] = torch.nn.Parameter(tensor * (expert + 1))
    torch.save(saved, folder / "adapter_model.bin")
    config = {"peft_type": "MOLA", "num_experts": 2, "top_k": 2, "r": 2, "lora_alpha": 8, "lora_dropout": 0.0,
              "bias": "none", "target_modules": ["q_proj"], "base_model_name_or_path": "Qwen/Qwen3-0.6B"}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


def run_page(page: str) -> dict[str, Any]:
    """Execute the code blocks of a page in order; returns the names that they define."""
    names: dict[str, Any] = {"__name__": "__main__", **GIVEN}
    text = PAGES[page]
    for found in FENCE.finditer(text):
        kind, note, code = found.groups()
        if kind == "python" and note != "no-run":
            # Line numbers of the page in tracebacks.
            lines = text[: found.start(3)].count("\n")
            exec(compile("\n" * lines + code, str(ROOT / page), "exec", dont_inherit=True), names)
    return names


@pytest.mark.parametrize("page", RUN)
def test_code_runs(page, offline) -> None:
    run_page(page)


def test_code_of_the_readme_ends_in_what_it_promises(offline, tmp_path) -> None:
    names = run_page("README.md")
    for folder in ("biomed", "reviews", "mixture"):
        assert (tmp_path / "runs" / folder / "adapter_model.safetensors").is_file()
    assert names["tuner"].expert_ids(["films", "biomed"]).tolist() == [1, 0]
    run_alone("README.md", "import mixadapters  #")


def test_surgery_prints_what_its_page_says(offline, capsys) -> None:
    _, _, code = BLOCKS["docs/surgery.md"][0]
    exec(compile(code, "docs/surgery.md", "exec", dont_inherit=True), {"__name__": "__main__"})
    first = capsys.readouterr().out.splitlines()[0]
    assert f"\n    {first}\n" in PAGES["docs/surgery.md"]


def test_code_of_the_two_stages_ends_in_what_it_promises(offline, tmp_path) -> None:
    names = run_page("docs/two-stages.md")
    for folder in ("biomed", "reviews", "abstracts"):
        assert (tmp_path / "runs" / folder / "adapter_model.safetensors").is_file()
    assert list(names["model"].peft_config["default"].domains) == ["law", "code"]
    run_alone("docs/two-stages.md", "import mixadapters  #", "causal_prefix")


def run_alone(page: str, *marks: str) -> None:
    """Another process has no name of the training's, nor has a reader who begins further down."""
    alone = [code for _, _, code in BLOCKS[page] if any(mark in code for mark in marks)]
    assert len(alone) == len(marks)
    for code in alone:
        exec(compile(code, page, "exec", dont_inherit=True), {"__name__": "__main__"})


def test_documented_router_method_and_objective_work(offline, tiny, tiny_inputs) -> None:
    names = run_page("docs/architecture.md")
    inputs = tiny_inputs("bert", padding="right")
    base = tiny("bert")
    expected = base(**inputs).logits
    model = get_peft_model(base, names["TopKConfig"]())
    assert torch.equal(model(**inputs).logits, expected)
    context = model.base_model.context
    context.objectives += names["objectives"]
    model.train()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert float(context.loss_log["logit_size"][0]) > 0
    trained = {name.split(".")[-2] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert "up" in trained


@pytest.mark.parametrize("page", PAGES)
def test_code_that_is_not_run_is_python(page) -> None:
    for kind, note, code in BLOCKS[page]:
        assert kind == "python", f"{page}: a block of {kind!r}"
        assert note in ("", "no-run"), f"{page}: {note!r}"
        compile(code, page, "exec")


def parameters(of: Any) -> list[str]:
    return [name for name in inspect.signature(of).parameters if name != "self"]


def test_documented_seams_have_the_signatures_of_the_code() -> None:
    owners = {c.__name__: c for c in (Adapter, Routing, Router, MixtureModel, Objective)}
    checked = set()
    for _, note, code in BLOCKS["docs/architecture.md"]:
        if note != "no-run":
            continue
        for node in ast.parse(code).body:
            if isinstance(node, ast.FunctionDef):
                assert node.name == "lowrank"
                given = [a.arg for a in (*node.args.args, *node.args.kwonlyargs)]
                assert given == parameters(lowrank)
                checked.add("lowrank")
            elif isinstance(node, ast.ClassDef):
                owner = owners[node.name]
                for member in node.body:
                    if isinstance(member, ast.FunctionDef):
                        given = [a.arg for a in (*member.args.args, *member.args.kwonlyargs) if a.arg != "self"]
                        assert given == parameters(getattr(owner, member.name)), f"{node.name}.{member.name}"
                    else:
                        target = member.target if isinstance(member, ast.AnnAssign) else member.targets[0]
                        said = hasattr(owner, target.id) or target.id in owner.__annotations__
                        assert said, f"{node.name}.{target.id}"
                checked.add(node.name)
    assert checked == {*owners, "lowrank"}


# --- tables of fields ---------------------------------------------------------------------------------------------


def table_of_fields(page: str) -> dict[str, Any]:
    """{field: default} of the page's table with the columns field and default."""
    _, _, rest = PAGES[page].partition("| field | default |")
    rows = {}
    for line in rest.splitlines()[2:]:
        if not line.startswith("|"):
            break
        name, default = (cell.strip().strip("`") for cell in line.split("|")[1:3])
        rows[name] = ast.literal_eval(default)
    return rows


def own_fields(cls: type, base: type) -> Iterator[Field]:
    inherited = {f.name for f in fields(base)}
    return (f for f in fields(cls) if f.name not in inherited)


@pytest.mark.parametrize(
    ("page", "cls", "base"),
    [
        ("docs/bottleneck.md", BottleneckConfig, MixtureConfig),
        ("docs/mixda.md", MixDAConfig, MixtureConfig),
        ("docs/moa.md", MoAConfig, MixtureConfig),
        ("docs/mosa.md", MoSAConfig, MixtureConfig),
        ("docs/pill.md", PILLConfig, MixtureConfig),
        ("docs/agd.md", AGDConfig, MixtureConfig),
        ("docs/using-with-peft.md", MixtureConfig, PeftConfig),
    ],
)
def test_every_field_is_documented_with_its_default(page, cls, base) -> None:
    expected = {
        f.name: f.default_factory() if f.default_factory is not MISSING else f.default for f in own_fields(cls, base)
    }
    assert table_of_fields(page) == expected


# --- links, targets, files ----------------------------------------------------------------------------------------


def prose(page: str) -> str:
    return FENCE.sub("", PAGES[page])


def anchors(page: str) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    titles = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_local_links_resolve(page) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page}: {target}"
        if anchor:
            assert anchor in anchors(str(file.resolve().relative_to(ROOT))), f"{page}: {target}"


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_exist(page) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = re.findall(r"(?:`|^ {4})make ([a-z-]+)", PAGES[page], re.MULTILINE)
    assert set(named) <= targets


@pytest.mark.parametrize("page", PAGES)
def test_named_files_and_tests_exist(page) -> None:
    tests = "\n".join(p.read_text(encoding="utf-8") for p in ROOT.glob("tests/**/*.py") if p != Path(__file__))
    for name in re.findall(r"`([\w./-]+)`", prose(page)):
        if name.startswith("test_"):
            assert re.search(rf"def {name}(?![0-9])", tests), f"{page}: {name}"
        elif name.endswith((".py", ".cfg", ".txt")) and "<" not in name and "/" in name:
            places = (ROOT / name, ROOT / "mixadapters" / name)
            assert any(place.exists() for place in places), f"{page}: {name}"


def test_architecture_says_what_each_file_of_core_is_for() -> None:
    _, _, table = PAGES["docs/architecture.md"].partition("### The files of core")
    rows = table.partition("\n## ")[0].splitlines()
    named = [
        name for row in rows if row.startswith("|") for name in re.findall(r"`(core/\w+\.py)`", row.split("|")[1])
    ]
    files = (ROOT / "mixadapters" / "core").glob("*.py")
    files = {f"core/{file.name}": file.read_text(encoding="utf-8") for file in files if file.name != "__init__.py"}
    assert sorted(named) == sorted(files)
    marked = {name for row in rows if row.endswith("(PEFT) |") for name in re.findall(r"`(core/\w+\.py)`", row)}
    assert marked == {
        name for name, text in files.items() if re.search(r"^ *(from|import) peft\b", text, re.MULTILINE)
    }


COMMANDS = sorted(
    {
        (page, example, argument)
        for page, text in PAGES.items()
        for example, command in re.findall(r"python examples/([\w/]+)\.py (.*)", text.replace("\\\n", " "))
        for argument in re.findall(r"--(\w+)", command)
    }
)


@pytest.mark.parametrize(
    "example", ["demo", "studies/sentences", "studies/choosing", "studies/mosa_vision", "studies/pill_vqa"]
)
def test_commands_pass_arguments_that_the_example_takes(example) -> None:
    file = {"demo": "demo_arguments"}.get(example, example)
    tree = ast.parse((ROOT / "examples" / f"{file}.py").read_text(encoding="utf-8"))
    (arguments,) = (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Arguments")
    known = {n.target.id for n in arguments.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    passed = [(page, argument) for page, of, argument in COMMANDS if of == example]
    assert passed
    assert not [(page, argument) for page, argument in passed if argument not in known]


def test_the_readme_lists_every_method() -> None:
    for name in ("Bottleneck", "MixDA", "MoA", "PILL", "MoSA", "AGD"):
        assert re.search(rf"^\| \[{name}\]\(docs/{name.lower()}\.md\) \|", PAGES["README.md"], re.MULTILINE), name


@pytest.mark.parametrize("page", PAGES)
def test_tables_have_a_head_for_every_column(page) -> None:
    lines = prose(page).splitlines()
    for head, rule, row in zip(lines, lines[1:], lines[2:], strict=False):
        if re.fullmatch(r"\|(?: ?:?-+:? ?\|)+", rule):
            titles = head.strip().strip("|").split("|")
            assert all(title.strip() for title in titles[1:]), f"{page}: {head}"
            assert len(re.findall(r"(?<!\\)\|", row)) == len(titles) + 1, f"{page}: {row}"
