"""One continuously batched model that serves requests, each with the adapter that it names."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import nn

from mixadapters.core.context import ForwardContext
from mixadapters.core.hooks import root_of
from mixadapters.core.rows import BASE
from mixadapters.serving.adapters import ServedAdapters
from mixadapters.serving.book import RequestBook
from mixadapters.serving.manager import ServingManager
from mixadapters.serving.requests import Request, WrongArgument
from mixadapters.serving.settings import (
    batching_settings,
    check_numbers,
    check_sizes,
    generation_settings,
    new_tokens,
    sampling_options,
    stops_of,
)

AUTO = "auto"  # the name by which a request leaves the choice of its adapter to the router


class AdapterServer:
    """Requests that each name an adapter, generated together by transformers' continuous batching.

    A request gets the tokens that it would get alone, whatever others run beside it. Use it as a context manager, or
    `start` and `stop` it.

    Args:
        model: a causal language model of transformers, or a PeftModel of one of our types around it. While the server
            runs, the model is its own.
        tokenizer: for prompts that are text.
        max_requests: how many requests it holds, running or waiting; more are refused.
        max_running: how many of them a step takes.
        max_batch_tokens: tokens of a step. Longer prompts are read in pieces, between which others go on.
        cache_tokens: tokens whose keys and values are kept, of all requests together.
        page_size: tokens of a page of that cache; shared prefixes are whole pages.
        max_resident: how many adapters lie in the model, on its device; the others wait in host memory, and come in
            when a request names them. None: any number.
        offload_folder: those others wait in files of a folder that the server makes here, from which a thread reads
            them when they are named. None: in host memory.
        share_prefixes: whether requests of one adapter share the pages of a common beginning.
        sampling: whether requests may ask for a temperature. Otherwise all are greedy, which costs less.
        scheduler: "fair": short prompts are read before longer ones, which have their steps too; "fifo": prompts are
            read in the order in which they came.
        check_base_model: whether a folder that names another base model than this one is refused.
        router: input_ids (1, T) -> [name], such as a `CompositionRouter`: chooses the adapter of requests for "auto".

    Raises:
        ValueError: a model that cannot generate so, a size that is no positive integer, or an unknown scheduler.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        tokenizer: Any = None,
        max_requests: int = 256,
        max_running: int = 64,
        max_batch_tokens: int = 512,
        cache_tokens: int = 16384,
        page_size: int = 32,
        max_resident: int | None = None,
        share_prefixes: bool = True,
        sampling: bool = False,
        scheduler: str = "fair",
        check_base_model: bool = True,
        offload_folder: str | Path | None = None,
        router: Callable[..., Sequence[str]] | None = None,
    ) -> None:
        sizes = {"max_requests": max_requests, "max_running": max_running, "max_batch_tokens": max_batch_tokens,
                 "cache_tokens": cache_tokens, "page_size": page_size,
                 "max_resident": 1 if max_resident is None else max_resident}  # fmt: skip
        check_sizes(sizes)
        if offload_folder is not None and (max_resident is None or not Path(offload_folder).is_dir()):
            raise ValueError(
                f"offload_folder={str(offload_folder)!r} must be a folder, for a server with max_resident adapters"
            )
        self._batching = batching_settings(sizes, share_prefixes, sampling, scheduler)
        self.model: Any = root_of(model)
        if not hasattr(self.model, "init_continuous_batching") or self.model.get_output_embeddings() is None:
            raise ValueError(f"{type(self.model).__name__} is no causal language model of transformers")
        self.tokenizer, self.max_requests, self.sampling = tokenizer, max_requests, sampling
        self.capacity = cache_tokens // page_size * page_size
        self.context = ForwardContext.of(self.model)
        self.router, self._alone = router, threading.RLock()
        self.adapters = ServedAdapters(
            self.model,
            self._changing,
            max_resident,
            check_base_model,
            None if offload_folder is None else Path(offload_folder),
            lambda: self._book.wake(),
        )
        self._refuse_auto(*self.adapters.names)
        self._settings = generation_settings(self.model, sampling)
        self._book = RequestBook(self.adapters)

    # --- begin and end ------------------------------------------------------------------------------------------

    def __enter__(self) -> AdapterServer:
        self.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()

    def start(self) -> None:
        """Begin to serve. Raises RuntimeError where it does already."""
        if self._book.manager is not None:
            raise RuntimeError("the server runs already; stop it first")
        self._book.open(
            ServingManager(
                self.context,
                self._book,
                model=self.model,
                generation_config=self._settings,
                continuous_batching_config=self._batching,
            )
        )

    def stop(self, timeout: float | None = 30.0) -> None:
        """Take no more requests, let those that run end, and those that have not after `timeout` seconds fail."""
        manager = self._book.manager
        if manager is None:
            return
        self._book.accepts = False
        end = None if timeout is None else time.monotonic() + timeout
        while self._book.waiting and manager.is_running() and (end is None or time.monotonic() < end):
            time.sleep(0.01)
        manager.stop(block=True, timeout=None if end is None else max(0.0, end - time.monotonic()))
        if manager.is_running():
            manager.stop(block=True, hard_stop=True)
        self._book.manager = None

    @property
    def running(self) -> bool:
        """Whether it takes requests."""
        return self._book.running

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """No forward of the model runs inside, and no other block of this kind."""
        manager = self._book.manager
        if manager is not None and threading.current_thread() is manager._generation_thread:
            yield  # between steps, and not while it is paused
            return
        with self._alone, manager.pause() if manager is not None and manager.is_running() else nullcontext():
            yield

    # --- requests -----------------------------------------------------------------------------------------------

    def submit(
        self,
        prompt: str | Sequence[int],
        adapter: str = BASE,
        *,
        max_new_tokens: int | None = None,
        deadline: float | None = None,
        temperature: float | None = None,
        top_p: float = 1.0,
    ) -> Request:
        """Ask for the continuation of a prompt.

        Args:
            prompt: text, or token ids.
            adapter: a name; "__base__" for none, "auto" for the one that the router chooses, by a forward of the base.
            max_new_tokens: None: 256, or as many as the model has positions for.
            deadline: seconds in which it must be done.
            temperature: above 0 to sample, where the server samples. None or 0: the likeliest token.
            top_p: the share of the likeliest tokens that are sampled from.

        Raises:
            ValueError: a prompt that is empty or too long, numbers out of range, or an adapter that is unknown
                (UnknownAdapter) or cannot be served (AdapterRefused).
            ServerBusy: it holds `max_requests` already.
            ServerStopped: it does not run.
        """
        ids = self._ids(prompt)
        check_numbers(self.sampling, deadline, temperature, top_p)
        max_new_tokens = new_tokens(self.model, self.capacity, len(ids), max_new_tokens)
        if adapter == AUTO and self.router is not None:
            adapter = self._choose(ids)
        request = Request(
            f"request-{uuid4().hex}", ids, adapter, max_new_tokens=max_new_tokens, deadline=deadline,
            stops=stops_of(self._settings), give_up=self._book.give_up,
            sampling=sampling_options(self.model, temperature, top_p) if self.sampling else {},
        )  # fmt: skip
        self._book.add(request, self.max_requests)
        return request

    def _ids(self, prompt: str | Sequence[int]) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise WrongArgument(
                    "prompt", "prompt is text, and the server has no tokenizer: give token ids, or tokenizer="
                )
            try:
                prompt = self.tokenizer(prompt)["input_ids"]
            except TypeError:  # what tokenizers say of half a surrogate pair
                raise WrongArgument("prompt", f"prompt={prompt!r:.60} is no valid Unicode text") from None
        given: Any = prompt
        if not (hasattr(given, "tolist") or isinstance(given, Sequence)):
            raise WrongArgument("prompt", f"prompt={given!r:.60} must be text or token ids")
        ids: list[int] = given.tolist() if hasattr(given, "tolist") else list(given)
        size = self.model.config.get_text_config().vocab_size
        if not ids or not all(type(i) is int and 0 <= i < size for i in ids):
            raise WrongArgument(
                "prompt", f"prompt={prompt!r:.60} must be token ids from 0 to {size - 1}, at least one"
            )
        return ids

    def _choose(self, ids: list[int]) -> str:
        with self._changing():
            (name,) = self.router(input_ids=torch.tensor([ids]))  # type: ignore[misc]
        return name

    def _refuse_auto(self, *names: str) -> None:
        if self.router is not None and AUTO in names:
            raise ValueError(f"an adapter is called {AUTO!r}, by which requests ask the router: give it another name")

    @property
    def waiting(self) -> int:
        """Requests that it holds, running or waiting."""
        return len(self._book)

    # --- adapters -----------------------------------------------------------------------------------------------

    def load(self, name: str, folder: str | Path) -> None:
        """As `ServedAdapters.load`; running requests wait for it, and go on."""
        self._refuse_auto(name)
        self.adapters.load(name, folder)

    def unload(self, name: str) -> bool:
        """As `ServedAdapters.unload`."""
        return self.adapters.unload(name)
