"""The demo of serving: what it prepares is served."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from mixadapters.serving.__main__ import arguments
from mixadapters.serving.http_server import http_server

DEMO = Path(__file__).resolve().parents[2] / "examples" / "serve_demo.py"


def test_each_adapter_of_the_demo_says_something_else(tmp_path) -> None:
    spec = importlib.util.spec_from_file_location("serve_demo", DEMO)
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    demo.prepare(tmp_path)
    options = arguments().parse_args(["--base", f"{tmp_path}/tiny", "--adapters", f"{tmp_path}/adapters"])
    model = AutoModelForCausalLM.from_pretrained(options.base)
    engine = http_server(options, model, AutoTokenizer.from_pretrained(options.base)).engine
    with engine:
        said = {
            name: engine.submit("the court says that", name, max_new_tokens=8).result(30).tokens
            for name in ("law", "code", "mixture", "__base__")
        }
    assert len({tuple(tokens) for tokens in said.values()}) == 4
    assert '"model": "law"' in demo.CURL.format(port=8000)
