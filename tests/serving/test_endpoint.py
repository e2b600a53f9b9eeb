"""The endpoint by the real client of OpenAI, and by hand where that would not send it."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import openai
import pytest
import uvicorn
from served import generated, word_tokenizer

from mixadapters.serving.__main__ import arguments
from mixadapters.serving.engine import AdapterServer
from mixadapters.serving.http_server import HttpServer, http_server
from mixadapters.serving.wire import ChatBody, WireError, read_body

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
TOKEN = "a secret of the test"
WORDS = "w8 w16 w9 w30 w71"
IDS = [8, 16, 9, 30, 71]
NAMES = ("law", "code", "chat")


class Answer(NamedTuple):
    """What came back over a plain connection."""

    status_code: int
    headers: dict[str, str]
    text: str

    def json(self) -> Any:
        return json.loads(self.text)


def ask(port: int, method: str, path: str, content: bytes = b"", headers: dict[str, Any] | None = None) -> Answer:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, path, content, headers or {})
        answer = connection.getresponse()
        found = {name.lower(): value for name, value in answer.getheaders()}
        return Answer(answer.status, found, answer.read().decode())
    finally:
        connection.close()


class Served:
    """An endpoint that runs."""

    def __init__(self, server: HttpServer, port: int, folder: Path) -> None:
        self.server, self.port, self.folder = server, port, folder
        self.url = f"http://127.0.0.1:{port}"
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=TOKEN, max_retries=0, timeout=60)

    @property
    def engine(self) -> AdapterServer:
        return self.server.engine

    def send(self, method: str, path: str, content: bytes = b"") -> Answer:
        return ask(self.port, method, path, content, {"Authorization": f"Bearer {TOKEN}"})

    def post(self, path: str, **body: Any) -> Answer:
        return self.send("POST", path, json.dumps(body).encode())


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def running(model: Any, folder: Path, *more: str) -> tuple[Served, threading.Thread]:
    port = free_port()
    options = arguments().parse_args(
        ["--base", "tiny", "--adapters", str(folder), "--port", str(port), "--cache-tokens", "2048",
         "--max-batch-tokens", "48", *more]
    )  # fmt: skip
    server = http_server(options, model, word_tokenizer())
    thread = threading.Thread(target=server.serve_until_stopped)
    thread.start()
    end = time.monotonic() + 30
    while not server.started and time.monotonic() < end:
        time.sleep(0.01)
    return Served(server, port, folder), thread


@pytest.fixture(scope="module")
def folder(save, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("adapters")
    for name, kind, seed in (("law", "bottleneck", 1), ("code", "moa", 2), ("chat", "lora", 3)):
        save(root / name, kind, seed)
    (root / "notes").mkdir()
    return root


@pytest.fixture(scope="module")
def served(causal, folder) -> Iterator[Served]:
    before = os.environ.get("MIXADAPTERS_TOKEN")
    os.environ["MIXADAPTERS_TOKEN"] = TOKEN
    found, thread = running(causal(), folder, "--largest-body", "4000", "--max-requests", "8", "--sampling")
    try:
        yield found
    finally:
        found.client.close()
        found.server.should_exit = True
        thread.join(30)
        os.environ.pop("MIXADAPTERS_TOKEN")
        if before is not None:
            os.environ["MIXADAPTERS_TOKEN"] = before
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def alone(causal, folder) -> Any:
    """(ids, adapter, tokens) -> the text that `generate` gives: what goes on with the prompt, or says it in a chat."""
    quiet, tokenizer = AdapterServer(causal()), word_tokenizer()
    for name in NAMES:
        quiet.load(name, folder / name)

    def text(ids: list[int], adapter: str, tokens: int, chat: bool = False) -> str:
        new = generated(quiet.model, ids, {"tiny": "__base__"}.get(adapter, adapter), tokens)
        before = [] if chat else ids
        whole = tokenizer.decode(before + new, skip_special_tokens=True)
        return whole.removeprefix(tokenizer.decode(before, skip_special_tokens=True))

    return text


# --- by the client ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [WORDS, IDS])
def test_a_character_is_begun_by_ids_alone(served, monkeypatch, given) -> None:
    """A text ends with a whole character, also where that is the sign of what is unreadable."""

    def decode(ids: list[int], skip_special_tokens: bool) -> str:
        return "".join("\ufffd" if i == IDS[-1] else "+" for i in ids)

    monkeypatch.setattr(served.engine.tokenizer, "decode", decode)
    text = served.client.completions.create(model="chat", prompt=given, max_tokens=1).choices[0].text
    assert len(text) == (1 if given == WORDS else 2)


def test_base_and_adapters_are_models(served) -> None:
    models = served.client.models.list().data
    assert [model.id for model in models] == ["tiny", *sorted(NAMES)]
    assert served.client.models.retrieve("law").id == "law"
    with pytest.raises(openai.NotFoundError, match="the model 'laws' does not exist"):
        served.client.models.retrieve("laws")


def test_the_base_has_one_name_and_messages_say_it(served) -> None:
    """What the engine calls it is nothing that a client could ask for."""
    for body in ({"model": "__base__"}, {"model": "laws"}):
        answer = served.post("/v1/completions", prompt="w8", **body)
        assert answer.status_code == 404
        assert error_of(answer)["param"] == "model"
    assert "there are ['tiny', " in error_of(answer)["message"]
    answer = served.post("/v1/unload_lora_adapter", lora_name="laws")
    assert answer.status_code == 404
    assert error_of(answer)["param"] == "lora_name"
    answer = served.post("/v1/unload_lora_adapter", lora_name="tiny")
    assert answer.status_code == 400
    assert "'tiny' is the base model, which is not unloaded" in error_of(answer)["message"]
    assert "__base__" not in error_of(answer)["message"]


@pytest.mark.parametrize("model", ["tiny", *NAMES])
def test_completion_is_what_generate_gives(served, alone, model) -> None:
    done = served.client.completions.create(model=model, prompt=WORDS, max_tokens=6)
    assert done.choices[0].text == alone(IDS, model, 6)
    assert done.choices[0].finish_reason == "length"
    assert (done.usage.prompt_tokens, done.usage.completion_tokens, done.usage.total_tokens) == (5, 6, 11)
    assert done.model == model


def test_several_prompts_in_text_or_ids(served, alone) -> None:
    done = served.client.completions.create(model="law", prompt=[IDS, [9, 10]], max_tokens=3)
    assert [c.text for c in done.choices] == [alone(IDS, "law", 3), alone([9, 10], "law", 3)]
    assert [c.index for c in done.choices] == [0, 1]
    texts = served.client.completions.create(model="law", prompt=[WORDS, "w9 w10"], max_tokens=3)
    assert [c.text for c in texts.choices] == [c.text for c in done.choices]


@pytest.mark.parametrize("model", ["law", "code"])
def test_chat_takes_the_template(served, alone, model) -> None:
    messages = [{"role": "user", "content": "w8 w16"}]
    done = served.client.chat.completions.create(model=model, messages=messages, max_completion_tokens=5)
    assert done.choices[0].message.role == "assistant"
    assert done.choices[0].message.content == alone([4, 8, 16, 5], model, 5, chat=True)
    parts = [{"role": "user", "content": [{"type": "text", "text": "w8 "}, {"type": "text", "text": "w16"}]}]
    again = served.client.chat.completions.create(model=model, messages=parts, max_tokens=5)
    assert again.choices[0].message.content == done.choices[0].message.content


def test_streams_say_the_same_piece_by_piece(served, alone) -> None:
    messages = [{"role": "user", "content": "w8 w16"}]
    pieces = list(
        served.client.chat.completions.create(
            model="chat", messages=messages, max_tokens=8, stream=True, stream_options={"include_usage": True}
        )
    )
    texts = [piece.choices[0].delta.content or "" for piece in pieces if piece.choices]
    assert "".join(texts) == alone([4, 8, 16, 5], "chat", 8, chat=True)
    assert sum(map(bool, texts)) > 3
    assert [piece.choices[0].finish_reason for piece in pieces if piece.choices][-1] == "length"
    assert pieces[-1].usage.completion_tokens == 8
    assert len({piece.id for piece in pieces}) == 1
    plain = served.client.completions.create(model="chat", prompt=WORDS, max_tokens=6, stream=True)
    assert "".join(piece.choices[0].text for piece in plain) == alone(IDS, "chat", 6)


def test_text_ends_before_a_stop_string(served, alone) -> None:
    whole = alone(IDS, "law", 12)
    stop = whole.split()[4]
    expected = whole[: whole.index(stop)]
    done = served.client.completions.create(model="law", prompt=WORDS, max_tokens=12, stop=["never", stop])
    assert (done.choices[0].text, done.choices[0].finish_reason) == (expected, "stop")
    stream = served.client.completions.create(model="law", prompt=WORDS, max_tokens=12, stop=stop, stream=True)
    pieces = [(piece.choices[0].text, piece.choices[0].finish_reason) for piece in stream]
    assert "".join(text for text, _ in pieces) == expected
    assert pieces[-1][1] == "stop"
    assert served.engine.waiting == 0


def test_sampling_is_by_request(served, alone) -> None:
    hot = {
        served.client.completions.create(model="law", prompt=WORDS, max_tokens=8, temperature=2.0).choices[0].text
        for _ in range(3)
    }
    assert len(hot) > 1
    cold = served.client.completions.create(model="law", prompt=WORDS, max_tokens=8, temperature=0)
    assert cold.choices[0].text == alone(IDS, "law", 8)


def test_adapters_are_loaded_and_unloaded_while_it_runs(served, folder, alone, tmp_path) -> None:
    shutil.copytree(folder / "law", folder / "late")
    try:
        with pytest.raises(openai.NotFoundError, match="the model 'late' does not exist"):
            served.client.completions.create(model="late", prompt=WORDS)
        answer = served.post("/v1/load_lora_adapter", lora_name="late", lora_path="late")
        assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'late' added successfully.")
        assert served.post("/v1/load_lora_adapter", lora_name="renamed", lora_path="late").status_code == 200
        for name in ("late", "renamed"):
            done = served.client.completions.create(model=name, prompt=WORDS, max_tokens=4)
            assert done.choices[0].text == alone(IDS, "law", 4)
            assert served.post("/v1/unload_lora_adapter", lora_name=name).status_code == 200
        with pytest.raises(openai.NotFoundError):
            served.client.completions.create(model="late", prompt=WORDS)
        assert served.post("/v1/unload_lora_adapter", lora_name="late").status_code == 404
    finally:
        shutil.rmtree(folder / "late")


def test_adapter_in_use_is_not_said_to_be_gone(served, folder) -> None:
    assert served.post("/v1/load_lora_adapter", lora_name="used", lora_path="law").status_code == 200
    held = served.engine.submit(IDS, "used", max_new_tokens=240)
    answer = served.post("/v1/unload_lora_adapter", lora_name="used")
    assert (answer.status_code, answer.text.partition(":")[0]) == (202, "Accepted")
    held.cancel()
    assert waits_until(lambda: "used" not in served.engine.context.hosted)
    assert served.post("/v1/unload_lora_adapter", lora_name="used").status_code == 404


def test_fields_that_change_nothing_are_taken(served, alone) -> None:
    """What stock clients send beside: each at the value at which it asks for nothing."""
    neutral: dict[str, Any] = {
        "n": 1, "seed": 5, "user": "u", "logprobs": False, "top_logprobs": 0, "tools": [], "tool_choice": "auto",
        "parallel_tool_calls": True, "response_format": {"type": "text"}, "presence_penalty": 0.0,
        "frequency_penalty": 0, "logit_bias": {}, "store": False, "metadata": {"a": "b"}, "service_tier": "auto",
        "modalities": ["text"], "stop": None, "stream": False, "prompt_cache_key": "k", "safety_identifier": "s",
    }  # fmt: skip
    messages: list[Any] = [{"role": "user", "content": "w8 w16"}]
    done = served.client.chat.completions.create(model="law", messages=messages, max_tokens=5, **neutral)
    assert done.choices[0].message.content == alone([4, 8, 16, 5], "law", 5, chat=True)
    messages = [*messages, done.choices[0].message.model_dump(), {"role": "user", "content": "w9"}]
    assert served.client.chat.completions.create(model="law", messages=messages, max_tokens=1, seed=None)  # type: ignore[call-overload]


# --- what is refused ----------------------------------------------------------------------------------------------


def error_of(answer: Answer) -> dict[str, Any]:
    """The error of an answer, in OpenAI's form and without a word of our code."""
    assert answer.headers["content-type"].startswith("application/json")
    assert "Traceback" not in answer.text
    assert ".py" not in answer.text
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"model": "law"}, "prompt", "Field required"),
        ({"model": "law", "prompt": []}, "prompt", "empty"),
        ({"model": "law", "prompt": [[]]}, "prompt", "at least one"),
        ({"model": "law", "prompt": [1000]}, "prompt", "from 0 to 95"),
        ({"model": 3, "prompt": "w8"}, "model", "valid string"),
        ({"model": "law", "prompt": "w8", "max_tokens": 0}, "max_tokens", "greater than"),
        ({"model": "law", "prompt": "w8", "max_tokens": "9"}, "max_tokens", "valid integer"),
        (
            {"model": "law", "prompt": "w8", "max_tokens": 1000},
            "max_tokens",
            "and max_tokens=1000 are more than the 256",
        ),
        ({"model": "law", "prompt": [8] * 256}, "prompt", "a prompt of 256 tokens leaves none to generate"),
        ({"model": "law", "prompt": "w8", "temperature": 1e-5}, "temperature", "temperature=1e-05 must be 0, or"),
        ({"model": "law", "prompt": "w8", "temperature": 3}, "temperature", "less than or equal to 2"),
        ({"model": "law", "prompt": "w8", "n": 2}, "n", "nothing but 1 is supported: leave it out"),
        ({"model": "law", "prompt": "w8", "echo": True}, "echo", "nothing but false is supported: leave it out"),
        ({"model": "law", "prompt": "w8", "logprobs": 3}, "logprobs", "logprobs: it is not supported: leave it out"),
        ({"model": "law", "prompt": "w8", "logit_bias": {"5": 1}}, "logit_bias", "no effect here"),
        (
            {"model": "law", "prompt": ["w8", [5]]},
            "prompt",
            "prompt: it must be a string, a list of strings, a list of",
        ),
        ({"model": "law", "prompt": "w8", "stop": [1]}, "stop", "stop: it must be a string or a list of strings"),
        ({"model": "law", "prompt": "w8", "min_p": 0.1}, "min_p", "there is no such field here: leave it out"),
        ({"model": "law", "prompt": "w8", "max_token": 3}, "max_token", "leave it out. Did you mean 'max_tokens'?"),
        ({"model": "law", "prompt": "w8", "seed": 3, "temperature": 1}, "seed", "seed: it has no effect"),
        ({"model": "law", "prompt": "w8", "stop": [""]}, "stop", "1 to 200"),
        ({"model": "law", "prompt": "w8", "stop": list("abcde")}, "stop", "at most 4"),
        ({"model": "law", "prompt": ["w8", "w9"], "stream": True}, "prompt", "one prompt"),
        ({"model": "law", "prompt": ["w8"] * 9}, "prompt", "9 prompts, and the server holds 8 requests: send fewer"),
    ],
)
def test_bodies_that_ask_for_nothing_that_there_is(served, body, param, message) -> None:
    answer = served.post("/v1/completions", **body)
    assert answer.status_code == 400
    error = error_of(answer)
    assert message in error["message"]
    assert error["param"] == param
    assert served.engine.waiting == 0


def test_an_unknown_model_is_answered_with_those_that_there_are(served) -> None:
    for answer in (served.post("/v1/completions", model="laws", prompt="w8"), served.send("GET", "/v1/models/laws")):
        assert answer.status_code == 404
        error = error_of(answer)
        assert (error["code"], error["param"]) == ("model_not_found", "model")
        names = [model.id for model in served.client.models.list()]
        assert error["message"] == f"the model 'laws' does not exist; there are {names}. Did you mean 'law'?"


def test_a_message_of_another_role_is_not_to_be_left_out(served) -> None:
    answer = served.post("/v1/chat/completions", model="law", messages=[{"role": "tool", "content": "w8"}])
    assert "messages.0.role: Input should be 'system'" in error_of(answer)["message"]
    answer = served.post("/v1/chat/completions", model="law", messages=[{"role": "user", "content": 5}])
    assert error_of(answer)["message"].startswith("messages.0.content: it must be a string or a list of {")


@pytest.mark.parametrize(
    ("part", "message"),
    [({"type": "text", "text": "w8", "cache_control": {}}, "messages.1.content.1.cache_control: there is no such"),
     ({"type": "image_url", "image_url": {}}, "messages.1.content: it must be a string or a list of {"),
     ({"text": 5, "type": "text", "more": 1}, "messages.1.content: it must be a string or a list of {")],
)  # fmt: skip
def test_a_part_of_a_message_with_a_field_more_is_named(part: dict[str, Any], message: str) -> None:
    content = [{"type": "text", "text": "w8"}, part]
    body = {"model": "law", "messages": [{"role": "user", "content": "w8"}, {"role": "user", "content": content}]}
    with pytest.raises(WireError) as refused:
        read_body(ChatBody, json.dumps(body).encode())
    assert str(refused.value).startswith(message)
    assert refused.value.body["error"]["param"] == "messages"


@pytest.mark.parametrize(
    "more",
    [{"tools": [{"type": "function"}]}, {"response_format": {"type": "json_object"}}, {"logprobs": True},
     {"tool_choice": "required"}, {"store": True}, {"seed": 1, "temperature": 0.5}, {"top_logprobs": 2}],
)  # fmt: skip
def test_fields_that_would_have_no_effect_are_refused(served, more) -> None:
    answer = served.post("/v1/chat/completions", model="law", messages=[{"role": "user", "content": "w8"}], **more)
    assert answer.status_code == 400
    assert next(iter(more)) in error_of(answer)["message"]


@pytest.mark.parametrize(
    ("given", "param", "message"),
    [
        ({"max_tokens": 1000}, "max_tokens", "and max_tokens=1000 are more than"),
        ({"max_completion_tokens": 1000}, "max_completion_tokens", "and max_completion_tokens=1000 are more than"),
        ({"content": "w8 " * 300}, "messages", "leaves none to generate"),
        ({"seed": 1, "temperature": 0.5}, "seed", "no effect"),
    ],
)
def test_messages_name_the_fields_that_a_client_has_sent(served, given, param, message) -> None:
    content = given.pop("content", "w8")
    answer = served.post("/v1/chat/completions", model="law", messages=[{"role": "user", "content": content}], **given)
    assert answer.status_code == 400
    error = error_of(answer)
    assert error["param"] == param
    assert message in error["message"]
    assert "max_new_tokens" not in error["message"]


def test_replies_do_not_say_where_models_lie(served, folder, monkeypatch) -> None:
    """Neither the server's own base, nor the one that an adapter's config names."""
    shutil.copytree(folder / "chat", folder / "foreign")
    config = folder / "foreign" / "adapter_config.json"
    said = json.loads(config.read_text()) | {"base_model_name_or_path": "/home/someone/our bases/other"}
    config.write_text(json.dumps(said))
    monkeypatch.setattr(served.engine.model.config, "_name_or_path", "/srv/secret/base")
    try:
        answer = served.post("/v1/load_lora_adapter", lora_name="foreign")
        assert answer.status_code == 400
        assert "trained on 'other', this model is 'tiny'" in error_of(answer)["message"]
        for path in ("/v1/models", "/v1/models/law"):
            assert "secret" not in served.send("GET", path).text
    finally:
        shutil.rmtree(folder / "foreign")


def test_long_names_are_not_said_again(served) -> None:
    name = "x" * 3000
    answer = served.post("/v1/completions", model="law", prompt="w8", **{name: 1})
    assert answer.status_code == 400
    assert len(answer.text) < 500
    for answer in (
        served.post("/v1/completions", model=name, prompt="w8"),
        served.post("/v1/unload_lora_adapter", lora_name=name),
        served.send("GET", f"/v1/models/{name}"),
    ):
        assert answer.status_code == 404
        assert len(error_of(answer)["message"]) < 300


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'"x"', b"\xff\xfe", b"[" * 2000, b'{"model": NaN}'])
def test_bodies_that_are_none(served, content) -> None:
    answer = served.send("POST", "/v1/completions", content)
    assert answer.status_code == 400
    error_of(answer)


def test_bodies_that_are_too_large_are_not_read(served) -> None:
    answer = served.post("/v1/completions", model="law", prompt="w8 " * 2000)
    assert answer.status_code == 413
    assert "4000 bytes" in error_of(answer)["message"]


@pytest.mark.parametrize(
    ("name", "path", "status"),
    [
        ("x", "../secret", 400),
        ("x", "/etc", 400),
        ("x", "law/..", 400),
        ("..", None, 400),
        ("a.b", "law", 400),
        ("", None, 400),
        ("x" * 101, "law", 400),
        ("x", "absent", 404),
        ("notes", None, 404),
        ("law", None, 400),
        ("tiny", "law", 400),
        ("base_layer", "law", 400),
    ],
)
def test_only_adapters_of_the_folder_are_loaded_under_free_names(served, name, path, status) -> None:
    answer = served.post("/v1/load_lora_adapter", lora_name=name, **({} if path is None else {"lora_path": path}))
    assert answer.status_code == status
    error_of(answer)
    assert sorted(served.engine.adapters.names) == sorted(NAMES)


def test_links_out_of_the_folder_are_not_followed(served, folder, save, tmp_path) -> None:
    outside = save(tmp_path / "outside", "bottleneck")
    (folder / "linked").symlink_to(outside)
    shutil.copytree(outside, folder / "filled")
    (folder / "filled" / "adapter_model.safetensors").unlink()
    (folder / "filled" / "adapter_model.safetensors").symlink_to(outside / "adapter_model.safetensors")
    try:
        for name in ("linked", "filled"):
            assert served.post("/v1/load_lora_adapter", lora_name=name).status_code == 404
    finally:
        (folder / "linked").unlink()
        shutil.rmtree(folder / "filled")


def test_broken_adapter_is_refused_and_the_others_go_on(served, folder, alone) -> None:
    shutil.copytree(folder / "law", folder / "broken")
    weights = folder / "broken" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-40])
    try:
        answer = served.post("/v1/load_lora_adapter", lora_name="broken")
    finally:
        shutil.rmtree(folder / "broken")
    assert answer.status_code == 400
    message = error_of(answer)["message"]
    assert "cannot be read as weights" in message
    assert str(folder) not in message
    assert served.client.completions.create(model="law", prompt=WORDS, max_tokens=3).choices[0].text == alone(
        IDS, "law", 3
    )


def test_client_without_the_token_learns_nothing(served) -> None:
    wrong = openai.OpenAI(base_url=f"{served.url}/v1", api_key="another", max_retries=0)
    with pytest.raises(openai.AuthenticationError, match="send the server's token"):
        wrong.models.list()
    wrong.close()
    for headers in ({}, {"Authorization": TOKEN}, {"Authorization": "Bearer "}, {"Authorization": "Bearer \xe9"}):
        given = {name: value.encode("latin-1") for name, value in headers.items()}
        answer = ask(served.port, "POST", "/v1/completions", b"x" * 10, given)
        assert answer.status_code == 401
        error_of(answer)


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/v1/nothing", 404), ("GET", "/v1/completions", 405)])
def test_paths_that_there_are_not(served, method, path, status) -> None:
    answer = served.send(method, path)
    assert answer.status_code == status
    error_of(answer)


def test_error_of_the_server_says_nothing_of_it(served, monkeypatch, caplog) -> None:
    monkeypatch.setattr(served.engine, "submit", lambda *a, **k: {}["secret key"])
    answer = served.post("/v1/completions", model="law", prompt="w8")
    assert answer.status_code == 500
    assert error_of(answer)["message"] == "an error of the server"
    assert "secret key" in caplog.text


def test_full_server_answers_429_and_the_client_may_come_again(served) -> None:
    held = [served.engine.submit(IDS, "law", max_new_tokens=240) for _ in range(8)]
    with pytest.raises(openai.RateLimitError) as caught:
        served.client.completions.create(model="law", prompt=WORDS)
    assert caught.value.response.headers["retry-after"] == "1"
    for request in held:
        request.cancel()
    again = served.client.with_options(max_retries=3).completions.create(model="law", prompt=WORDS, max_tokens=2)
    assert again.usage.completion_tokens == 2


def waits_until(condition: Any, seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


@pytest.mark.parametrize("stream", [True, False])
def test_client_that_is_gone_frees_its_place(served, alone, stream) -> None:
    """As by kill -9: the connection is reset in the middle of an answer."""
    body = json.dumps({"model": "law", "prompt": WORDS, "max_tokens": 250, "stream": stream}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    connection = socket.create_connection(("127.0.0.1", served.port))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
    connection.sendall(head.encode() + body)
    assert waits_until(lambda: served.engine.waiting == 1)
    if stream:
        connection.recv(10)
    connection.close()
    assert waits_until(lambda: served.engine.waiting == 0, 5)
    assert served.client.completions.create(model="law", prompt=WORDS, max_tokens=2).choices[0].text == alone(
        IDS, "law", 2
    )


# --- health, metrics, begin and end -------------------------------------------------------------------------------


def test_metrics_count_requests_tokens_and_answers(served) -> None:
    names = ("requests_total", "prompt_tokens_total", "generated_tokens_total", 'answers_total{path="/v1/completions"',
             "adapter_hits_total ", "adapter_misses_total ", "wait_seconds_count", "first_token_seconds_count",
             "request_seconds_count")  # fmt: skip

    def values() -> list[float]:
        """Of one moment: requests of other tests, whose clients have gone, may still end."""
        lines = ask(served.port, "GET", "/metrics").text.splitlines()
        held.append(next(float(line.split()[-1]) for line in lines if line.startswith("mixadapters_requests_held")))
        return [sum(float(s.split()[-1]) for s in lines if s.startswith(f"mixadapters_{name}")) for name in names]

    held: list[float] = []
    assert waits_until(lambda: values() == values() and held[-2:] == [0, 0])  # what has been given up is counted
    before = values()
    served.client.completions.create(model="law", prompt=WORDS, max_tokens=7)
    assert waits_until(lambda: values()[0] > before[0])  # it is counted after its client has the answer
    assert [new - old for new, old in zip(values(), before, strict=True)] == [1, 5, 7, 1, 1, 0, 1, 1, 1]
    gauges = dict(
        line.removeprefix("mixadapters_").split() for line in ask(served.port, "GET", "/metrics").text.splitlines()
        if line.startswith(("mixadapters_adapters ", "mixadapters_resident_adapters ", "mixadapters_up "))
    )  # fmt: skip
    assert gauges == {"adapters": "3.0", "resident_adapters": "3.0", "up": "1.0"}
    assert ask(served.port, "GET", "/health").json() == {"status": "ok"}


def test_metrics_say_how_requests_end(served, alone) -> None:
    def ended(how: str) -> float:
        lines = ask(served.port, "GET", "/metrics").text.splitlines()
        return sum(
            float(line.split()[-1]) for line in lines if line.startswith(f'mixadapters_requests_total{{how="{how}"')
        )

    done, cancelled = ended("done"), ended("RequestCancelled")
    served.client.completions.create(model="law", prompt=WORDS, max_tokens=12, stop=alone(IDS, "law", 12).split()[4])
    assert (ended("done"), ended("RequestCancelled")) == (done + 1, cancelled)
    with served.client.completions.create(model="law", prompt=WORDS, max_tokens=250, stream=True) as stream:
        next(iter(stream))
    assert waits_until(lambda: ended("RequestCancelled") == cancelled + 1, 5)
    assert ended("done") == done + 1


def test_file_that_cannot_be_read_any_more_is_named_and_the_others_are_served(
    causal, save, monkeypatch, tmp_path, alone
) -> None:
    """Neither the server's own nor that of the adapter; of either the client learns the name alone."""
    for name in ("one", "two"):
        save(tmp_path / "adapters" / name, "lora", 3)
    (tmp_path / "away").mkdir()
    monkeypatch.setenv("MIXADAPTERS_TOKEN", TOKEN)
    options = ["--max-resident", "1", "--offload-folder", str(tmp_path / "away")]
    served, thread = running(causal(), tmp_path / "adapters", *options)
    try:
        (file,) = (tmp_path / "away").rglob("*.safetensors")  # of "two": the first of its form comes into the model
        file.write_bytes(file.read_bytes()[:-4])
        shutil.rmtree(tmp_path / "adapters" / "two")
        for stream in (False, True):
            answer = served.post("/v1/completions", model="two", prompt=WORDS, max_tokens=3, stream=stream)
            assert answer.status_code == (200 if stream else 500)  # of a stream it has been said
            text = answer.text.removeprefix("data: ").strip() if stream else answer.text
            error = json.loads(text)["error"]
            assert error["code"] == "adapter_unreadable"
            assert f"adapter 'two' cannot come into the model: its file '{file.name}': cannot be" in error["message"]
            assert "Its folder 'two' has gone or changed since it was loaded: unload the adapter" in error["message"]
            assert str(tmp_path) not in error["message"]
            assert served.client.completions.create(model="one", prompt=WORDS, max_tokens=3).choices[0].text == alone(
                IDS, "chat", 3
            )
    finally:
        served.client.close()
        served.server.should_exit = True
        thread.join(30)


def test_folder_that_cannot_be_served_is_left_out_and_said(causal, folder, monkeypatch, caplog, tmp_path) -> None:
    monkeypatch.delenv("MIXADAPTERS_TOKEN", raising=False)
    shutil.copytree(folder / "law", tmp_path / "law")
    shutil.copytree(folder / "law", tmp_path / "cut")
    weights = tmp_path / "cut" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-40])
    shutil.copytree(folder / "law", tmp_path / "a name.v2")
    shutil.copytree(folder / "law", tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "link").symlink_to(tmp_path / "law")
    found, thread = running(causal(), tmp_path)
    try:
        assert "adapter 'cut' is left out" in caplog.text
        for name, why in {
            "a name.v2": "its name may have letters", "bare": "it holds no adapter_model.safetensors",
            "link": "it is a link",
        }.items():  # fmt: skip
            assert f"folder {name!r} is left out: {why}" in caplog.text
        assert (
            "it holds no adapter_model" in error_of(found.post("/v1/completions", model="bare", prompt="w"))["message"]
        )
        assert [model.id for model in found.client.models.list()] == ["tiny", "law"]
        for answer in (found.post("/v1/completions", model="cut", prompt="w8"), found.send("GET", "/v1/models/cut")):
            assert answer.status_code == 404
            assert "its folder could not be served" in error_of(answer)["message"]
            assert str(tmp_path) not in answer.text
        weights.write_bytes(whole)
        assert found.post("/v1/load_lora_adapter", lora_name="cut").status_code == 200
        assert found.post("/v1/completions", model="cut", prompt="w8", max_tokens=1).status_code == 200
    finally:
        found.client.close()
        found.server.should_exit = True
        thread.join(30)


def test_what_follows_the_server_is_run_after_a_signal(causal, folder, monkeypatch) -> None:
    monkeypatch.delenv("MIXADAPTERS_TOKEN", raising=False)
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    options = arguments().parse_args(["--base", "tiny", "--adapters", str(folder), "--port", str(free_port())])
    server = http_server(options, causal(), word_tokenizer())
    timer = threading.Thread(
        target=lambda: (waits_until(lambda: server.started), os.kill(os.getpid(), signal.SIGTERM))
    )
    try:
        timer.start()
        server.serve_until_stopped()
    finally:
        timer.join()
        signal.signal(signal.SIGTERM, before)
    assert seen == []
    assert not server.engine.running


@pytest.mark.parametrize(
    "wrong",
    [("--deadline", "-1"), ("--deadline", "nan"), ("--grace", "-1"), ("--dtype", "float99"), ("--port", "70000"),
     ("--max-requests", "0"), ("--device", "abacus"), ("--largest-body", "x")],
)  # fmt: skip
def test_arguments_out_of_range_are_refused_before_anything_is_read(wrong, capsys) -> None:
    with pytest.raises(SystemExit):
        arguments().parse_args(["--base", "tiny", "--adapters", ".", *wrong])
    assert f"error: argument {wrong[0]}: " in capsys.readouterr().err


def test_signal_lets_requests_end_and_fails_those_that_do_not(causal, folder, monkeypatch) -> None:
    monkeypatch.delenv("MIXADAPTERS_TOKEN", raising=False)
    found, thread = running(causal(), folder, "--grace", "0.3")
    slow, step = threading.Event(), found.engine._book.before_step
    monkeypatch.setattr(found.engine._book, "before_step", lambda: (slow.is_set() and time.sleep(0.05), step()))
    stream = found.client.completions.create(model="law", prompt=WORDS, max_tokens=250, stream=True)
    first = next(iter(stream))
    slow.set()
    found.server.handle_exit(signal.SIGTERM, None)
    with pytest.raises(openai.APIError, match="stopped or is stopping"):
        list(stream)
    assert first.choices[0].text
    thread.join(20)
    assert not thread.is_alive()
    assert not found.engine.running
    found.client.close()


def test_open_host_needs_a_token(causal, folder, monkeypatch) -> None:
    monkeypatch.delenv("MIXADAPTERS_TOKEN", raising=False)
    options = arguments().parse_args(["--base", "tiny", "--adapters", str(folder), "--host", "0.0.0.0"])
    with pytest.raises(ValueError, match=r"0\.0\.0\.0 is open to others: set a token"):
        http_server(options, causal(), word_tokenizer())
    options = arguments().parse_args(["--base", "tiny", "--adapters", str(folder / "law" / "absent")])
    with pytest.raises(ValueError, match="is no folder of adapters"):
        http_server(options, causal(), word_tokenizer())


def test_uvicorn_has_the_seam_that_ends_the_engine() -> None:
    assert callable(uvicorn.Server.handle_exit)
