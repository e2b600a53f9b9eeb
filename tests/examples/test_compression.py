"""The study of compression, on tiny sizes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def study(monkeypatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "studies"))
    import compression

    yield compression
    del sys.modules["compression"]


def test_each_form_is_measured_in_loss_and_in_bytes_on_disk(study, monkeypatch, tmp_path) -> None:
    forms = {name: options for name, options in study.FORMS.items() if options.get("codec") != "qmoe"}
    monkeypatch.setattr(study, "FORMS", forms)  # rows of this width are too narrow for words
    sizes = {"steps": 2, "width": 16, "batch": 2, "length": 16}
    (run,) = study.main(study.Arguments(out=str(tmp_path), seeds=[3], **sizes))
    assert run["rows"].keys() == {"no experts", "float32", *forms}
    assert run["rows"]["float32"]["bytes"] == 4 * 2 * 8 * 3 * 16 * 64
    for name, options in forms.items():
        if "codec" in options:
            assert run["rows"][name]["on_disk"] == run["rows"][name]["bytes"]
    assert len((tmp_path / "table.md").read_text().splitlines()) == 4 + len(forms)


def test_no_file_is_both_trained_on_and_tested_on(study) -> None:
    train, test = study.texts()
    assert 0.02 < len(test) / (len(train) + len(test)) < 0.4
    assert bytes(test[:200].tolist()) not in bytes(train.tolist())
