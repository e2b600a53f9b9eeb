"""The folder whose subfolders are the adapters of a server. Names come from strangers: none leads out of it."""

from __future__ import annotations

import re
from pathlib import Path

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")  # a dot would be a part of keys


class AdapterFolder:
    """Adapters by the names of their folders.

    Raises:
        ValueError: there is no such folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).resolve()
        if not self.path.is_dir():
            raise ValueError(f"{str(path)!r} is no folder of adapters")

    def names(self) -> list[str]:
        """Those of the subfolders that hold an adapter."""
        return sorted(entry.name for entry in self.path.iterdir() if self._holds(entry))

    def passed_over(self) -> dict[str, str]:
        """The subfolders that are no adapters to serve -> why."""
        found = {}
        for entry in sorted(self.path.iterdir()):
            if entry.is_dir() and not self._holds(entry):
                files = [CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME]
                lacking = [name for name in files if (entry / name).is_symlink() or not (entry / name).is_file()]
                if entry.is_symlink():
                    found[entry.name] = "it is a link, which is not followed"
                elif not NAME.fullmatch(entry.name):
                    found[entry.name] = "its name may have letters, digits, '_' and '-' only"
                else:
                    found[entry.name] = f"it holds no {' and no '.join(lacking)}"
        return found

    @staticmethod
    def check(name: str) -> None:
        """Raises ValueError for what can be no name."""
        if not NAME.fullmatch(name):
            raise ValueError(f"{name!r:.100} is no name of an adapter: letters, digits, '_' and '-' only")

    def find(self, name: str) -> Path:
        """The folder of an adapter.

        Raises:
            ValueError: no name of an adapter, but a path, say.
            FileNotFoundError: the folder holds none of this name.
        """
        self.check(name)
        if not self._holds(self.path / name):
            raise FileNotFoundError(f"the served folder holds no adapter {name!r}")
        return self.path / name

    def _holds(self, entry: Path) -> bool:
        """Whether there is an adapter whose files lie here: links are not followed."""
        if not NAME.fullmatch(entry.name) or entry.is_symlink() or not entry.is_dir():
            return False
        files = [entry / CONFIG_NAME, entry / SAFETENSORS_WEIGHTS_NAME]
        return all(file.is_file() and not file.is_symlink() for file in files)
