"""The bodies of the OpenAI API that the endpoint reads and writes."""

from __future__ import annotations

import json
import time
from typing import Annotated, Any, Literal
from uuid import uuid4

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from mixadapters.core.registry import nearest

MOST_STOPS = 4  # as OpenAI's
LONGEST_NAME = 100  # characters of a field that an answer says again
# Fields that take values of several types, of each of which pydantic says what is wrong.
FORMS = {
    "prompt": "a string, a list of strings, a list of ids or a list of such lists",
    "stop": "a string or a list of strings",
    "content": 'a string or a list of {"type": "text", "text": ...}',
}


class WireError(Exception):
    """An answer that is an error, in OpenAI's form."""

    def __init__(self, status: int, message: str, *, kind: str = "invalid_request_error", code: str | None = None,
                 param: str | None = None, headers: dict[str, str] | None = None) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.headers = status, headers or {}
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _is_zero(value: object) -> object:
    return 0 if isinstance(value, float) and value == 0 else value


def _refuse_content(value: Any) -> Any:
    if value:
        raise ValueError("it would have no effect here: leave it out")
    return value


Zero = Annotated[Literal[0], BeforeValidator(_is_zero)]  # 0.0 too
Nothing = Annotated[dict[str, Any] | list[Any], AfterValidator(_refuse_content)]


class Body(BaseModel):
    """A body whose every field is known: what would have no effect is refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


class Generation(Body):
    """What both ways to ask have in common. Fields of OpenAI's that have no effect here take their neutral values."""

    model: str
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    n: Literal[1] | None = None
    presence_penalty: Zero | None = None
    frequency_penalty: Zero | None = None
    logit_bias: Nothing | None = None
    seed: int | None = None

    @field_validator("seed")
    @classmethod
    def _seed_is_neutral(cls, seed: int | None, info: ValidationInfo) -> int | None:
        """Greedy answers are the same under every seed; those that are drawn have none here."""
        if seed is not None and info.data.get("temperature"):
            raise ValueError("it has no effect on what is drawn here: leave it out, or temperature")
        return seed

    def field_of(self, argument: str) -> str:
        """How a client calls an argument of `AdapterServer.submit`."""
        return "max_tokens" if argument == "max_new_tokens" else argument

    @property
    def stops(self) -> list[str]:
        """Raises WireError for strings that cannot end a text."""
        stops = [self.stop] if isinstance(self.stop, str) else list(self.stop or ())
        if len(stops) > MOST_STOPS or not all(0 < len(stop) <= 200 for stop in stops):
            raise WireError(400, f"stop must be at most {MOST_STOPS} strings of 1 to 200 characters", param="stop")
        return stops

    @property
    def counts_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class CompletionBody(Generation):
    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int | None = Field(16, ge=1)
    echo: Literal[False] | None = None
    logprobs: None = None
    best_of: Literal[1] | None = None
    suffix: None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """Raises WireError where there is none."""
        if not self.prompt:
            raise WireError(400, "prompt is empty", param="prompt")
        if isinstance(self.prompt, str):
            return [self.prompt]
        ids = [one for one in self.prompt if isinstance(one, int)]
        return [ids] if ids else [one for one in self.prompt if not isinstance(one, int)]


class TextPart(Body):
    type: Literal["text"]
    text: str


class Message(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None
    refusal: None = None
    tool_calls: Nothing | None = None
    function_call: None = None
    annotations: Nothing | None = None
    audio: None = None

    def plain(self) -> dict[str, str]:
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class TextFormat(Body):
    type: Literal["text"]


class ChatBody(Generation):
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: Literal[False] | None = None
    top_logprobs: Zero | None = None
    response_format: TextFormat | None = None
    tools: Nothing | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    modalities: list[Literal["text"]] | None = None
    store: Literal[False] | None = None
    metadata: dict[str, str] | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    def field_of(self, argument: str) -> str:
        if argument == "max_new_tokens" and self.max_completion_tokens is not None:
            return "max_completion_tokens"
        return "messages" if argument == "prompt" else super().field_of(argument)

    @property
    def most(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


class LoadBody(Body):
    lora_name: str
    lora_path: str | None = None


class UnloadBody(Body):
    lora_name: str


def said_of(kind: type[Body], found: Any) -> str:
    """What a client is told of the first field that is wrong. found: of pydantic's `errors`."""
    name, said, wrong = str(found["loc"][-1]) if found["loc"] else "", str(found["msg"]), found["type"]
    if wrong == "value_error":
        return said.removeprefix("Value error, ")
    if wrong == "extra_forbidden":
        known = kind.model_fields if len(found["loc"]) == 1 else ()
        return f"there is no such field here: leave it out.{nearest(name, known)}"
    top = kind.model_fields.get(name) if len(found["loc"]) == 1 else None
    if top is None or top.is_required():
        return said
    if wrong == "none_required":
        return "it is not supported: leave it out"
    if wrong == "literal_error":  # a field of OpenAI's, of which there is its neutral value alone
        taken = {"False": "false", "True": "true"}.get(found["ctx"]["expected"], found["ctx"]["expected"])
        return f"nothing but {taken} is supported: leave it out"
    return said


def read_body(kind: type[Body], content: bytes) -> Any:
    """A body of this kind. Raises WireError, naming the first field that is wrong."""
    try:
        return kind.model_validate(json.loads(content))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        loc = list(first["loc"])
        form = next((i for i, part in enumerate(loc[:-1]) if part in FORMS), None)
        if form is not None:
            place = first["loc"][: form + 1]
            within = [e for e in error.errors() if e["loc"][: form + 1] == place and len(e["loc"]) > form + 2]
            if within and all(e["type"] == "extra_forbidden" for e in within):  # it has that form, and more
                first = within[0]
                loc, form = [*place, *first["loc"][form + 2 :]], None  # without pydantic's name of the form
        said = said_of(kind, first) if form is None else f"it must be {FORMS[str(loc[form])]}"
        field = ".".join(str(part) for part in loc[: None if form is None else form + 1]) or "the body"
        param = str(loc[0])[:LONGEST_NAME] if loc else None
        raise WireError(400, f"{field[:LONGEST_NAME]}: {said}", param=param) from None
    except (ValueError, RecursionError) as error:
        raise WireError(400, f"the body is no JSON: {type(error).__name__}") from None


class Answer:
    """The objects of one answer, which share an id, a time and a model.

    of_text: whether its prompts were given as text, not as ids.
    """

    def __init__(self, model: str, chat: bool, of_text: bool = True) -> None:
        self.chat, self.of_text = chat, of_text
        self.whole = "chat.completion" if chat else "text_completion"
        self.head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def completion(self, choices: list[tuple[str, str]], usage: dict[str, int]) -> dict[str, Any]:
        """choices: (text, finish_reason) of each."""
        return {**self.head, "object": self.whole, "usage": usage, "choices": [
            {"index": i, "finish_reason": reason, "logprobs": None}
            | ({"message": {"role": "assistant", "content": text}} if self.chat else {"text": text})
            for i, (text, reason) in enumerate(choices)
        ]}  # fmt: skip

    def piece(self, text: str | None, reason: str | None = None) -> str:
        """An event with some text, or the beginning of a chat (None), or the reason of its end."""
        choice: dict[str, Any] = {"index": 0, "finish_reason": reason, "logprobs": None}
        if not self.chat:
            choice["text"] = text or ""
        elif text is None:
            choice["delta"] = {"role": "assistant", "content": ""}
        else:
            choice["delta"] = {"content": text} if text else {}
        return self.event({"choices": [choice]})

    def usage(self, usage: dict[str, int]) -> str:
        return self.event({"choices": [], "usage": usage})

    def event(self, content: dict[str, Any]) -> str:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return f"data: {json.dumps({**self.head, 'object': kind, **content}, ensure_ascii=False)}\n\n"


def usage_of(prompt: int, generated: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}
