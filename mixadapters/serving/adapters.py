"""The adapters that a server has: read from folders, tried before the first request, held while requests use them."""

from __future__ import annotations

import logging
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import Tensor, nn

from mixadapters.core.base_digest import warn_of_other_base
from mixadapters.core.context import ForwardContext
from mixadapters.core.fields import check_kind
from mixadapters.core.injection import base_parts
from mixadapters.core.names import check_name
from mixadapters.core.registry import nearest
from mixadapters.core.rows import BASE
from mixadapters.serving.forms import Form, Found, read_folder
from mixadapters.serving.requests import AdapterUnreadable, UnknownAdapter
from mixadapters.serving.residency import Residents
from mixadapters.serving.trials import Trials, foreign_names, refuse
from mixadapters.tuners.sources import refuse_other_base

logger = logging.getLogger(__name__)
SHOWN = 20  # names in a message
Changing = Any  # () -> a context in which no forward runs


class Source(NamedTuple):
    """The folder that an adapter was read from."""

    folder: Path
    files: tuple[Any, ...]  # what the system said of them: once one has been written to, it says something else

    @classmethod
    def of(cls, folder: str | Path) -> Source:
        path, found = Path(folder).absolute(), []
        for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
            with suppress(OSError):  # who reads it says so
                stat = os.stat(path / name)
                found.append((name, stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns))
        return cls(path, tuple(found))


@dataclass(eq=False)
class Served:
    """What is noted of an adapter that requests may name."""

    source: Source | None  # None: it came with the model
    remembers: bool  # whether it has routers that keep something of a request's earlier tokens
    users: int = 0  # requests that name it
    running: int = 0  # those of them that steps may hold
    leaving: bool = False  # whether it goes when nobody uses it any more


class ServedAdapters:
    """The adapters of one model, by the names that requests give.

    Args:
        model: the root, a model of transformers. Adapters of our types that it has are served too.
        changing: () -> a context manager inside which no forward of the model runs.
        max_resident: how many lie in the model at a time; the others wait in host memory. None: all.
        check_base_model: whether an adapter that names another base model than this one is refused.
        offload_folder: the others wait in files there.
        ready: called, in another thread, when an adapter has come from its file.

    Raises:
        ValueError: the model has active adapters that are not of our types: they would act on every request.
    """

    def __init__(
        self, model: nn.Module, changing: Changing, max_resident: int | None = None, check_base_model: bool = True,
        offload_folder: Path | None = None, ready: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self.model: Any = model
        self.changing = changing
        self.check_base_model = check_base_model
        self.context = ForwardContext.of(model)
        self._lock = threading.Lock()
        self._served: dict[str, Served] = {}
        self._versions: Counter[str] = Counter()  # how often a name has been given to an adapter
        self._refused: dict[str, str] = {}  # adapters that are there and cannot be served -> why
        self._coming: set[str] = set()
        self._forms: WeakValueDictionary[str, Form] = WeakValueDictionary()  # as long as one of them is served
        self.hits = self.misses = 0
        self._names_inside = frozenset({*base_parts(model), *foreign_names(model)})
        self.residents = Residents(model, self.context, max_resident, self._is_idle, offload_folder, ready)
        self._trials = Trials(model, self.residents)
        for name in list(getattr(model, "peft_config", {})):
            if name in self.context.hosted:
                reason = self._trials.refusal(name)
                if reason is None:
                    self._enlist_resident(name)
                else:
                    self._refused[name] = reason

    # --- for requests -------------------------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        """Those that requests may name, beside "__base__"."""
        with self._lock:
            return self._names()

    def _names(self) -> list[str]:
        return [name for name, served in self._served.items() if not served.leaving]

    def hold(self, name: str) -> None:
        """A request uses the adapter from now on.

        Raises:
            UnknownAdapter: there is none of this name, or it is being unloaded.
            AdapterRefused: it cannot be right among packed requests; the message says why.
        """
        with self._lock:
            refuse(name, self._refused.get(name))
            if name == BASE:
                return
            served = self._served.get(name)
            if served is None or served.leaving:
                raise self._unknown(name)
            served.users += 1
            resident = name in self.residents
            self.hits, self.misses = self.hits + resident, self.misses + (not resident)

    def _unknown(self, name: str) -> UnknownAdapter:
        have, leaving = self._names(), name in self._served
        gone = " (it is being unloaded)" if leaving else ""
        shown = f"{[BASE, *have]}" if len(have) < SHOWN else f"{len(have)} others"
        said = f"no adapter {name!r:.100}{gone}; have {shown}.{nearest(name[:100], have)}"
        return UnknownAdapter(said, leaving=leaving)

    def begin(self, name: str) -> bool:
        """A request of the adapter may be in the next steps. To be called where no forward runs.

        Returns:
            False where the adapter is not in the model, and all that are there are in use, or it is being read.

        Raises:
            AdapterUnreadable: its weights cannot be read, from its folder neither, or there is no room for others.
        """
        if name == BASE:
            return True
        try:
            inside = self.residents.use(name)
        except ValueError as error:
            self._read_again(name, error)
            inside = self.residents.use(name)
        with self._lock:
            self._served[name].running += inside
        return inside

    def release(self, name: str, began: bool) -> None:
        """A request uses it no more."""
        if name != BASE:
            with self._lock:
                self._served[name].users -= 1
                self._served[name].running -= began

    def _is_idle(self, name: str) -> bool:
        """Whether no step holds a request of the adapter."""
        return name not in self._served or not self._served[name].running

    def _is_wanted(self, name: str) -> bool:
        """Whether a request names the adapter."""
        return name in self._served and self._served[name].users > 0

    def remembers(self, name: str) -> bool:
        """Whether the adapter has routers that keep something of a request's earlier tokens."""
        return name in self._served and self._served[name].remembers

    def salt(self, name: str) -> str:
        """Requests of other adapters, or of earlier ones of the name, have another."""
        return f"{name}/{self._versions[name]}"

    # --- adapters that come and go ------------------------------------------------------------------------------

    def load(self, name: str, folder: str | Path) -> None:
        """Read an adapter of our types, or a PEFT LoRA, from a folder and try it.

        Where one of its form has been tried, its numbers are looked at and forwards go on: it comes into the model
        when a request names it.

        Raises:
            ValueError: the name is taken or the folder is not whole; nothing has been changed.
            AdapterRefused: it cannot be right among packed requests, or its first forward fails; it has been taken
                out again.
            AdapterUnreadable: `offload_folder` has no room for it or for the one that was to make room.
        """
        check_kind("folder", folder, (str, PathLike), "the path of a folder")
        with self._claimed(name):
            source = Source.of(folder)
            with _readable(name):
                found = read_folder(folder, self._forms)
            if self.check_base_model:
                theirs = found.saved.config.get("base_model_name_or_path")
                remedy = "check_base_model=False (--no-check-base-model)"
                refuse_other_base(self.model, theirs, f"adapter {name!r}", remedy)
            if (untried := self._untried(name, found)) is not None:
                warn_of_other_base(self.model, found.saved.config.get("base_digest"), f"adapter {name!r}")
                self.residents.wait(name, *untried)
                self._enlist(name, untried[0].remembers, source)
                return
            with self.changing():
                self._enlist_resident(name, self._try(name, folder, found), source)

    def _try(self, name: str, folder: str | Path, found: Found) -> Form | None:
        """Put an adapter into the model and try it. Returns its form, where others of it need no trial."""
        with self.residents.alone(), _readable(name):
            form = self._trials.load(name, folder, found)
        if form is not None:
            self._forms[found.key] = form
        return form

    def _read_again(self, name: str, error: Exception) -> None:
        """Have an adapter whose weights outside the model cannot be read from the folder that it came from.

        Raises:
            AdapterUnreadable: that is not there any more, or holds something else by now.
        """
        said, source = f"adapter {name!r} cannot come into the model: {error}", self._served[name].source
        if source is None:
            raise AdapterUnreadable(f"{said}. It came with the model, and no folder has it: start the server anew")
        if source != Source.of(source.folder):
            raise AdapterUnreadable(
                f"{said}. Its folder {str(source.folder)!r} has gone or changed since it was loaded: unload the "
                "adapter, and load it again"
            )
        try:
            found = read_folder(source.folder, self._forms)
            if (untried := self._untried(name, found)) is not None:
                self.residents.restore(name, *untried)
            else:
                self.residents.forget(name)
                form = self._try(name, source.folder, found)
                self.residents.enlist(name, form)
        except (OSError, ValueError) as why:
            raise AdapterUnreadable(f"{said}. Nor can its folder {str(source.folder)!r} be read: {why}") from why
        logger.warning("adapter %r has been read from its folder again: %s", name, error)

    @contextmanager
    def _claimed(self, name: str) -> Iterator[None]:
        """Inside, nobody else gives the name to an adapter. Raises ValueError where it has one, or is about to."""
        with self._lock:
            if name == BASE or name in self._served or name in self._refused or name in self._coming:
                raise ValueError(f"adapter name {name!r} is taken; unload that first, or choose another")
            self._coming.add(name)
        try:
            yield
        finally:
            self._coming.discard(name)

    def _untried(self, name: str, found: Found) -> tuple[Form, dict[str, Tensor]] | None:
        """Form and weights of an adapter that comes into the model under this name without a trial; None: with one.

        Raises:
            ValueError: nothing can have this name.
        """
        form = found.form
        if form is None or found.weights is None or not form.open or name in self._names_inside:
            return None
        check_name("adapter_name", name, form.parts.at[0][0].prefix)
        return form, found.weights

    def unload(self, name: str) -> bool:
        """Take an adapter out: at once, or when the requests that use it are done; new ones are refused from now on.

        Returns:
            Whether it is out already.

        Raises:
            UnknownAdapter: there is none of this name.
        """
        if name == BASE:
            raise UnknownAdapter(f"{BASE!r} is the base model, which is not unloaded")
        check_kind("name", name, str, "the name of an adapter")
        with self._lock:
            if name not in self._served:
                raise self._unknown(name)
            self._served[name].leaving = True
        with self.changing():
            self.sweep()
        return name not in self._served

    def sweep(self) -> None:
        """Take out the adapters that are to go and that no request uses. To be called where no forward runs."""
        with self._lock:
            going = [name for name, served in self._served.items() if served.leaving and not served.users]
            for name in going:
                del self._served[name]
        for name in going:
            self.residents.forget(name)
        self.residents.drop_unwanted(self._is_wanted)

    def _enlist_resident(self, name: str, form: Form | None = None, source: Source | None = None) -> None:
        remembers = self.residents.parts_in(name).remember
        self.residents.enlist(name, form)
        self._enlist(name, remembers, source)

    def _enlist(self, name: str, remembers: bool, source: Source | None) -> None:
        with self._lock:
            self._served[name] = Served(source, remembers)
            self._versions[name] += 1


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """Inside, the folder of an adapter is read. It may go meanwhile: what the system says of that is a ValueError."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"adapter {name!r}: its folder cannot be read: {error}") from error
