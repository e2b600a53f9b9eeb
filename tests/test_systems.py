"""The page on the field's systems is true: what it names exists, and what it says of PEFT is what PEFT does."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import re
from pathlib import Path

import peft
import pytest
import torch
from peft import ArrowConfig, LoraConfig, PeftModel, XLoraConfig, create_arrow_model, get_peft_model
from safetensors.torch import load_file

from mixadapters import ROUTERS

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "systems.md").read_text(encoding="utf-8")
NAMED = (
    "MixDA", "PILL", "MoSA", "AGD", "EvoMoE", "Is temperature", "COMET", "AdaMoE", "Dynamic routing", "RMoE",
    "DeepSeekMoE", "Tutel", "Mowst", "Low-cost customisation", "Robust question answering", "MC-SMoE", "UNCURL",
    "QMoE", "MoTE", "Statistical view", "Meta-DMoE", "SCMoE", "Read-ME", "UoE", "Composition of experts",
    "DeepSpeed-MoE", "AdvMoE", "SE-MoE", "Hecate", "MoE²", "A survey", "MGVGA", "Travel plans",
)  # fmt: skip


def rows(after: str = "") -> list[list[str]]:
    """The cells of the rows of the page's tables, without their heads, from a heading on."""
    lines = PAGE.partition(after)[2].splitlines() if after else PAGE.partition("## Beside")[0].splitlines()
    tables = [line for line in lines if line.startswith("| ") and not line.startswith(("| system |", "| |"))]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in tables]


SYSTEMS = rows()


@pytest.fixture(scope="module")
def public() -> dict[str, object]:
    """Every name that the pages of the API show."""
    spec = importlib.util.spec_from_file_location("reference", ROOT / "docs" / "site" / "reference.py")
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    found = {}
    for _, modules in reference.API.values():
        for module, _, name in (shown.rpartition(".") for shown in reference.names_of(modules)):
            found[name] = getattr(importlib.import_module(module), name)
    return found


@pytest.mark.parametrize("system", NAMED)
def test_every_system_has_one_row(system) -> None:
    assert len([row for row in SYSTEMS if row[0].startswith(system)]) == 1


@pytest.mark.parametrize("row", SYSTEMS, ids=[row[0].split(":")[0].split(",")[0] for row in SYSTEMS])
def test_what_a_row_names_exists(row, public) -> None:
    here = row[1]
    names = re.findall(r"`([^`]+)`", here)
    assert bool(names) != ("not here" in here), here
    for name in names:
        if router := re.fullmatch(r'router="(\w+)"', name):
            assert router[1] in ROUTERS
        elif command := re.fullmatch(r"python -m ([\w.]+)(?: (\w+))?", name):
            main = importlib.util.find_spec(f"{command[1]}.__main__")
            assert main is not None, name
            assert (command[2] or "") in Path(main.origin).read_text(encoding="utf-8")
        elif name.endswith(".py"):
            assert (ROOT / name).is_file(), name
        else:
            owner, _, member = name.partition(".")
            assert owner in public, name
            fields = (
                {f.name for f in dataclasses.fields(public[owner])} if dataclasses.is_dataclass(public[owner]) else ()
            )
            assert not member or hasattr(public[owner], member) or member in fields, name


def test_a_row_that_is_here_says_what_differs_or_what_was_seen() -> None:
    assert not [row[0] for row in SYSTEMS if "`" in row[1] and not row[3]]


# --- what the page says of PEFT -----------------------------------------------------------------------------------


def test_the_page_is_of_the_version_that_is_pinned() -> None:
    (pinned,) = re.findall(r"^peft==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert f"PEFT {pinned}" in PAGE


@pytest.fixture(scope="module")
def folders(tiny, tmp_path_factory) -> dict[str, str]:
    """LoRA of rank 4, another, and one of rank 8."""
    root = tmp_path_factory.mktemp("lora")
    for seed, (name, rank) in enumerate({"a": 4, "b": 4, "wide": 8}.items()):
        torch.manual_seed(seed)
        config = LoraConfig(r=rank, target_modules=["q_proj"], init_lora_weights=False)
        get_peft_model(tiny("llama"), config).save_pretrained(root / name)
    return {path.name: str(path) for path in root.iterdir()}


@pytest.fixture
def xlora(tiny, folders):
    base = tiny("llama")
    base.config.use_cache = False
    experts = {"0": folders["a"], "1": folders["wide"]}
    return get_peft_model(base, XLoraConfig(hidden_size=32, adapters=experts, task_type="CAUSAL_LM")).eval()


def test_peft_has_no_bottleneck_of_its_own() -> None:
    tuners = [path.name for path in (Path(peft.__file__).parent / "tuners").iterdir()]
    assert "lora" in tuners
    assert not [name for name in tuners if "bottleneck" in name or name in ("adapter", "houlsby", "pfeiffer")]


def test_arrow_refuses_other_ranks_and_its_folder_does_not_load_alone(tiny, folders, tiny_inputs, tmp_path) -> None:
    arrow = ArrowConfig(top_k=2)
    model = create_arrow_model(tiny("llama"), [folders["a"], folders["b"]], arrow)
    model.save_pretrained(tmp_path)
    inputs = tiny_inputs("llama")
    with pytest.raises(AttributeError):
        PeftModel.from_pretrained(tiny("llama"), tmp_path / "arrow_router")(**inputs)
    with pytest.raises(ValueError, match="rank mismatch"):
        create_arrow_model(tiny("llama"), [folders["a"], folders["wide"]], arrow)(**inputs)


def test_xlora_refuses_a_cache(tiny, folders) -> None:
    config = XLoraConfig(hidden_size=32, adapters={"0": folders["a"]}, task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="use_cache"):
        get_peft_model(tiny("llama"), config)


def test_xlora_runs_the_base_twice_and_passes_over_the_names_of_rows(xlora, tiny_inputs) -> None:
    inputs, calls = tiny_inputs("llama"), []
    xlora.base_model.lora_model.model.model.register_forward_hook(lambda *_: calls.append(1))
    expected = xlora(**inputs).logits
    assert len(calls) == 2
    assert torch.equal(xlora(**inputs, adapter_names=["1", "0"]).logits, expected)


def test_xlora_saves_experts_without_the_layers_of_the_others_numbers(xlora, tmp_path) -> None:
    xlora.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "0" / "adapter_model.safetensors")
    layers = {key.split("layers.")[1][0] for key in saved if "self_attn.q_proj.lora_A" in key}
    assert layers == {"0", "2", "3"}


def test_lora_takes_names_of_rows_but_not_in_training(tiny, tiny_inputs) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(tiny("llama"), config, adapter_name="a").eval()
    model.add_adapter("b", config)
    inputs = tiny_inputs("llama")
    model(**inputs, adapter_names=["a", "b"])
    with pytest.raises(ValueError, match="training mode"):
        model.train()(**inputs, adapter_names=["a", "b"])
