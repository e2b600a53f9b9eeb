"""What numbers a server and its requests may have, and the settings of transformers that are made of them."""

from __future__ import annotations

import math
import warnings
from typing import Any

from transformers import ContinuousBatchingConfig, GenerationConfig

from mixadapters.core.fields import check_integer, finite, one_of
from mixadapters.serving.requests import WrongArgument
from mixadapters.serving.scheduler import SCHEDULERS

NEW_TOKENS = 256  # of a request that does not say how many
COLDEST = 1e-3  # temperature of a request that samples: logits over a smaller one leave what a float holds


# Of a generation config: what changes the tokens of `generate` even where it is greedy, and the value that does not.
UNSERVED = {
    "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "bad_words_ids": None,
    "suppress_tokens": None, "begin_suppress_tokens": None, "sequence_bias": None, "min_length": 0,
    "min_new_tokens": 0, "forced_bos_token_id": None, "forced_eos_token_id": None, "guidance_scale": 1.0,
    "exponential_decay_length_penalty": None, "stop_strings": None, "watermarking_config": None, "penalty_alpha": 0.0,
    "dola_layers": None,
}  # fmt: skip


def check_sizes(sizes: dict[str, Any]) -> None:
    """Refuse sizes of a server that are no positive integers, or too small for each other."""
    for name, size in sizes.items():
        check_integer(name, size, least=1)
    page_size, cache_tokens = sizes["page_size"], sizes["cache_tokens"]
    if page_size < 4 or cache_tokens < page_size:
        raise ValueError(f"page_size={page_size} must be 4 or more, and cache_tokens={cache_tokens} hold a page")


def batching_settings(
    sizes: dict[str, Any], share_prefixes: bool, sampling: bool, scheduler: str
) -> ContinuousBatchingConfig:
    one_of("scheduler", scheduler, SCHEDULERS)
    return ContinuousBatchingConfig(
        page_size=sizes["page_size"],
        num_blocks=sizes["cache_tokens"] // sizes["page_size"],
        max_batch_tokens=sizes["max_batch_tokens"],
        max_requests_per_batch=min(sizes["max_running"], sizes["max_batch_tokens"]),
        allow_block_sharing=share_prefixes,
        per_request_processors=sampling,
        scheduler_type=SCHEDULERS[scheduler],
        # A graph that is replayed, or compiled, would have the adapters of the step that it was made in.
        use_cuda_graph=False,
        use_async_batching=False,
    )


def generation_settings(model: Any, sampling: bool) -> GenerationConfig:
    """What all requests share: the ids that end a text, and whether a step samples.

    transformers makes the parts that read a request's own numbers only where the shared ones are not neutral.
    Continuous batching passes over most other settings, which a warning names.
    """
    own = model.generation_config
    asked = {name: getattr(own, name, None) for name in UNSERVED}
    said = [f"{name}={v!r:.60}" for name, v in asked.items() if v is not None and v not in (UNSERVED[name], [], {})]
    if said:
        warnings.warn(
            f"the model's generation_config has {', '.join(said)}, which continuous batching passes over: requests "
            "get other tokens than `generate` gives. Take it out of model.generation_config if that is meant",
            stacklevel=3,
        )
    ends = own.eos_token_id if own.eos_token_id is not None else -1
    settings = GenerationConfig(do_sample=False, eos_token_id=ends, pad_token_id=own.pad_token_id)
    if sampling:
        settings.update(do_sample=True, temperature=0.5, top_k=1, top_p=0.5)
    return settings


def stops_of(settings: GenerationConfig) -> list[int]:
    """The ids that end a text; [] where the model names none."""
    own = settings.eos_token_id
    ends = own if isinstance(own, list) else [own]
    return [end for end in ends if end is not None and end >= 0]


def sampling_options(model: Any, temperature: float | None, top_p: float) -> dict[str, Any]:
    """A request's own numbers; greedy requests draw among one token."""
    if not temperature:
        return {"temperature": 1.0, "top_k": 1, "top_p": 1.0}
    size = model.config.get_text_config().vocab_size
    return {"temperature": float(temperature), "top_k": size, "top_p": float(top_p)}


def new_tokens(model: Any, capacity: int, prompt: int, wanted: int | None) -> int:
    """How many tokens a request generates at most.

    Args:
        capacity: tokens that the cache has room for.
        prompt: tokens of the prompt.
        wanted: None: NEW_TOKENS, or as many as there is room for.

    Raises:
        ValueError: no positive integer, or more than there is room for.
    """
    if wanted is not None:
        check_integer("max_new_tokens", wanted, least=1)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or capacity
    most = min(capacity, positions)
    room = f"the {most} tokens of a request (positions of the model: {positions}, cache_tokens: {capacity})"
    if prompt >= most:
        raise WrongArgument("prompt", f"a prompt of {prompt} tokens leaves none to generate of {room}: shorten it")
    if wanted is not None and prompt + wanted > most:
        raise WrongArgument(
            "max_new_tokens",
            f"a prompt of {prompt} tokens and max_new_tokens={wanted} are more than {room}: ask for at most "
            f"{most - prompt}, or shorten the prompt",
        )
    return wanted or min(NEW_TOKENS, most - prompt)


def check_numbers(sampling: bool, deadline: Any, temperature: Any, top_p: Any) -> None:
    """Raises ValueError for numbers that a request cannot have. sampling: whether the server samples."""
    if deadline is not None and not _number(deadline, above=0.0):
        raise WrongArgument("deadline", f"deadline={deadline!r} must be seconds above 0, or None")
    if temperature is not None and not (_number(temperature) and (temperature == 0 or temperature >= COLDEST)):
        raise WrongArgument("temperature", f"temperature={temperature!r} must be 0, or {COLDEST} or more")
    if not _number(top_p, above=0.0) or top_p > 1:
        raise WrongArgument("top_p", f"top_p={top_p!r} must be above 0 and at most 1")
    if temperature and not sampling:
        raise WrongArgument(
            "temperature",
            f"temperature={temperature}: this server is greedy; start it with sampling=True (--sampling)",
        )


def _number(value: Any, above: float = -math.inf) -> bool:
    return finite(value) and value > above
