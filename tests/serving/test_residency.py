"""Many adapters over one base: some in the model, the others in host memory, and each request gets its own."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from served import KINDS, generated, tried

from mixadapters.core.layer import AdapterHost
from mixadapters.serving import AdapterServer, AdapterUnreadable
from mixadapters.serving.residency import Reading

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
SMALL = {"page_size": 8, "cache_tokens": 2048, "max_batch_tokens": 48}
PROMPT = [8, 6, 9, 14]
NAMES = [f"a{i}" for i in range(6)]


@pytest.fixture(scope="module")
def folders(save, tmp_path_factory) -> dict[str, Path]:
    root, kinds = tmp_path_factory.mktemp("adapters"), list(KINDS)
    return {name: save(root / name, kinds[i % 4], i) for i, name in enumerate(NAMES)}


@pytest.fixture(scope="module")
def alone(causal, folders) -> dict[str, list[int]]:
    quiet = tried(AdapterServer(causal(), **SMALL), folders)
    return {name: generated(quiet.model, PROMPT, name, 6) for name in [*folders, "__base__"]}


@pytest.fixture(params=["memory", "files"])
def server(causal, folders, request, tmp_path) -> AdapterServer:
    where = {"offload_folder": tmp_path} if request.param == "files" else {}
    server = AdapterServer(causal(), max_resident=2, **where, **SMALL)
    for name, folder in folders.items():
        server.load(name, folder)
    return server


def inside(server: AdapterServer) -> set[str]:
    """The adapters that are in the model, by its layers."""
    return {name for m in server.model.modules() if isinstance(m, AdapterHost) for name in m.adapters}


def test_all_are_served_and_few_are_in_the_model(server, alone) -> None:
    assert server.adapters.names == NAMES
    assert len(inside(server)) == 2
    with server:
        requests = [(name, server.submit(PROMPT, name, max_new_tokens=6)) for name in [*NAMES, "__base__"] * 2]
        for name, request in requests:
            assert request.result(60).tokens == alone[name]
            assert len(inside(server)) <= 2
    assert inside(server) == set(server.context.hosted) == set(server.model.peft_config)
    assert not server.adapters.residents._away.keys() & inside(server)  # they count as bytes in files alone
    assert server.adapters.hits + server.adapters.misses == 12
    assert server.adapters.residents.evictions >= 4


def test_the_one_unused_for_longest_makes_room(server) -> None:
    with server:
        for name in ("a0", "a1", "a0"):
            server.submit(PROMPT, name, max_new_tokens=1).result(30)
        leaves = server.adapters.residents.parts_in("a1").tensors()
        server.submit(PROMPT, "a2", max_new_tokens=1).result(30)
        assert inside(server) == {"a0", "a2"}
        assert leaves
        assert not any(tensor.numel() for tensor in leaves.values())  # whoever still has its modules
        before = server.adapters.hits
        server.submit(PROMPT, "a0", max_new_tokens=1).result(30)
        assert server.adapters.hits == before + 1


def test_adapter_in_use_stays_and_who_waits_for_its_place_gets_it(server, alone) -> None:
    with server:
        held = [server.submit(PROMPT, name, max_new_tokens=120) for name in ("a0", "a1")]
        for request in held:
            next(iter(request))
        late = server.submit(PROMPT, "a2", max_new_tokens=6)
        base = server.submit(PROMPT, max_new_tokens=6)
        assert base.result(30).tokens == alone["__base__"]
        assert inside(server) == {"a0", "a1"}
        assert not late.tokens
        held[0].cancel()
        assert late.result(30).tokens == alone["a2"]
        assert inside(server) == {"a1", "a2"}
        assert len(held[1].result(60).tokens) == 120


def test_adapter_that_comes_while_all_others_are_in_use_is_not_one_too_many(server, folders, alone) -> None:
    server.adapters._forms.clear()  # so that it comes into the model, to be tried
    with server:
        held = [server.submit(PROMPT, name, max_new_tokens=120) for name in ("a0", "a1")]
        for request in held:
            next(iter(request))
        server.load("late", folders["a2"])
        assert inside(server) == {"a0", "a1"}
        for request in held:
            request.cancel()
        assert server.submit(PROMPT, "late", max_new_tokens=6).result(30).tokens == alone["a2"]
        assert len(inside(server)) == 2


def test_request_that_waits_is_not_passed_for_ever(server, alone, monkeypatch) -> None:
    """Though those that are in the model are always in use: a next request for each comes before the last one ends."""
    monkeypatch.setattr("mixadapters.serving.book.PATIENCE", 0.05)
    stop, busy = threading.Event(), []

    def again(name: str) -> None:
        request = server.submit(PROMPT, name, max_new_tokens=8)
        asked = threading.Event()

        def next_one() -> None:
            if request.tokens and not asked.is_set() and not stop.is_set():
                asked.set()
                again(name)

        busy.append(request)
        request.listen(next_one)

    with server:
        for name in ("a0", "a1"):
            again(name)
        try:
            assert server.submit(PROMPT, "a5", max_new_tokens=6).result(30).tokens == alone["a5"]
        finally:
            stop.set()
        assert len(busy) > 2
        for request in busy:
            request.result(30)


def test_what_steps_have_packed_ends_with_the_stay_of_an_adapter(server) -> None:
    """One that comes back has other modules: the weights of its old ones are gone."""

    def used(name: str) -> Any:
        server.adapters.hold(name)
        while not server.adapters.begin(name):  # in files it is read first
            time.sleep(0.005)
        server.adapters.release(name, began=True)
        return server._book.roster_for({"a0"}, ["a0"]) if name == "a0" else None

    first = used("a0")
    assert used("a0") is first
    used("a1")
    used("a2")
    assert "a0" not in inside(server)
    assert used("a0") is not first


def test_one_that_waits_can_be_given_up_and_unloaded(server, folders, alone) -> None:
    with server:
        held = [server.submit(PROMPT, name, max_new_tokens=120) for name in ("a0", "a1")]
        for request in held:
            next(iter(request))
        late = server.submit(PROMPT, "a3", max_new_tokens=6, deadline=60)
        late.cancel()
        assert server.unload("a3")
        assert server.unload("a4")
        server.load("a4", folders["a0"])
        for request in held:
            request.cancel()
        assert server.submit(PROMPT, "a4", max_new_tokens=6).result(30).tokens == alone["a0"]
    assert server.adapters.names == ["a0", "a1", "a2", "a5", "a4"]


def test_load_that_fails_leaves_layers_and_adapters(server, folders, alone, tmp_path, monkeypatch) -> None:
    before = {id(m): set(m.adapters) for m in server.model.modules() if isinstance(m, AdapterHost)}
    server.adapters._forms.clear()  # so that it comes into the model
    monkeypatch.setattr(server.adapters._trials, "_trial", lambda name: "of a test")
    with pytest.raises(ValueError, match="of a test"):
        server.load("x", folders["a1"])
    monkeypatch.undo()
    monkeypatch.setattr("mixadapters.tuners.MoAModel.after_injection", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        server.load("x", folders["a1"])
    assert {id(m): set(m.adapters) for m in server.model.modules() if isinstance(m, AdapterHost)} == before
    with server:
        for name in NAMES:
            assert server.submit(PROMPT, name, max_new_tokens=6).result(30).tokens == alone[name]


@pytest.fixture
def filed(causal, folders, tmp_path) -> AdapterServer:
    server = AdapterServer(causal(), max_resident=2, offload_folder=tmp_path, **SMALL)
    for name, folder in folders.items():
        server.load(name, folder)
    return server


def test_adapters_outside_the_model_take_no_memory_and_their_files_go_with_them(filed, tmp_path) -> None:
    residents = filed.adapters.residents
    away = set(NAMES) - inside(filed)
    forms = {form for name in away if (form := residents._forms.get(name))}
    assert not residents._waiting
    assert residents._parts.keys() & away == away - residents._forms.keys()
    assert all(
        t.numel() == 0 for name in away & residents._parts.keys() for t in residents._parts[name].tensors().values()
    )
    assert all(form.parts.tensors()[place].numel() == 0 for form in forms for place in form.places.values())
    assert residents.filed_bytes > 0
    assert len(list(tmp_path.rglob("*.safetensors"))) == len(away) == 4
    for name in NAMES:
        assert filed.unload(name)
    assert residents.filed_bytes == 0
    assert not list(tmp_path.rglob("*.safetensors"))


def test_others_go_on_while_weights_are_read(filed, alone, monkeypatch) -> None:
    may, read = threading.Event(), Reading._read
    monkeypatch.setattr(Reading, "_read", lambda self: (may.wait(30), read(self)))
    monkeypatch.setattr("mixadapters.serving.book.PATIENCE", 0.0)
    (near, *_), (far, *_) = sorted(inside(filed)), sorted(set(NAMES) - inside(filed))
    with filed:
        late = filed.submit(PROMPT, far, max_new_tokens=6)
        for name in (near, "__base__", near):
            assert filed.submit(PROMPT, name, max_new_tokens=6).result(30).tokens == alone[name]
        assert not late.done
        other = sorted(set(NAMES) - inside(filed))[-1]
        given_up = filed.submit(PROMPT, other, max_new_tokens=6)
        while not filed.adapters.residents.coming(other):
            time.sleep(0.005)
        given_up.cancel()
        may.set()
        assert late.result(30).tokens == alone[far]
        for _ in range(2):
            filed.submit(PROMPT, max_new_tokens=2).result(30)
    assert not filed.adapters.residents._readings


def test_weights_that_nobody_waits_for_are_forgotten_once_they_have_been_read(filed, monkeypatch) -> None:
    may, read = threading.Event(), Reading._read
    monkeypatch.setattr(Reading, "_read", lambda self: (may.wait(30), read(self)))
    residents, far = filed.adapters.residents, min(set(NAMES) - inside(filed))
    assert not residents.use(far)
    residents.drop_unwanted(lambda name: False)
    assert residents.coming(far)  # and whoever asks by then need not have it read again
    may.set()
    while residents.coming(far):
        time.sleep(0.005)
    residents.drop_unwanted(lambda name: False)
    assert not residents._readings


def spoil(server: AdapterServer, names: list[str], how: str) -> Path:
    """What may become of files in `offload_folder`. Returns the path of the first of these adapters."""
    files = server.adapters.residents._files
    paths, whole = [files[name] for name in names], {path: path.read_bytes() for path in files.values()}
    for path in paths:
        if how == "gone":
            path.unlink()
        elif how == "cut":
            path.write_bytes(whole[path][:-4])
        else:  # the weights of another adapter
            path.write_bytes(next(content for other, content in whole.items() if other != path))
    return paths[0]


@pytest.mark.parametrize("how", ["gone", "cut", "another"])
def test_file_that_cannot_be_read_is_replaced_from_the_folder_of_its_adapter(filed, alone, how, caplog) -> None:
    away = sorted(set(NAMES) - inside(filed))
    spoil(filed, away, how)
    with filed:
        for name in [*NAMES, *away]:
            assert filed.submit(PROMPT, name, max_new_tokens=6).result(60).tokens == alone[name]
    again = [record.message for record in caplog.records if "has been read from its folder again" in record.message]
    assert len(again) == len(away)
    assert f"adapter {away[0]!r} has been read from its folder again: its file" in again[0]


@pytest.mark.parametrize("how", ["gone", "cut", "another"])
@pytest.mark.parametrize("folder", ["changed", "gone"])
def test_weights_that_cannot_be_read_fail_their_request_alone(
    causal, save, alone, folders, tmp_path, how, folder
) -> None:
    server = AdapterServer(causal(), max_resident=2, offload_folder=tmp_path, **SMALL)
    for i in range(4):
        server.load(f"b{i}", save(tmp_path / f"b{i}", "lora", i))
    near, far = "b0", "b3"  # the first of its form comes into the model
    file = spoil(server, [far], how)
    weights = tmp_path / far / "adapter_model.safetensors"
    if folder == "gone":
        weights.unlink()
    else:  # by the same number of bytes
        weights.write_bytes((tmp_path / "b1" / "adapter_model.safetensors").read_bytes())
    message = rf"adapter 'b3' cannot come into the model: its file '{file}': .*Its folder .*b3' has gone or changed"
    with server:
        for _ in range(2):
            with pytest.raises(AdapterUnreadable, match=message):
                server.submit(PROMPT, far, max_new_tokens=6).result(30)
            assert len(server.submit(PROMPT, near, max_new_tokens=6).result(30).tokens) == 6
        assert server.waiting == 0
        assert server.unload(far)
        server.load(far, folders["a0"])
        assert server.submit(PROMPT, far, max_new_tokens=6).result(30).tokens == alone["a0"]


def test_adapter_that_is_lost_comes_back_with_its_folder(filed, alone, monkeypatch) -> None:
    """Though the try in between has taken out what was left of it."""
    far = sorted(set(NAMES) - inside(filed))[0]
    spoil(filed, [far], "gone")
    filed.adapters._forms.clear()  # so that it is tried
    monkeypatch.setattr(filed.adapters._trials, "_trial", lambda name: "of a test")
    with filed:
        with pytest.raises(AdapterUnreadable, match=r"Nor can its folder .* be read: .*of a test"):
            filed.submit(PROMPT, far, max_new_tokens=6).result(30)
        monkeypatch.undo()
        assert filed.submit(PROMPT, far, max_new_tokens=6).result(30).tokens == alone[far]


def test_disk_that_is_full_leaves_the_model_as_it_is(filed, folders, alone, monkeypatch) -> None:
    """Of two that are in the model none can leave, and the message names the one that was to."""
    (near, *_), (far, *_) = sorted(inside(filed)), sorted(set(NAMES) - inside(filed))
    for name in inside(filed):
        filed.adapters.residents._files.pop(name, None)
    before, files = inside(filed), sorted(Path(filed.adapters.residents._folder.name).iterdir())

    def full(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("mixadapters.serving.residency.save_file", full)
    message = r"adapter 'a.' cannot wait outside the model: its file '.*' cannot be written: No space left"
    with filed:
        with pytest.raises(AdapterUnreadable, match=message):
            filed.submit(PROMPT, far, max_new_tokens=6).result(30)
        for name in ("new of a known form", "new"):
            with pytest.raises(AdapterUnreadable, match=message.replace("'a.'", "'.*'")):
                filed.load(name, folders["a0"])
            filed.adapters._forms.clear()
        assert inside(filed) == before
        assert filed.adapters.names == NAMES
        assert filed.submit(PROMPT, near, max_new_tokens=6).result(30).tokens == alone[near]
        monkeypatch.undo()
        assert filed.submit(PROMPT, far, max_new_tokens=6).result(30).tokens == alone[far]
    assert set(files) <= set(Path(filed.adapters.residents._folder.name).iterdir())


def test_offload_folder_must_be_there_and_of_use(causal, tmp_path) -> None:
    for options in ({"max_resident": 2, "offload_folder": tmp_path / "absent"}, {"offload_folder": tmp_path}):
        with pytest.raises(ValueError, match=r"offload_folder=.* must be a folder, for a server with max_resident"):
            AdapterServer(causal(), **options, **SMALL)


def test_verbs_look_at_no_other_adapter(causal, folders, monkeypatch) -> None:
    """A hundred adapters or none: loading another visits as many modules and parameters."""
    visits: list[int] = []

    def count(server: AdapterServer, name: str) -> int:
        seen = 0
        named = torch.nn.Module.named_modules

        def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal seen
            for found in named(self, *args, **kwargs):
                seen += 1
                yield found

        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.Module, "named_modules", counting)
            server.load(f"{name} of a known form", folders["a0"])
            assert not seen
            server.adapters._forms.clear()
            server.load(name, folders["a0"])
        return seen

    server = AdapterServer(causal(), **SMALL)
    server.load("first", folders["a0"])
    for name in ("second", "third"):
        visits.append(count(server, name))
        for i in range(15):
            server.load(f"{name}{i}", folders["a0"])
    visits.append(count(server, "last"))
    assert visits[0] == visits[1] == visits[2]


def test_pieces_of_load_and_unload_do_not_grow(causal, folders) -> None:
    """The names of a served folder are looked up, not searched for."""
    server = AdapterServer(causal(), max_resident=3, **SMALL)
    for i in range(12):
        server.load(f"n{i}", folders["a0"])
    assert len(server.model.peft_config) == len(inside(server)) <= 3
    for i in range(0, 12, 2):
        assert server.unload(f"n{i}")
    assert server.adapters.names == [f"n{i}" for i in range(1, 12, 2)]
    with server:
        for name in server.adapters.names:
            server.submit(PROMPT, name, max_new_tokens=1).result(30)
    assert len(server.model.peft_config) == len(inside(server)) == 3
