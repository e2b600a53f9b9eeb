"""A request to a server: its tokens as they come, and what becomes of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

from mixadapters.core.streams import RequestMemory


class ServerBusy(RuntimeError):
    """The server holds as many requests as it takes: try again later."""


class ServerStopped(RuntimeError):
    """The server takes no requests, or has ended before this one was done."""


class UnknownAdapter(ValueError):
    """No adapter of the server has this name. leaving: one has it, and is being unloaded."""

    def __init__(self, message: str, leaving: bool = False) -> None:
        super().__init__(message)
        self.leaving = leaving


class WrongArgument(ValueError):
    """A request cannot have this value. argument: the name of what is wrong, in `AdapterServer.submit`."""

    def __init__(self, argument: str, message: str) -> None:
        super().__init__(message)
        self.argument = argument


class AdapterRefused(ValueError):
    """The adapter, as it is, cannot be right where requests are packed into one row."""


class AdapterUnreadable(RuntimeError):
    """The adapter cannot come into the model or wait outside it: its file has gone, say, or there is no room."""


class RequestCancelled(RuntimeError):
    """The request was cancelled before it was done."""


class DeadlineExceeded(TimeoutError):
    """The request was not done in its time."""


class Result(NamedTuple):
    """What a request has come to."""

    tokens: list[int]  # generated ids, with the one that ends a text where it has come
    finish_reason: str  # "stop": such an id has come, or `stop` was called; "length": as many tokens as were asked for


class Request:
    """One request. Iterate over it for token ids as they come, or wait for the `result`.

    Args:
        deadline: seconds from now in which it must be done; None: no limit.
        stops: token ids that end a text.
        give_up: called with the request when it is cancelled or its time is up.
        sampling: what the manager is told of it besides; {} where the server does not sample.
    """

    def __init__(
        self,
        request_id: str,
        prompt: list[int],
        adapter: str,
        *,
        max_new_tokens: int,
        deadline: float | None,
        stops: Collection[int],
        give_up: Callable[[Request], None],
        sampling: Mapping[str, Any] | None = None,
    ) -> None:
        self.request_id, self.prompt, self.adapter = request_id, prompt, adapter
        self.max_new_tokens, self.stops = max_new_tokens, frozenset(stops)
        self.sampling = dict(sampling or {})
        self.created = time.monotonic()
        self.deadline = None if deadline is None else self.created + deadline
        self.began: float | None = None  # seconds after its creation: its adapter was there, and steps could hold it
        self.first_token: float | None = None  # seconds after its creation
        self.memory = RequestMemory()  # of its adapter's routers
        self._give_up = give_up
        self._changed = threading.Condition()
        self._tokens: list[int] = []
        self._error: Exception | None = None
        self._done = False
        self._stopped = False
        self._listeners: list[Callable[[], None]] = []
        self._waits: list[Callable[[], None]] = []  # for the end

    # --- for the caller -----------------------------------------------------------------------------------------

    @property
    def tokens(self) -> list[int]:
        """Generated ids so far."""
        with self._changed:
            return list(self._tokens)

    @property
    def done(self) -> bool:
        return self._done

    @property
    def error(self) -> Exception | None:
        """Why it has failed; None while it runs, and where it has not."""
        return self._error

    def __iter__(self) -> Iterator[int]:
        """Token ids as they come.

        Raises:
            RequestCancelled, DeadlineExceeded, RuntimeError: it has not come to its end.
        """
        given = 0
        while True:
            with self._changed:
                while not self._done and len(self._tokens) == given:
                    self._wait(None)
                new, done = self._tokens[given:], self._done
            given += len(new)
            yield from new
            if done and not new:
                if self._error is not None:
                    raise self._error
                return

    def result(self, timeout: float | None = None) -> Result:
        """Wait for the end.

        Args:
            timeout: seconds to wait; the request goes on when they are over.

        Raises:
            TimeoutError: it is not done yet.
            RequestCancelled, DeadlineExceeded, RuntimeError: it has not come to its end.
        """
        end = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            while not self._done:
                if end is not None and time.monotonic() >= end:
                    raise TimeoutError(f"request {self.request_id} is not done after {timeout} s")
                self._wait(end)
            if self._error is not None:
                raise self._error
            return Result(list(self._tokens), self._reason)

    def stop(self) -> None:
        """End it here, as done: what has come is enough. Nothing happens where it is done."""
        self._stopped = not self._done
        self.finish()
        self._give_up(self)

    def cancel(self) -> None:
        """Give it up; what has come so far stays in `tokens`. Nothing happens where it is done."""
        self.fail(RequestCancelled(f"request {self.request_id} was cancelled"))
        self._give_up(self)

    def listen(self, listener: Callable[[], None]) -> None:
        """Have `listener` called, in the server's thread, whenever there is something new: it must be quick."""
        with self._changed:
            self._listeners.append(listener)
        listener()

    def when_done(self, call: Callable[[], None]) -> None:
        """Have `call` called once when it has ended, in whatever thread ends it, or now: it must be quick."""
        with self._changed:
            if not self._done:
                self._waits.append(call)
                return
        call()

    # --- for the server -----------------------------------------------------------------------------------------

    def advance(self, tokens: list[int]) -> None:
        """All generated ids so far."""
        with self._changed:
            if self._done or len(tokens) <= len(self._tokens):
                return
            if self.first_token is None:
                self.first_token = time.monotonic() - self.created
            self._tokens.extend(tokens[len(self._tokens) :])
            self._changed.notify_all()
        self._tell()

    def finish(self) -> None:
        self._end(None)

    def fail(self, error: Exception) -> None:
        self._end(error)

    def overdue(self, now: float) -> bool:
        return self.deadline is not None and now >= self.deadline

    def expire(self) -> None:
        """Its time is up."""
        seconds = (self.deadline or self.created) - self.created
        self.fail(DeadlineExceeded(f"request {self.request_id} was not done in {seconds:g} s"))
        self._give_up(self)

    def _end(self, error: Exception | None) -> None:
        with self._changed:
            if self._done:
                return
            self._error, self._done = error, True
            self._changed.notify_all()
        self._tell()
        for call in self._waits:
            call()

    def _tell(self) -> None:
        for listener in list(self._listeners):
            listener()

    def _wait(self, end: float | None) -> None:
        """Wait for a change, or until `end` or the deadline; a request whose time is up is given up here too."""
        now = time.monotonic()
        if self.overdue(now):
            self.expire()
            return
        ends = [moment for moment in (end, self.deadline) if moment is not None]
        self._changed.wait(None if not ends else max(0.0, min(ends) - now))

    @property
    def _reason(self) -> str:
        return "stop" if self._stopped or (self._tokens and self._tokens[-1] in self.stops) else "length"
