"""The requests that a server holds, and what its steps make of them."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from transformers.generation.continuous_batching.requests import RequestStatus

from mixadapters.core.rows import BASE, RowNames
from mixadapters.core.streams import PackedRequests, RequestMemory
from mixadapters.serving.adapters import ServedAdapters
from mixadapters.serving.manager import ServingManager
from mixadapters.serving.requests import AdapterUnreadable, Request, ServerBusy, ServerStopped

logger = logging.getLogger(__name__)
PATIENCE = 0.5  # seconds that a request waits for room for its adapter while later ones go before it


class RequestBook:
    """The requests that a server holds: those that wait for their adapter, and those that are in its steps.

    Callers `add` and `give_up` requests from their threads; the manager calls the verbs of `Work` from its own.

    Args:
        adapters: those that requests may name.
    """

    def __init__(self, adapters: ServedAdapters) -> None:
        self.adapters = adapters
        self.manager: ServingManager | None = None  # while the server runs
        self.accepts = False  # whether more requests may come
        self._error: Exception | None = None  # by which the manager has ended
        self._lock = threading.Lock()
        self._live: dict[str, Request] = {}
        self._waiting: deque[Request] = deque()  # those of them that are not in steps yet
        self._roster, self._stays = RowNames([BASE]), [adapters.residents.stay(BASE)]

    # --- for the server, in any thread --------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._live)

    @property
    def waiting(self) -> bool:
        """Whether a request is in no step yet."""
        return bool(self._waiting)

    @property
    def running(self) -> bool:
        """Whether steps run and more requests may come."""
        return self.accepts and self.manager is not None and self.manager.is_running()

    def open(self, manager: ServingManager) -> None:
        """Start the manager, whose work this is, and take requests."""
        self._error, self.manager = None, manager
        manager.start()
        self.accepts = True

    def add(self, request: Request, most: int) -> None:
        """Hold a request until it is done or given up.

        Raises:
            ServerStopped: the server does not run.
            ServerBusy: `most` requests are here already.
            UnknownAdapter, AdapterRefused: the adapter that it names cannot be used.
        """
        with self._lock:
            if not self.running:
                raise ServerStopped(f"the server does not run{f': {self._error}' if self._error else ''}; start it")
            if len(self._live) >= most:
                raise ServerBusy(
                    f"the server holds {len(self._live)} requests, and takes no more than {most}: try again later"
                )
            self.adapters.hold(request.adapter)
            self._live[request.request_id] = request
            self._waiting.append(request)
            self.wake()

    def wake(self) -> None:
        """Have an idle manager look at the requests at once."""
        if self.manager is not None:
            self.manager.wake()

    def give_up(self, request: Request) -> None:
        """Hold a request no more, and generate nothing more for it."""
        if self._forget(request) and self.manager is not None:
            self.manager.cancel_request(request.request_id)

    def _forget(self, request: Request) -> bool:
        """Hold a request no more. Returns whether it was held."""
        with self._lock:
            known = self._live.pop(request.request_id, None) is not None
        if known:
            request.memory.state = {}
            self.adapters.release(request.adapter, request.began is not None)
        return known

    # --- for the manager, in its thread (`Work`) ----------------------------------------------------------------

    def before_step(self) -> None:
        now = time.monotonic()
        with self._lock:
            overdue = [request for request in self._live.values() if request.overdue(now)]
        for request in overdue:
            request.expire()
        self.adapters.sweep()
        self._begin()

    def _begin(self) -> None:
        """Give the manager the requests whose adapters are in the model, or find room there.

        Others may go before one whose adapter finds none, but not for long: they keep theirs in use.
        """
        now, blocked = time.monotonic(), False
        ready: list[Request] = []
        broken: list[tuple[Request, Exception]] = []
        kept: deque[Request] = deque()
        with self._lock:
            for request in self._waiting:
                age = now - request.created
                if request.request_id not in self._live:  # given up
                    continue
                try:
                    begins = (not blocked or request.adapter == BASE) and self.adapters.begin(request.adapter)
                except Exception as error:  # whatever it is, it would end the loop, and with it all requests
                    broken.append((request, error))
                    continue
                if begins:
                    request.began = age
                    ready.append(request)
                else:
                    blocked = blocked or (age > PATIENCE and not self.adapters.residents.coming(request.adapter))
                    kept.append(request)
            self._waiting = kept
        for request, why in broken:
            self._fail(request, why)
        for request in ready:
            assert self.manager is not None
            self.manager.add_request(
                request.prompt, request.request_id, max_new_tokens=request.max_new_tokens, streaming=True,
                **request.sampling,
            )  # fmt: skip

    def _fail(self, request: Request, why: Exception) -> None:
        """End a request whose adapter cannot come into the model."""
        logger.error("a request of adapter %r fails: %s: %s", request.adapter, type(why).__name__, why)
        self._forget(request)
        if not isinstance(why, AdapterUnreadable):
            reason = f"{type(why).__name__}, see the server's log"
            why = AdapterUnreadable(f"adapter {request.adapter!r} cannot come into the model: {reason}")
        request.fail(why)

    def packed(self, ids: Sequence[str], lengths: Sequence[int], past: Sequence[int]) -> PackedRequests:
        with self._lock:
            live = [request.adapter for request in self._live.values()]
            known = [self._live.get(i) for i in ids]  # None: given up, whatever comes
        names = [BASE if request is None else request.adapter for request in known]
        roster = self.roster_for(set(names), live)
        place = {name: number for number, name in enumerate(roster)}
        memories = [self._memory(request, *step) for request, *step in zip(known, past, lengths, strict=True)]
        return PackedRequests(tuple(lengths), roster, tuple(place[name] for name in names), memories)

    def _memory(self, request: Request | None, past: int, length: int) -> RequestMemory | None:
        """What routers keep of a request: it lives as long, and begins anew where the request is read again."""
        if request is None or not self.adapters.remembers(request.adapter):
            return None
        if not request.memory.read(past, length):
            raise RuntimeError(
                f"request {request.request_id} goes on at token {past}, which its routers have not reached"
            )
        return request.memory

    def roster_for(self, wanted: set[str], live: list[str]) -> RowNames:
        """The adapters of this step, and of those that come: what layers have packed for it serves the next steps.

        wanted: names that the requests of the step give; live: those of all requests that are held.
        """
        if wanted == {BASE}:
            return RowNames([BASE])
        residents = self.adapters.residents
        if self._stays != [residents.stay(name) for name in self._roster] or not wanted.issubset(self._roster):
            coming = [name for name in live if name in residents]
            self._roster = RowNames(dict.fromkeys([BASE, *coming, *sorted(wanted)]))
            self._stays = [residents.stay(name) for name in self._roster]
        return self._roster

    def salt(self, request_id: str) -> str:
        with self._lock:
            request = self._live.get(request_id)
        if request is None or self.adapters.remembers(request.adapter):  # a router must see every token of its request
            return request_id
        return self.adapters.salt(request.adapter)

    def deliver(self, output: Any) -> None:
        with self._lock:
            request = self._live.get(output.request_id)
        if request is None:  # given up
            return
        request.advance(output.generated_tokens)
        if output.status == RequestStatus.FAILED:
            self._forget(request)
            request.fail(ServerStopped(f"request {request.request_id} failed: {output.error}"))
        elif output.is_finished():
            self._forget(request)
            request.finish()

    def ended(self, error: Exception | None) -> None:
        self.accepts, self._error = False, error
        with self._lock:
            left = list(self._live.values())
        for request in left:
            self._forget(request)
            request.fail(ServerStopped(f"the server has ended before request {request.request_id} was done"))
        if error is not None:
            logger.error("the server has ended by an error: %s", error)
