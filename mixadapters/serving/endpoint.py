"""An HTTP endpoint in the form of OpenAI's API, with adapters as models (needs `pip install mixadapters[serve]`)."""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from functools import partial
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from mixadapters.core.registry import nearest
from mixadapters.core.rows import BASE
from mixadapters.serving.adapters import SHOWN
from mixadapters.serving.engine import AUTO, AdapterServer
from mixadapters.serving.folder import AdapterFolder
from mixadapters.serving.metrics import Metrics
from mixadapters.serving.requests import (
    AdapterRefused,
    AdapterUnreadable,
    DeadlineExceeded,
    Request,
    RequestCancelled,
    ServerBusy,
    ServerStopped,
    UnknownAdapter,
    WrongArgument,
)
from mixadapters.serving.texts import Detokenizer, StopStrings
from mixadapters.serving.wire import (
    Answer,
    ChatBody,
    CompletionBody,
    Generation,
    LoadBody,
    UnloadBody,
    WireError,
    read_body,
    usage_of,
)

logger = logging.getLogger(__name__)
# The beginning of an absolute path in quotes, up to its last part.
ABSOLUTE = re.compile(r"(?<=['\"])(?:~?/|[A-Za-z]:[\\/])(?:[^'\"/\\\n]+[/\\]+)*")
LOOK = 0.25  # seconds between two looks whether a client is still there


class Endpoint:
    """The routes of one server.

    Args:
        server: runs, or is started before the first request.
        folder: where adapters are loaded from.
        base: the model name of requests without an adapter.
        token: what clients must send as a bearer token; None: nothing.
        deadline: seconds for each request; None: no limit.
        largest_body: bytes.
    """

    def __init__(
        self,
        server: AdapterServer,
        folder: AdapterFolder,
        *,
        base: str = "base",
        token: str | None = None,
        deadline: float | None = None,
        largest_body: int = 2**20,
    ) -> None:
        self.server, self.folder, self.base = server, folder, base
        self.token, self.deadline, self.largest_body = token, deadline, largest_body
        self.left_out: dict[str, str] = {}  # adapters of the folder that could not be loaded at the start -> why
        self.metrics = Metrics(server)

    def load_all(self) -> None:
        """Load all adapters of the folder. One that cannot be served is left out: the others have their users.

        Raises:
            ValueError: an adapter has the base's name.
        """
        names = self.folder.names()
        if self.base in names:
            raise ValueError(f"an adapter has the name of the base, {self.base!r}: give another by --name")
        for name, why in self.folder.passed_over().items():
            self.left_out[name] = why
            logger.warning("folder %r is left out: %s", name, why)
        if not names:
            logger.warning("%s holds no adapter: the base alone is served", self.folder.path)
        for name in names:
            try:
                self.server.load(name, self.folder.find(name))
            except (ValueError, AdapterUnreadable) as error:
                self.left_out[name] = without_paths(self._said(error))
                logger.error("adapter %r is left out: %s", name, error)

    def _said(self, error: Exception) -> str:
        """A message as clients may read it: with their name of the base, and not where our folders lie."""
        path = getattr(getattr(self.server.model, "config", None), "_name_or_path", None)
        ours = str(error).replace(f"{self.folder.path}/", "").replace(repr(BASE), repr(self.base))
        return ours.replace(repr(path), repr(self.base)) if path else ours

    def app(self) -> FastAPI:
        app = FastAPI(title="mixadapters", docs_url=None, redoc_url=None, openapi_url=None)
        routes: list[tuple[str, str, Callable[[HttpRequest], Any]]] = [
            ("GET", "/health", self.health),
            ("GET", "/metrics", self.show_metrics),
            ("GET", "/v1/models", self.models),
            ("GET", "/v1/models/{name}", self.one_model),
            ("POST", "/v1/completions", self.complete),
            ("POST", "/v1/chat/completions", self.chat),
            ("POST", "/v1/load_lora_adapter", self.load),
            ("POST", "/v1/unload_lora_adapter", self.unload),
        ]
        for method, path, call in routes:
            app.add_api_route(path, self._answering(path, call), methods=[method], response_model=None)
        app.add_exception_handler(HTTPException, _no_route)
        return app

    def _answering(self, path: str, call: Callable[[HttpRequest], Any]) -> Callable[[HttpRequest], Any]:
        """`call`, with what it raises as an answer in OpenAI's form."""

        async def answer(http: HttpRequest) -> Response:
            try:
                if path.startswith("/v1/"):
                    self._check_token(http)
                response = await call(http)
            except Exception as error:
                known = as_wire_error(error, self._said)
                if known.status == 500:
                    logger.exception("%s %s", http.method, path)  # for us; the client learns that it is our fault
                response = JSONResponse(known.body, known.status, known.headers)
            self.metrics.answered(path, response.status_code)
            return response

        return answer

    def _check_token(self, http: HttpRequest) -> None:
        if self.token is None:
            return
        kind, _, given = http.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(given.encode(), self.token.encode()):
            raise WireError(
                401, "send the server's token: Authorization: Bearer ...", code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip

    async def _body(self, http: HttpRequest, kind: Any) -> Any:
        """The body, read no further than it may be long."""
        parts, size = [], 0
        async for part in http.stream():
            size += len(part)
            if size > self.largest_body:
                raise WireError(413, f"the body has more than {self.largest_body} bytes")
            parts.append(part)
        return read_body(kind, b"".join(parts))

    # --- what there is ------------------------------------------------------------------------------------------

    async def health(self, http: HttpRequest) -> Response:
        alive = self.server.running
        return JSONResponse({"status": "ok" if alive else "stopped"}, 200 if alive else 503)

    async def show_metrics(self, http: HttpRequest) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    def _model(self, name: str) -> dict[str, Any]:
        parent = None if name == self.base else self.base
        return {"id": name, "object": "model", "created": self.metrics.begun, "owned_by": "mixadapters",
                "root": self.base, "parent": parent}  # fmt: skip

    async def models(self, http: HttpRequest) -> Response:
        names = [self.base, *self._names]
        return JSONResponse({"object": "list", "data": [self._model(name) for name in names]})

    async def one_model(self, http: HttpRequest) -> Response:
        name = http.path_params["name"]
        if name != self.base and name not in self._names:
            raise self._no_model(name)
        return JSONResponse(self._model(name))

    def _no_model(self, name: str, leaving: bool = False) -> WireError:
        why = ": it is being unloaded" if leaving else ""
        why = f": its folder could not be served ({self.left_out[name]})" if name in self.left_out else why
        return unknown_model(name, [self.base, *self._names], why)

    @property
    def _names(self) -> list[str]:
        """What is served beside the base."""
        return [*self.server.adapters.names, *([] if self.server.router is None else [AUTO])]

    # --- generation ---------------------------------------------------------------------------------------------

    async def complete(self, http: HttpRequest) -> Response:
        body: CompletionBody = await self._body(http, CompletionBody)
        return await self._generate(http, body, body.prompts, body.max_tokens, chat=False)

    async def chat(self, http: HttpRequest) -> Response:
        body: ChatBody = await self._body(http, ChatBody)
        tokenizer = self.server.tokenizer
        if getattr(tokenizer, "chat_template", None) is None:
            raise WireError(400, "the tokenizer of this model has no chat template: use /v1/completions")
        messages = [message.plain() for message in body.messages]
        try:
            ids = await asyncio.to_thread(
                tokenizer.apply_chat_template, messages, add_generation_prompt=True, tokenize=True, return_dict=True
            )
        except Exception as error:  # of the template, which is the model's own code
            raise WireError(400, f"messages: the chat template refuses them: {error}", param="messages") from None
        return await self._generate(http, body, [ids["input_ids"]], body.most, chat=True)

    async def _generate(
        self, http: HttpRequest, body: Generation, prompts: list[str | list[int]], most: int | None, *, chat: bool
    ) -> Response:
        stops = body.stops
        check_count(len(prompts), bool(body.stream), self.server.max_requests)
        if body.model in self.left_out or body.model == BASE:
            raise self._no_model(body.model)
        adapter = BASE if body.model == self.base else body.model
        requests: list[Request] = []
        try:
            for prompt in prompts:
                request = await asyncio.to_thread(
                    self.server.submit, prompt, adapter, max_new_tokens=most, deadline=self.deadline,
                    temperature=body.temperature, top_p=1.0 if body.top_p is None else body.top_p,
                )  # fmt: skip
                request.when_done(partial(self.metrics.finished, request))
                requests.append(request)
            answer = Answer(body.model, chat, of_text=isinstance(prompts[0], str))
            if body.stream:
                events = self._events(requests[0], answer, stops, body.counts_usage)
                return StreamingResponse(events, media_type="text/event-stream")
            return JSONResponse(await self._whole(http, requests, answer, stops))
        except BaseException as error:
            for request in requests:
                request.cancel()
            if isinstance(error, UnknownAdapter):
                raise self._no_model(body.model, error.leaving) from None
            if isinstance(error, WrongArgument):
                field = body.field_of(error.argument)
                said = self._said(error).replace(f"{error.argument}=", f"{field}=")
                raise WireError(400, said, param=field) from None
            raise

    async def _whole(
        self, http: HttpRequest, requests: list[Request], answer: Answer, stops: list[str]
    ) -> dict[str, Any]:
        choices = []
        for request in requests:
            found = [piece async for piece in pieces(request, self.server.tokenizer, stops, http, answer)]
            choices.append(("".join(text for text, _ in found), found[-1][1] or "stop"))
        prompt = sum(len(request.prompt) for request in requests)
        generated = sum(len(request.tokens) for request in requests)
        return answer.completion(choices, usage_of(prompt, generated))

    async def _events(
        self, request: Request, answer: Answer, stops: list[str], counts_usage: bool
    ) -> AsyncIterator[str]:
        try:
            if answer.chat:
                yield answer.piece(None)
            async for text, reason in pieces(request, self.server.tokenizer, stops, None, answer):
                if text or reason:
                    yield answer.piece(text, reason)
            if counts_usage:
                yield answer.usage(usage_of(len(request.prompt), len(request.tokens)))
            yield "data: [DONE]\n\n"
        except Exception as error:
            yield answer.event(as_wire_error(error, self._said).body)
        finally:  # also where the client has gone
            request.cancel()

    # --- adapters -----------------------------------------------------------------------------------------------

    async def load(self, http: HttpRequest) -> Response:
        body: LoadBody = await self._body(http, LoadBody)
        if body.lora_name == self.base:
            raise WireError(400, f"{body.lora_name!r} is the name of the base model", param="lora_name")
        name = body.lora_name
        try:
            path = self.folder.find(name if body.lora_path is None else body.lora_path)
            self.folder.check(name)
        except FileNotFoundError as error:
            raise WireError(404, str(error), code="model_not_found", param="lora_path") from None
        except ValueError as error:
            raise WireError(400, str(error), param="lora_path" if body.lora_path else "lora_name") from None
        try:
            await asyncio.to_thread(self.server.load, name, path)
        except ValueError as error:
            raise WireError(400, without_paths(self._said(error)), param="lora_name") from None
        self.left_out.pop(name, None)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    async def unload(self, http: HttpRequest) -> Response:
        body: UnloadBody = await self._body(http, UnloadBody)
        if body.lora_name == self.base:
            raise WireError(400, f"{self.base!r} is the base model, which is not unloaded", param="lora_name")
        try:
            gone = await asyncio.to_thread(self.server.unload, body.lora_name)
        except UnknownAdapter as error:
            raise WireError(404, self._said(error), code="model_not_found", param="lora_name") from None
        if not gone:
            text = f"Accepted: LoRA adapter '{body.lora_name}' takes no more requests, and goes when its own are done."
            return PlainTextResponse(text, 202)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


async def pieces(
    request: Request, tokenizer: Any, stops: list[str], http: HttpRequest | None, answer: Answer
) -> AsyncIterator[tuple[str, str | None]]:
    """What a request generates: (text, None) as it comes, and at the end (text, finish_reason).

    Raises RequestCancelled where the client of `http` has gone.
    """
    news, loop = asyncio.Event(), asyncio.get_running_loop()

    def tell() -> None:
        with suppress(RuntimeError):  # the loop has ended, and with it who would be told
            loop.call_soon_threadsafe(news.set)

    request.listen(tell)
    # A completion goes on with its prompt's text; an answer in a chat is a text of its own.
    detokenizer = Detokenizer(tokenizer, () if answer.chat else request.prompt, answer.of_text)
    stopping, given = StopStrings(stops), 0
    look = loop.time() + LOOK
    while True:
        done, tokens = request.done, request.tokens
        text = stopping.add(detokenizer.add(tokens[given:])) if len(tokens) > given else ""
        given = len(tokens)
        if stopping.stopped:
            request.stop()
            yield text, "stop"
            return
        if text:
            yield text, None
        if done:
            break
        news.clear()
        if not request.done and len(request.tokens) == given:
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(news.wait(), LOOK)
        if http is not None and loop.time() >= look:
            look = loop.time() + LOOK
            if await http.is_disconnected():
                request.cancel()
    result = request.result(0)  # or what it has failed with
    text = stopping.add(detokenizer.rest())
    yield (
        text + ("" if stopping.stopped else stopping.rest()),
        "stop" if stopping.stopped else result.finish_reason,
    )


def check_count(prompts: int, streams: bool, held: int) -> None:
    """Raises WireError for more prompts than a stream or the server takes, for which waiting does not help."""
    if streams and prompts > 1:
        raise WireError(400, "stream=true takes one prompt", param="prompt")
    if prompts > held:
        said = f"prompt: {prompts} prompts, and the server holds {held} requests: send fewer at a time"
        raise WireError(400, said, param="prompt")


def without_paths(text: str) -> str:
    """A message with the last part of each absolute path in it: what an adapter's config names may lie anywhere."""
    return ABSOLUTE.sub("", text)


def unknown_model(name: str, have: list[str], why: str) -> WireError:
    """OpenAI's error for a model that does not exist, with those that there are. why: the reason, or nothing."""
    shown = f"{have}" if len(have) <= SHOWN else f"{len(have)}, which GET /v1/models lists"
    said = f"the model {name!r:.100} does not exist{why}; there are {shown}.{nearest(name[:100], have)}"
    return WireError(404, said, code="model_not_found", param="model")


def as_wire_error(error: Exception, said: Callable[[Exception], str] = str) -> WireError:
    """What a client is told. Of an error that is not its own, nothing but that.

    said: a message as clients may read it, but for paths.
    """
    if isinstance(error, WireError):
        return error
    if isinstance(error, UnknownAdapter):
        return WireError(404, str(error), code="model_not_found", param="model")
    if isinstance(error, AdapterRefused):
        return WireError(400, str(error), param="model")
    if isinstance(error, AdapterUnreadable):
        return WireError(500, without_paths(said(error)), kind="server_error", code="adapter_unreadable")
    if isinstance(error, ServerBusy):
        return WireError(429, str(error), kind="rate_limit_error", code="server_busy", headers={"Retry-After": "1"})
    if isinstance(error, DeadlineExceeded):
        return WireError(504, str(error), kind="timeout_error", code="deadline_exceeded")
    if isinstance(error, (RequestCancelled, ClientDisconnect)):
        return WireError(499, str(error), code="cancelled")
    if isinstance(error, ServerStopped):
        return WireError(503, "the server has stopped or is stopping", kind="server_error", code="stopped")
    if isinstance(error, ValueError):
        return WireError(400, str(error))
    return WireError(500, "an error of the server", kind="server_error")


async def _no_route(http: HttpRequest, error: HTTPException) -> Response:
    """Paths and methods that are none."""
    return JSONResponse(WireError(error.status_code, str(error.detail)).body, error.status_code)
