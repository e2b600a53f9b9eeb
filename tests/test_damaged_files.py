"""Every folder and file that the library writes for itself, damaged: refused by name, or of no consequence.

Adapters' own folders are in tests/core/test_files.py, checkpoints in tests/training/test_checkpoints.py.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from damage import damaged_json, damaged_weights
from moe_bases import batch, moe

from mixadapters import BottleneckConfig, MoAConfig
from mixadapters.serving import CompositionRouter, GlobalLocalMixture, PooledStates
from mixadapters.surgery import compress_experts, expert_layers, record_usage
from mixadapters.surgery.compressed import INDEX, load_compressed, save_compressed
from mixadapters.surgery.extraction import Extraction, extract_experts
from mixadapters.surgery.qmoe import ternarize
from mixadapters.surgery.saving import load_pruned, save_pruned
from mixadapters.surgery.usage import ExpertUsage
from mixadapters.tuners.agd import Trajectories, TrajectoryPlan, record

CODES = "adapter_model.compressed.safetensors"
# What changes nothing, or what nobody can tell from another content; a warning names weights that are not finite.
HARMLESS: dict[str, tuple[str, ...]] = {
    "compressed": ("format_version True", "as torch.float64", "of NaN", "of -inf", "digits of the least"),
    "pruned": ("format True", "as torch.", "of NaN", "of -inf"),
    "usage": ("of NaN", "of -inf", "of the largest", "entropy one entry", "rows one entry"),
    "extraction": ("router as torch.float64",),
    "composition": ("format True", "neighbours 46116", "fallback 'x'", "mapping None", "mapping.a 'x'",
                    "mapping.b 'x'", "features as torch.float64"),
    "trajectories": ("of the largest", "of the least", "of NaN", "of -inf"),
    "global and local": ("as torch.float64", "bias one entry"),
}  # fmt: skip


def unnoticed(damages: Iterator[str], load: Callable[[], Any], place: Path) -> list[str]:
    """The damages after which `load` is silent, or raises what is no ValueError or does not name the place."""
    found = []
    for how in damages:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                load()
                found.append(how)
            except ValueError as error:
                if str(place) not in str(error):
                    found.append(f"{how}: without a name: {error}")
            except Exception as error:
                found.append(f"{how}: {type(error).__name__}: {error}")
    return found


def serious(name: str, found: list[str]) -> list[str]:
    return [how for how in found if not any(harmless in how for harmless in HARMLESS[name]) or ": " in how]


@pytest.mark.parametrize("codec", ["qmoe", "packed", "lowrank_sparse"])
def test_compressed_folders(codec: str, tiny: Any, tmp_path: Path) -> None:
    config = MoAConfig(num_experts=2, r=4, target_modules=["down_proj"], init_weights=False)
    model, base, folder = peft.get_peft_model(tiny("llama"), config), tiny("llama"), tmp_path / "codes"
    if codec == "lowrank_sparse":
        told = compress_experts(model, [batch()], method=codec, share=0.2, keep=0.1)
        save_compressed(model, folder, factors=told.factors)
    else:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".experts." in name:
                    parameter.copy_(ternarize(parameter, None))
        save_compressed(model, folder, codec=codec)
    for file, digest in ((folder / INDEX, "digests"), (folder / "adapter_config.json", "digest")):
        said = json.loads(file.read_text())
        assert said.pop(digest)  # which would tell any change
        file.write_text(json.dumps(said))
    before = {key: tensor.clone() for key, tensor in base.state_dict().items()}

    def load() -> None:
        load_compressed(folder, copy.deepcopy(base))

    load()
    for damages in (damaged_json(folder / INDEX), damaged_weights(folder / CODES)):
        assert not serious("compressed", unnoticed(damages, load, folder))
    assert all(torch.equal(tensor, before[key]) for key, tensor in base.state_dict().items())


def test_pruned_bases(tmp_path: Path) -> None:
    model = moe("mixtral")
    expert_layers(model)[0].keep([0, 2])
    save_pruned(model, tmp_path / "pruned")
    (file,) = (tmp_path / "pruned").glob("mixadapters*.json")
    for damages in (damaged_json(file), damaged_weights(tmp_path / "pruned" / "model.safetensors")):
        found = unnoticed(damages, lambda: load_pruned(tmp_path / "pruned"), tmp_path / "pruned")
        assert not serious("pruned", found)


def test_usages(tmp_path: Path) -> None:
    model = moe("mixtral")
    with record_usage(model) as usage:
        model(**batch())
    usage.save(tmp_path / "usage")
    found = unnoticed(
        damaged_weights(tmp_path / "usage", most=8), lambda: ExpertUsage.load(tmp_path / "usage"), tmp_path / "usage"
    )
    assert not serious("usage", found)


def test_extractions(tiny: Any, tmp_path: Path) -> None:
    file = tmp_path / "plan"
    extract_experts(tiny("llama"), 2, [{"input_ids": torch.arange(5, 25).view(2, 10)}], shared=0.25).save(file)

    def load() -> None:
        plan = Extraction.load(file)
        try:
            plan.apply(tiny("llama"))
        except ValueError as error:  # it is a plan, though not of this model
            raise ValueError(f"{file}: {error}") from error

    assert not serious("extraction", unnoticed(damaged_weights(file), load, file))


def test_routers_of_requests(tmp_path: Path) -> None:
    def embed(input_ids: torch.Tensor, attention_mask: Any = None) -> torch.Tensor:
        return torch.nn.functional.one_hot(input_ids[:, 0] % 5, 5).float()

    router = CompositionRouter(embed, neighbours=2, max_entropy=0.5, fallback="y", mapping={"a": "v", "b": "w"})
    router.fit_features(torch.randn(12, 5), ["a", "b"] * 6)
    router.save(tmp_path)

    def load() -> None:
        CompositionRouter.load(tmp_path, embed)(torch.ones(2, 3, dtype=torch.long))

    load()
    for damages in (
        damaged_json(tmp_path / "composition.json"), damaged_weights(tmp_path / "composition.safetensors")
    ):  # fmt: skip
        assert not serious("composition", unnoticed(damages, load, tmp_path))


def test_folders_of_users(tiny: Any, tmp_path: Path) -> None:
    base = tiny("bert", "sequence_classification")
    model = peft.get_peft_model(copy.deepcopy(base), BottleneckConfig(r=4, layers_to_transform=[2]), "alice").eval()
    mixture = GlobalLocalMixture(model, PooledStates(model))
    ids = torch.randint(10, 90, (8, 6))
    texts = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    mixture.fit_user("alice", {**texts, "labels": ids[:, 0] % 3}, mixture.embed(**texts), epochs=1)
    folder = mixture.save("alice", tmp_path)
    other = peft.get_peft_model(base, BottleneckConfig(r=4, layers_to_transform=[2]), "bob").eval()
    again = GlobalLocalMixture(other, PooledStates(other))

    def load() -> None:
        if "alice" in other.peft_config:
            other.delete_adapter("alice")
        again.load("alice", folder)
        try:
            again.choose("alice", **texts)
        except ValueError as error:  # a gate, though not of these features
            raise ValueError(f"{folder}: {error}") from error

    load()
    assert not serious("global and local", unnoticed(damaged_weights(folder / "gate.safetensors"), load, folder))
    load()
    other.delete_adapter("alice")
    (folder / "adapter_model.safetensors").write_bytes(b"")
    gates = dict(again.gates)
    with pytest.raises(ValueError, match="cannot be read as weights"):
        again.load("alice", folder)
    assert list(other.peft_config) == ["bob"]
    assert again.gates == gates


def test_trajectories(tmp_path: Path) -> None:
    """A record whose shards are not whole has what can be read, with a warning."""
    diffusers = pytest.importorskip("diffusers")

    def predict(x: torch.Tensor, timestep: torch.Tensor, conditions: dict[str, torch.Tensor]) -> torch.Tensor:
        return (x * 0.3 + conditions["class_labels"].view(-1, 1, 1, 1) / 10).tanh()

    scheduler = diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    plan = TrajectoryPlan(shape=(2, 4, 4), steps=3, batch_size=2, dtype="float32")
    labels = {"class_labels": torch.arange(4)}
    record(predict, scheduler, labels, {"class_labels": torch.tensor([9])}, plan, tmp_path / "record")

    def load() -> None:
        opened = Trajectories.open(tmp_path / "record")
        for i in range(len(opened)):
            try:
                opened[i]
            except ValueError as error:  # of what is not finite, by its step
                raise ValueError(f"{tmp_path}: {error}") from error
        if len(opened) < 12:
            raise ValueError(f"{tmp_path}: a warning names what is not there")

    load()
    shard = min((tmp_path / "record").glob("*.safetensors"))
    for damages in (damaged_json(tmp_path / "record" / "index.json"), damaged_weights(shard, most=5)):
        assert not serious("trajectories", unnoticed(damages, load, tmp_path))
