"""The adapters that a server has: read from folders, tried before the first request, held while requests use them."""

from __future__ import annotations

import re
import threading
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME, AuxiliaryTrainingWrapper
from torch import nn

from mixadapters.core.context import ForwardContext
from mixadapters.core.files import PREFIX, SavedAdapter, loading, read_adapter, weights_of
from mixadapters.core.layer import AdapterHost
from mixadapters.core.registry import nearest
from mixadapters.core.rows import BASE
from mixadapters.core.sites import unwrapped
from mixadapters.serving.requests import AdapterRefused, UnknownAdapter
from mixadapters.serving.residency import Residents
from mixadapters.tuners import MoAConfig
from mixadapters.tuners.registration import config_class
from mixadapters.tuners.sources import refuse_other_base

LORA = "expert0"  # the name of a PEFT LoRA in the mixture of one expert that it is served as
SHOWN = 20  # names in a message
Changing = Any  # () -> a context in which no forward runs


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
        self._users: Counter[str] = Counter()  # requests that name it
        self._running: Counter[str] = Counter()  # those of them that steps may hold
        self._versions: Counter[str] = Counter()  # how often a name has been given to an adapter
        self._refused: dict[str, str] = {}  # adapters that are there and cannot be served -> why
        self._leaving: set[str] = set()
        self._remembering: set[str] = set()
        self._served: dict[str, None] = {}
        self.hits = self.misses = 0
        self._refuse_foreign()
        self.residents = Residents(
            model, self.context, max_resident, lambda name: not self._running[name], offload_folder, ready
        )
        for name in list(getattr(model, "peft_config", {})):
            if name in self.context.hosted:
                reason = self._refusal(name)
                if reason is None:
                    self._enlist(name)
                else:
                    self._refused[name] = reason

    def _refuse_foreign(self) -> None:
        for path, module in self.model.named_modules():
            foreign = isinstance(module, BaseTunerLayer) and not isinstance(module, AdapterHost)
            if foreign and module.active_adapters and not module.disable_adapters:
                raise ValueError(
                    f"{path!r} has PEFT's own adapters {list(module.active_adapters)}, which would act on every "
                    "request: load their folders by the server, into a model without them"
                )

    # --- for requests -------------------------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        """Those that requests may name, beside "__base__"."""
        with self._lock:
            return [name for name in self._served if name not in self._leaving]

    def hold(self, name: str) -> None:
        """A request uses the adapter from now on.

        Raises:
            UnknownAdapter: there is none of this name, or it is being unloaded.
            AdapterRefused: it cannot be right among packed requests; the message says why.
        """
        with self._lock:
            self._refuse(name, self._refused.get(name))
            if name != BASE and (name not in self._served or name in self._leaving):
                raise self._unknown(name)
            self._users[name] += 1
            if name != BASE:
                resident = name in self.residents
                self.hits, self.misses = self.hits + resident, self.misses + (not resident)

    def _unknown(self, name: str) -> UnknownAdapter:
        have = [other for other in self._served if other not in self._leaving]
        gone = " (it is being unloaded)" if name in self._leaving else ""
        shown = f"{[BASE, *have]}" if len(have) < SHOWN else f"{len(have)} others"
        return UnknownAdapter(f"no adapter {name!r:.100}{gone}; have {shown}.{nearest(name[:100], have)}")

    def begin(self, name: str) -> bool:
        """A request of the adapter may be in the next steps. To be called where no forward runs.

        Returns:
            False where the adapter is not in the model, and all that are there are in use, or it is being read.

        Raises:
            OSError, ValueError: its weights cannot be read.
        """
        if name != BASE and not self.residents.use(name):
            return False
        with self._lock:
            self._running[name] += 1
        return True

    def release(self, name: str, began: bool) -> None:
        """A request uses it no more."""
        with self._lock:
            self._users[name] -= 1
            self._running[name] -= began

    def remembers(self, name: str) -> bool:
        """Whether the adapter has gates that keep something of a request's earlier tokens."""
        return name in self._remembering

    def salt(self, name: str) -> str:
        """Requests of other adapters, or of earlier ones of the name, have another."""
        return f"{name}/{self._versions[name]}"

    # --- adapters that come and go ------------------------------------------------------------------------------

    def load(self, name: str, folder: str | Path) -> None:
        """Read an adapter of our types, or a PEFT LoRA, from a folder and try it.

        Raises:
            ValueError: the name is taken or the folder is not whole; nothing has been changed.
            AdapterRefused: it cannot be right among packed requests, or its first forward fails; it has been taken
                out again.
        """
        kind, saved = check_folder(folder)
        with self.changing():
            if name == BASE or name in self._served or name in self._refused:
                raise ValueError(f"adapter name {name!r} is taken; unload that first, or choose another")
            with self.residents.alone():
                self._load_and_try(name, folder, kind, saved)
            self._enlist(name)

    def _load_and_try(self, name: str, folder: str | Path, kind: str, saved: SavedAdapter) -> None:
        if self.check_base_model:
            theirs = saved.config.get("base_model_name_or_path")
            remedy = "check_base_model=False (--no-check-base-model)"
            refuse_other_base(self.model, theirs, f"adapter {name!r}", remedy)
        if kind == "LORA":
            source = {LORA: {"source": str(folder), "check_base_model": False}}  # it has been
            config: Any = MoAConfig(experts=source, router={"kind": "single"}, num_experts_per_tok=None)
            self._inject(name, config, None)
        else:
            self._inject(name, PeftConfig.from_pretrained(str(folder)), saved)
        try:
            self._refuse(name, self._refusal(name))
            if kind != "LORA":
                self._fill(name, Path(folder) / SAFETENSORS_WEIGHTS_NAME)
            self.model.eval()
            self._refuse(name, self._trial(name))
        except BaseException:
            self.residents.forget(name)
            raise

    def _inject(self, name: str, config: Any, saved: SavedAdapter | None) -> None:
        """Put an adapter into the model, or leave it as it was."""
        config.inference_mode = True
        with warnings.catch_warnings(), loading(saved):
            warnings.simplefilter("ignore")  # "Already found a `peft_config`": so it should be
            try:
                inject_adapter_in_model(config, self.model, name)
            except re.error as error:  # of the folder's config
                raise ValueError(
                    f"adapter {name!r}: a pattern of its config is no regular expression: {error}"
                ) from None
        self.residents.find_hosts()

    def _fill(self, name: str, path: Path) -> None:
        """Read the weights of an adapter that is in the model.

        Raises:
            ValueError: the file has not these weights, and no others: embeddings would be those of all requests.
        """
        own = {host.path: adapter for host, adapter in self.residents.parts_of(name)}
        mark = f".{self.residents.parts_of(name)[0][0].prefix}adapters."
        parts: dict[str, dict[str, Any]] = {place: {} for place in own}
        with weights_of(path) as weights:
            for key in weights:
                place, found, rest = key.removeprefix(PREFIX).partition(mark)
                if not found or place not in parts:
                    raise ValueError(f"{str(path)!r} holds {key!r}, which is no weight of this adapter's own")
                parts[place][rest] = weights[key]
        for place, adapter in own.items():
            try:
                adapter.load_state_dict(parts[place])
            except RuntimeError as error:
                raise ValueError(f"{str(path)!r} does not fit {place!r}: {error}") from None

    def unload(self, name: str) -> bool:
        """Take an adapter out: at once, or when the requests that use it are done; new ones are refused from now on.

        Returns:
            Whether it is out already.

        Raises:
            UnknownAdapter: there is none of this name.
        """
        if name == BASE:
            raise UnknownAdapter(f"{BASE!r} is the base model, which is not unloaded")
        with self._lock:
            if name not in self._served:
                raise self._unknown(name)
            self._leaving.add(name)
        with self.changing():
            self.sweep()
        return name not in self._served

    def sweep(self) -> None:
        """Take out the adapters that are to go and that no request uses. To be called where no forward runs."""
        with self._lock:
            going = [name for name in self._leaving if not self._users[name]]
            for name in going:
                self._leaving.discard(name)
                del self._served[name]
        for name in going:
            self.residents.forget(name)
        self.residents.drop_unwanted(lambda name: bool(self._users[name]))

    def _enlist(self, name: str) -> None:
        remembers = any(host.by_request(name) for host, _ in self.residents.parts_of(name))
        self.residents.enlist(name)
        with self._lock:
            (self._remembering.add if remembers else self._remembering.discard)(name)
            self._served[name] = None
            self._versions[name] += 1

    # --- what cannot be served ----------------------------------------------------------------------------------

    def _refusal(self, name: str) -> str | None:
        """Why an adapter that is in the model cannot be right among packed requests; None if it can."""
        head = unwrapped(self.model.get_output_embeddings())
        for host, _ in self.residents.parts_of(name):
            if reason := host.packed_refusal(name):
                return f"{reason} at {host.path!r} must know the earlier tokens of its request"
            if host.get_base_layer() is head:
                return f"it adapts {host.path!r}, which reads the last token of each request alone"
            if host.merged_adapters:
                return f"adapters {host.merged_adapters} are merged at {host.path!r}: unmerge them first"
        for path, module in self.model.named_modules():
            if isinstance(module, AuxiliaryTrainingWrapper) and name in module._adapters:
                return f"it has {path!r} of its own (modules_to_save or trained tokens), of which a step runs one"
        return None

    @staticmethod
    def _refuse(name: str, reason: str | None) -> None:
        if reason is not None:
            raise AdapterRefused(f"adapter {name!r} cannot be served: {reason}")

    @torch.no_grad()
    def _trial(self, name: str) -> str | None:
        """Why a first forward of two tokens fails; None if it does not."""
        ids = torch.tensor([[0, 1]], device=next(self.model.parameters()).device)
        try:
            logits = self.model(input_ids=ids, adapter_names=[name], use_cache=False).logits
        except Exception as error:  # whatever it is, it would end the loop, and with it all requests
            return f"a first forward fails ({type(error).__name__}: {error})"
        return None if bool(logits.isfinite().all()) else "a first forward gives logits that are no finite numbers"


def check_folder(folder: str | Path) -> tuple[str, SavedAdapter]:
    """The type of the adapter that a folder holds, and what it says of itself.

    Raises:
        ValueError: the folder holds no adapter with weights in safetensors, none of our types or LoRA, or files of
            two saves.
    """
    folder = Path(folder)
    if not (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
        raise ValueError(f"{str(folder)!r} holds no {SAFETENSORS_WEIGHTS_NAME}; save the adapter there")
    saved = read_adapter(str(folder), lambda kind: True)
    kind = None if saved is None else saved.config.get("peft_type")
    if saved is None or (kind != "LORA" and config_class(kind) is None):
        raise ValueError(
            f"{str(folder)!r} holds an adapter of type {kind!r}; served are LORA and the types of this library"
        )
    if saved.other is not None:
        raise ValueError(saved.other)
    return str(kind), saved
