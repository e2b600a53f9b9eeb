"""Adapters of a form that has been tried: loaded by a look at their numbers, refused as the first is, and theirs."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from served import KINDS, generated, tried

from mixadapters.core.mixture import Mixture
from mixadapters.serving import AdapterServer, AdapterUnreadable, UnknownAdapter
from mixadapters.serving.forms import LARGEST, TRIED, form_of, read_folder
from mixadapters.tuners.moa.layer import FollowRouter

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
SMALL: dict[str, Any] = {"page_size": 8, "cache_tokens": 1024, "max_batch_tokens": 48}
PROMPT = [8, 6, 9, 14]
SHARED = {"router_scope": "model", "target_modules": ["q_proj", "down_proj"]}  # one router for all layers


@pytest.fixture(scope="module")
def folders(save, tmp_path_factory) -> dict[str, Path]:
    """Two of each kind, and two mixtures whose layers share a router."""
    root = tmp_path_factory.mktemp("adapters")
    kinds = {**{kind: (kind, {}) for kind in KINDS}, "shared": ("moa", SHARED)}
    return {f"{name}{i}": save(root / f"{name}{i}", kind, i, **more)
            for name, (kind, more) in kinds.items() for i in range(2)}  # fmt: skip


@pytest.fixture(scope="module")
def alone(causal, folders) -> Callable[[str], list[int]]:
    quiet = tried(AdapterServer(causal(), **SMALL), folders)
    return lambda name: generated(quiet.model, PROMPT, name, 6)


def answers(server: AdapterServer, *names: str) -> list[list[int]]:
    return [server.submit(PROMPT, name, max_new_tokens=6).result(30).tokens for name in names]


def written(folder: Path, change: Callable[[str, torch.Tensor], torch.Tensor], digest: bool = False) -> Path:
    """A folder whose weights have been changed, and whose config says nothing of those that it was saved with."""
    weights = {key: change(key, tensor) for key, tensor in load_file(folder / "adapter_model.safetensors").items()}
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "adapter_config.json").read_text())
    if not digest:
        config["digest"] = None
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def copied(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


# --- what comes of it ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*KINDS, "shared"])
def test_second_of_a_form_is_what_it_is_when_tried(causal, folders, alone, monkeypatch, kind) -> None:
    """It is loaded while forwards run, and comes into the model when a request names it."""
    with AdapterServer(causal(), **SMALL) as server:
        server.load("first", folders[f"{kind}0"])
        assert len(server.adapters._forms) == 1
        with monkeypatch.context() as patch:
            patch.setattr(server.adapters, "changing", None)
            server.load("second", folders[f"{kind}1"])
        assert server.adapters.names == ["first", "second"]
        assert server.context.hosted == {"first"}
        assert answers(server, "second", "first") == [alone(f"{kind}1"), alone(f"{kind}0")]
        assert server.context.hosted == {"first", "second"}


def test_copies_of_a_form_share_nothing_but_what_their_layers_share(causal, folders) -> None:
    server = AdapterServer(causal(), **SMALL)
    for name, folder in (("first", "shared0"), ("second", "shared1"), ("third", "shared1")):
        server.load(name, folders[folder])
        assert server.adapters.begin(name)
    parts = {name: server.adapters.residents.parts_of(name) for name in ("first", "second", "third")}
    memory = [{t.data_ptr() for _, part in at for t in part.state_dict().values()} for at in parts.values()]
    assert not memory[0] & memory[1]
    assert not memory[1] & memory[2]
    for name, at in parts.items():
        adapters = [adapter for _, adapter in at]
        leaders = [a.router for a in adapters if isinstance(a, Mixture) and not isinstance(a.router, FollowRouter)]
        followers = [a.router for a in adapters if isinstance(a, Mixture) and isinstance(a.router, FollowRouter)]
        assert {adapter.key.adapter for adapter in adapters} == {name}
        assert {router.key.adapter for router in followers} == {name}
        assert {id(router.__dict__["leader"]) for router in followers} == {id(leaders[0])}
        assert len(leaders) == 1


def test_order_in_which_modules_are_listed_makes_no_other_form(causal, folders, tmp_path) -> None:
    """PEFT writes a set. Everything else does: here the scale of a LoRA."""
    server, kept = AdapterServer(causal(), **SMALL), copied(folders["lora1"], tmp_path / "x")
    server.load("first", folders["lora0"])
    config = json.loads((kept / "adapter_config.json").read_text())
    for i, (more, forms) in enumerate(
        (({"target_modules": config["target_modules"][::-1]}, 1), ({"lora_alpha": 5}, 2))
    ):
        (kept / "adapter_config.json").write_text(json.dumps(config | more))
        server.load(f"next{i}", kept)
        assert len(server.adapters._forms) == forms


# --- between load and first use -----------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["memory", "files"])
def test_what_becomes_of_a_folder_after_its_load_changes_nothing(causal, folders, alone, tmp_path, where) -> None:
    (tmp_path / "away").mkdir()
    files = {"offload_folder": tmp_path / "away"} if where == "files" else {}
    server = AdapterServer(causal(), max_resident=2, **files, **SMALL)
    server.load("first", folders["lora0"])
    names = ("overwritten", "cut", "deleted", "linked")
    for name in names:
        server.load(name, copied(folders["lora1"], tmp_path / name))
    weights = {name: tmp_path / name / "adapter_model.safetensors" for name in names}
    weights["overwritten"].write_bytes(b"\0" * weights["overwritten"].stat().st_size)  # in place
    weights["cut"].write_bytes(weights["cut"].read_bytes()[:100])
    shutil.rmtree(tmp_path / "deleted")
    weights["linked"].unlink()
    weights["linked"].symlink_to(folders["lora0"] / "adapter_model.safetensors")
    with server:
        assert answers(server, *names) == [alone("lora1")] * 4


def test_adapter_that_nobody_has_named_is_unloaded_with_all_that_was_kept(causal, folders, tmp_path) -> None:
    server = AdapterServer(causal(), max_resident=2, offload_folder=tmp_path, **SMALL)
    for name, folder in (("first", "lora0"), ("second", "lora1")):
        server.load(name, folders[folder])
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1
    assert server.unload("second")
    assert not list(tmp_path.rglob("*.safetensors"))
    assert server.adapters.residents.filed_bytes == 0
    assert len(server.adapters._forms) == 1
    with server, pytest.raises(UnknownAdapter):
        server.submit(PROMPT, "second")
    assert server.unload("first")
    assert not server.adapters._forms  # nobody is left who is of it


def test_one_of_two_loads_of_a_name_gets_it(causal, folders, monkeypatch) -> None:
    """And one that fails leaves it free."""
    server = AdapterServer(causal(), **SMALL)
    server.load("first", folders["lora0"])
    inside, may = threading.Event(), threading.Event()

    def slowly(*args: Any) -> Any:
        inside.set()
        assert may.wait(30)
        return read_folder(*args)

    monkeypatch.setattr("mixadapters.serving.adapters.read_folder", slowly)
    slow = threading.Thread(target=server.load, args=("x", folders["lora1"]))
    slow.start()
    assert inside.wait(30)
    with pytest.raises(ValueError, match="'x' is taken"):
        server.load("x", folders["lora0"])
    may.set()
    slow.join()
    assert server.adapters.names == ["first", "x"]
    for _ in range(2):
        with pytest.raises(ValueError, match="holds no adapter_model"):
            server.load("y", folders["lora0"].parent)
    missing = folders["lora0"].parent / "lora00"
    with pytest.raises(ValueError, match=r"lora00': there is no such folder\. Did you mean 'lora0'\?.* no hub ids"):
        server.load("y", missing)


def test_adapter_that_finds_no_place_fails_its_request_alone(causal, folders, alone, monkeypatch) -> None:
    """As on a device that is full. It may be asked for again."""
    server = AdapterServer(causal(), **SMALL)
    server.load("first", folders["lora0"])
    server.load("second", folders["lora1"])
    (*_, (last, _)) = server.adapters.residents.parts_of("first")
    with server:
        with monkeypatch.context() as patch:
            patch.setattr(last, "_move_adapter_to_device_of_base_layer", lambda name: 1 / 0)
            with pytest.raises(AdapterUnreadable, match="'second' cannot come into the model: ZeroDivisionError"):
                server.submit(PROMPT, "second").result(30)
        assert not server.adapters.residents.parts_of("second")
        assert answers(server, "first", "second") == [alone("lora0"), alone("lora1")]


# --- refusals: as of the first of a form --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def known(causal, folders) -> AdapterServer:
    """A server that has one of each kind; tests that add to it put it back."""
    server = AdapterServer(causal(), **SMALL)
    for kind in KINDS:
        server.load(kind, folders[f"{kind}0"])
    return server


def refusals(server: AdapterServer, name: str, folder: Path) -> Iterator[str]:
    """What is said where its form is known, and where it is not."""
    forms = dict(server.adapters._forms)
    for known in (forms, {}):
        server.adapters._forms.clear()
        server.adapters._forms.update(known)
        with pytest.raises((ValueError, RuntimeError)) as refused:
            server.load(name, folder)
        yield f"{type(refused.value).__name__}: {refused.value}"
    server.adapters._forms.update(forms)


CHANGES: dict[str, Callable[[str, torch.Tensor], torch.Tensor]] = {
    "not finite": lambda key, tensor: tensor.fill_(float("nan")),
    "one infinity": lambda key, tensor: (
        tensor.flatten().index_fill(0, torch.tensor([1]), torch.inf).view(tensor.shape)
    ),
    "too large together": lambda key, tensor: tensor.fill_(3e38),
}


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("change", list(CHANGES))
def test_numbers_that_cannot_be_served_are_refused_at_load(known, folders, tmp_path, kind, change) -> None:
    folder = written(copied(folders[f"{kind}1"], tmp_path / "x"), CHANGES[change])
    first, second = refusals(known, "x", folder)
    assert first == second
    assert "finite" in first
    assert known.adapters.names == list(KINDS)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", list(KINDS))
def test_weights_that_are_not_finite_are_refused_by_key(known, folders, tmp_path, kind, value) -> None:
    """Also those of an expert that the trial's tokens are not given to."""
    spoilt = []

    def spoil(key: str, tensor: torch.Tensor) -> torch.Tensor:
        if not spoilt and ("down.weight" in key or "lora_A" in key):
            spoilt.append(key)
            tensor[0] = value
        return tensor

    folder = written(copied(folders[f"{kind}1"], tmp_path / "x"), spoil)
    known.adapters._trials._trial = lambda name: None
    try:
        first, second = refusals(known, "x", folder)
    finally:
        del known.adapters._trials._trial
    assert first == second
    (key,) = spoilt
    place = key.removeprefix("base_model.model.").partition(".mlp")[0]
    assert place in first
    assert ("down.weight at" if kind == "lora" else key) in first


@pytest.mark.parametrize("kind", ["bottleneck", "moa", "mixda"])
def test_weights_of_another_save_are_refused_at_load(known, folders, tmp_path, kind) -> None:
    folder = written(copied(folders[f"{kind}1"], tmp_path / "x"), lambda key, tensor: tensor * 0.5, digest=True)
    first, second = refusals(known, "x", folder)
    assert first == second
    assert "is not what adapter_config.json was saved with" in first


@pytest.mark.parametrize(
    ("name", "folder"),
    [(name, "lora1") for name in ("a.b", "", "keys", "mlp", "base_layer", "moa_x")]
    + [("bottleneck_x", "bottleneck1")],
)
def test_names_that_cannot_be_given_are_refused_at_load(known, folders, name, folder) -> None:
    first, second = refusals(known, name, folders[folder])
    assert first == second
    assert repr(name) in first


def test_adapter_of_another_base_is_refused_at_load(causal, folders, tmp_path) -> None:
    model = causal()
    model.config._name_or_path = "ours"
    server, folder = AdapterServer(model, check_base_model=False, **SMALL), copied(folders["lora1"], tmp_path / "x")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "theirs"}))
    server.load("first", folder)
    server.adapters.check_base_model = True
    first, second = refusals(server, "x", folder)
    assert first == second
    assert "was trained on 'theirs', this model is 'ours'" in first


def test_layers_that_take_no_adapter_any_more_are_asked(known, folders) -> None:
    (host, _), *_ = known.adapters.residents.parts_of("lora")
    host.merged_adapters.append("merged by hand")
    known.load("tried", folders["lora1"])
    assert "tried" in known.adapters.residents
    host.merged_adapters.clear()
    host.closed = "no other adapter may come"
    with pytest.raises(RuntimeError, match="no other adapter may come"):
        known.load("x", folders["lora1"])
    host.closed = None
    known.load("x", folders["lora1"])
    assert "x" not in known.adapters.residents
    assert known.unload("x")
    assert known.unload("tried")


@pytest.mark.parametrize("where", ["forms.read_config", "trials.weights_of"])
def test_folder_that_goes_while_it_is_read_is_refused(causal, folders, monkeypatch, where) -> None:
    """And not an error of the server, whose other adapters have their users."""

    def gone(path: Any) -> Any:
        raise FileNotFoundError(2, "No such file or directory", str(path))

    server = AdapterServer(causal(), **SMALL)
    with monkeypatch.context() as patch:
        patch.setattr(f"mixadapters.serving.{where}", gone)
        with pytest.raises(ValueError, match=r"adapter 'x': its folder cannot be read: .*No such file"):
            server.load("x", folders["moa0"])
    assert not server.context.hosted
    server.load("x", folders["moa0"])


# --- what has no form ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "size"), [("lora", 0.0), ("bottleneck", TRIED)])
def test_form_that_may_not_be_finite_is_none_and_weights_come_back(causal, folders, kind, size) -> None:
    """As where a router divides by a weight."""
    server = AdapterServer(causal(), **SMALL)
    server.load("x", folders[f"{kind}0"])
    parts, seen = server.adapters.residents.parts_in("x"), []
    before = {name: tensor.clone() for name, tensor in parts.tensors().items()}
    found = read_folder(folders[f"{kind}0"], {})

    def trial() -> str | None:
        sizes = {float(tensor.abs().max()) for _, part in parts.at for tensor in part.parameters()}
        seen.append(sizes)
        return "no" if sizes == {size} else None

    assert form_of(found, parts, trial) is None
    assert seen[-1] == {size}
    assert all(torch.equal(tensor, before[name]) for name, tensor in parts.tensors().items())
    assert form_of(found, parts, lambda: None) is not None


def test_adapter_that_is_more_than_its_file_or_another_has_none(causal, folders) -> None:
    server = AdapterServer(causal(), **SMALL)
    server.load("x", folders["moa0"])
    parts, found = server.adapters.residents.parts_in("x"), read_folder(folders["moa0"], {})
    mixture = next(adapter for _, adapter in parts.at if isinstance(adapter, Mixture))
    assert form_of(read_folder(folders["moa1"], {}), parts, lambda: None) is None
    for changes in (mixture.tunings, mixture.watchers):
        changes.append(lambda *_: None)
        assert form_of(found, parts, lambda: None) is None
        changes.clear()
    mixture.register_buffer("more", torch.zeros(1))
    assert form_of(found, parts, lambda: None) is None
    del mixture.more
    assert form_of(found, parts, lambda: None) is not None


def test_adapter_with_counts_has_none(causal, tmp_path) -> None:
    """Whole numbers are places in tables, where others might lead outside."""
    model = get_peft_model(causal(), KINDS["mixda"](router={"kind": "counts"}))
    model.base_model.fit_gate({"a": [torch.arange(5, 40)], "b": [torch.arange(35, 70)]}, general=[torch.arange(5, 96)])
    model.save_pretrained(tmp_path)
    server = AdapterServer(causal(), **SMALL)
    for name in ("first", "second"):
        server.load(name, tmp_path)
    assert not server.adapters._forms
    assert server.context.hosted == {"first", "second"}


DTYPES: dict[str, Callable[[str, torch.Tensor], torch.Tensor]] = {
    "two": lambda key, tensor: tensor.half() if ".up." in key else tensor,
    "eight bits": lambda key, tensor: tensor.to(torch.float8_e4m3fn),
}


@pytest.mark.parametrize("dtypes", list(DTYPES))
def test_file_of_dtypes_that_are_not_compared_has_none(causal, folders, tmp_path, dtypes) -> None:
    server, folder = AdapterServer(causal(), **SMALL), copied(folders["bottleneck0"], tmp_path / "x")
    written(folder, DTYPES[dtypes])
    for name in ("first", "second"):
        server.load(name, folder)
    assert not server.adapters._forms
    assert server.context.hosted == {"first", "second"}


def test_weights_of_a_size_are_tried_one_by_one(known, folders, tmp_path) -> None:
    """Larger ones may overflow: they come into the model, where a forward tells."""
    forms = dict(known.adapters._forms)
    for i, (factor, waits) in enumerate(((0.5, True), (2.0, False), (-2.0, False))):
        known.adapters._forms.update(forms)  # one that is tried takes its form along
        folder = copied(folders["lora1"], tmp_path / str(i))
        written(folder, lambda key, tensor, factor=factor: tensor.abs() / tensor.abs().max() * LARGEST * factor)
        known.load(f"x{i}", folder)
        assert (f"x{i}" in known.adapters.residents) is not waits
        assert known.unload(f"x{i}")
