"""A saved adapter in a process that knows nothing of the one that made it; and the model card that says how."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel, get_peft_model
from processes import Process
from transformers import AutoModelForCausalLM

import mixadapters
from mixadapters import BottleneckConfig, MixDAConfig, MoAConfig

CONFIGS = {
    "bottleneck": lambda: BottleneckConfig(r=4, init_weights=False, task_type="CAUSAL_LM"),
    "mixda": lambda: MixDAConfig(domains=["a", "b"], r=4, init_weights=False, task_type="CAUSAL_LM"),
    "moa": lambda: MoAConfig(num_experts=4, r=4, router_scope="block", init_weights=False, task_type="CAUSAL_LM"),
}
HEADER = """
import json, sys, warnings
warnings.simplefilter("ignore")
import peft
out, base, adapters = sys.argv[1], sys.argv[2], dict(zip(sys.argv[3::2], sys.argv[4::2]))
"""
LOADS = """
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, logging
logging.set_verbosity_error()
loads = {
    "PeftConfig": lambda p: PeftConfig.from_pretrained(p),
    "PeftModel": lambda p: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), p),
    "AutoPeftModelForCausalLM": lambda p: AutoPeftModelForCausalLM.from_pretrained(p),
    "AutoModelForCausalLM": lambda p: AutoModelForCausalLM.from_pretrained(p),
}
said, logits = {}, {}
for kind, path in adapters.items():
    for name, load in loads.items():
        try:
            made = load(path)
            said[f"{kind}/{name}"] = "loaded"
            if name != "PeftConfig":
                with torch.no_grad():
                    logits[f"{kind}/{name}"] = made.eval()(torch.arange(5, 12)[None]).logits
        except Exception as error:
            said[f"{kind}/{name}"] = f"{type(error).__name__}: {error}"
"""
FOOTER = """
from safetensors.torch import save_file
save_file({k: v.contiguous() for k, v in logits.items()}, out + ".safetensors")
json.dump(said, open(out + ".json", "w"))
"""


@pytest.fixture(scope="module")
def saved(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("saved")
    base = folder / "base"
    tiny("llama").save_pretrained(base)
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n\n# base\n", encoding="utf-8")
    logits = {}
    for kind, config in CONFIGS.items():
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config()).eval()
        with torch.no_grad():
            logits[kind] = model(torch.arange(5, 12)[None]).logits
        model.save_pretrained(folder / kind)
    return {"folder": folder, "base": base, "logits": logits, **{kind: folder / kind for kind in CONFIGS}}


def run(script: str, saved: dict[str, Any], name: str) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    from safetensors.torch import load_file

    out = saved["folder"] / name
    adapters = [str(x) for kind in CONFIGS for x in (kind, saved[kind])]
    arguments = [str(out), str(saved["base"]), *adapters]
    Process(script, arguments, saved["folder"]).finish()
    return json.loads(out.with_suffix(".json").read_text()), load_file(out.with_suffix(".safetensors"))


def code_of(card: Path) -> str:
    return re.search(r"```python\n(.*?)```", card.read_text(encoding="utf-8"), re.DOTALL).group(1)


@pytest.fixture(scope="module")
def with_import(saved: dict[str, Any]) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """What a process says that imports peft, mixadapters, then loads everything, and follows the cards."""
    cards = ""
    for kind in CONFIGS:
        code = code_of(saved[kind] / "README.md").replace("path or hub id of this adapter", str(saved[kind]))
        cards += code + f'logits["{kind}/card"] = model.eval()(torch.arange(5, 12)[None]).logits.detach()\n'
    return run(HEADER + "import mixadapters\n" + LOADS + cards + FOOTER, saved, "with")


def test_without_the_import_peft_does_not_know_the_type(saved: dict[str, Any]) -> None:
    said, _ = run(HEADER + LOADS + FOOTER, saved, "without")
    for kind in CONFIGS:
        for name in ("PeftConfig", "PeftModel", "AutoPeftModelForCausalLM", "AutoModelForCausalLM"):
            assert said[f"{kind}/{name}"] == f"KeyError: '{kind.upper()}'"


def test_with_the_import_every_way_of_loading_gives_equal_predictions(saved: Any, with_import: Any) -> None:
    said, logits = with_import
    for kind in CONFIGS:
        assert said[f"{kind}/PeftConfig"] == "loaded"
        for name in ("PeftModel", "AutoPeftModelForCausalLM", "AutoModelForCausalLM"):
            assert said[f"{kind}/{name}"] == "loaded"
            torch.testing.assert_close(logits[f"{kind}/{name}"], saved["logits"][kind])


def test_the_code_in_the_card_loads_the_adapter(saved: Any, with_import: Any) -> None:
    for kind in CONFIGS:
        torch.testing.assert_close(with_import[1][f"{kind}/card"], saved["logits"][kind])


# --- the card -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONFIGS)
def test_card_says_how_to_load_and_what_it_is(saved: Any, kind: str) -> None:
    card = ModelCard.load(saved[kind] / "README.md")
    assert card.data["library_name"] == "peft"
    assert {"mixadapters", kind} <= set(card.data["tags"])
    assert card.data["base_model"] == str(saved["base"])
    assert card.data["license"] == "apache-2.0"
    assert "import mixadapters\n" in card.text
    assert "PeftModel.from_pretrained(base" in card.text
    assert f"`{kind.upper()}`" in card.text
    assert mixadapters.__version__ in card.text
    stages = {
        "bottleneck": "Stage `domain` trains `*`", "mixda": "Stage `domain` trains `domain.bank.*`",
        "moa": "Stage `router` trains `router.*`, `residual.*`",
    }  # fmt: skip
    assert stages[kind] in card.text


def test_card_stays_the_same_when_saved_again(saved: Any, tmp_path: Path) -> None:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(saved["base"]), saved["mixda"])
    model.save_pretrained(tmp_path)
    once = (tmp_path / "README.md").read_text(encoding="utf-8")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == once
    assert once.count("import mixadapters") == 1


def test_card_keeps_what_its_owner_wrote(saved: Any, tmp_path: Path) -> None:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(saved["base"]), saved["mixda"])
    model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    card.data["license"] = "mit"
    card.text = card.text.replace("Model Card for Model ID", "Medicine") + "\nMy own words.\n"
    card.save(tmp_path / "README.md")
    model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data["license"] == "mit"
    assert "# Medicine" in card.text
    assert "My own words." in card.text
    assert card.text.count("import mixadapters") == 1


def test_card_names_adapters_in_folders_below_it(saved: Any, tmp_path: Path) -> None:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(saved["base"]), CONFIGS["bottleneck"](), "one")
    model.add_adapter("two", CONFIGS["bottleneck"]())
    model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    for name in ("one", "two"):
        assert f'subfolder="{name}", adapter_name="{name}"' in text
        assert not (tmp_path / name / "README.md").exists()
    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(saved["base"]), tmp_path, subfolder="two", adapter_name="two"
    )
    model.set_adapter("two")
    ids = torch.arange(5, 12)[None]
    torch.testing.assert_close(loaded.eval()(ids).logits, model.eval()(ids).logits)


def test_card_without_task_type_names_the_class_that_peft_notes(saved: Any, tmp_path: Path) -> None:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(saved["base"]), BottleneckConfig(r=2))
    model.save_pretrained(tmp_path)
    assert "from transformers import LlamaForCausalLM" in code_of(tmp_path / "README.md")


def test_no_card_is_written_and_no_other_readme_is_touched(tmp_path: Path) -> None:
    BottleneckConfig().save_pretrained(tmp_path / "adapter")
    assert [p.name for p in (tmp_path / "adapter").iterdir()] == ["adapter_config.json"]
    for text in ("# A project\n", "---\nlicense: mit\n---\n# Another\n"):
        (tmp_path / "README.md").write_text(text, encoding="utf-8")
        BottleneckConfig().save_pretrained(tmp_path)
        BottleneckConfig().save_pretrained(tmp_path / "adapter")
        assert (tmp_path / "README.md").read_text(encoding="utf-8") == text
