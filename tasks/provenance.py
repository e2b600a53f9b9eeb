"""What a result stands on: fingerprints, versions, the commit."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

FORMAT = 1  # of result files
PACKAGES = ("mixadapters", "torch", "transformers", "peft", "accelerate", "datasets", "scikit-learn", "numpy")


def fingerprint(content: Any) -> str:
    """A short hash of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:12]


def provenance() -> dict[str, Any]:
    """Versions of packages, the commit and the device."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {"versions": found, "commit": commit(), "device": device}


@cache
def commit() -> str | None:
    """The commit of the checkout that this package runs from, with + where it was changed; None elsewhere."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--dirty=+"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
