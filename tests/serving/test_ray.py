"""The page's deployment of Ray Serve, on a Ray of this machine (where `ray[serve]` is installed)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from served import generated, word_tokenizer

from mixadapters.serving import AdapterServer

ray = pytest.importorskip("ray")
serve = pytest.importorskip("ray.serve")
PAGE = Path(__file__).parents[2] / "docs" / "serving.md"
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def test_replica_of_the_page_answers_as_the_model_alone(causal, save, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # else it leaves a token in the user's home
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    (code,) = [block for block in re.findall(r"```python no-run\n(.*?)```", PAGE.read_text(), re.S) if "ray" in block]
    found: dict[str, Any] = {"__name__": "__main__"}  # so that Ray sends the class itself to its processes
    exec(code, found)
    causal().save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    folders = {name: str(save(tmp_path / name, kind, 3)) for name, kind in (("law", "bottleneck"), ("code", "moa"))}
    quiet, tokenizer = AdapterServer(causal()), word_tokenizer()
    for name, folder in folders.items():
        quiet.load(name, folder)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(proxy_location="Disabled")  # no HTTP of Ray's: the handle is asked
        handle = serve.run(found["Adapters"].bind(str(tmp_path / "base"), folders, "cpu"))
        for name in (*folders, "__base__"):
            expected = tokenizer.decode(generated(quiet.model, [8, 16, 9], name, 5), skip_special_tokens=True)
            assert handle.remote("w8 w16 w9", name, 5).result(timeout_s=60) == expected
        with pytest.raises(Exception, match="no adapter 'none'"):
            handle.remote("w8", "none").result(timeout_s=60)
    finally:
        serve.shutdown()
        ray.shutdown()
