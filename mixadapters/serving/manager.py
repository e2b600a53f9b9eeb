"""transformers' continuous batching, told which adapter each request names.

What it lacks for that are four things: whose tokens a step packs into its row, where results go, prefixes that are
shared by requests of one adapter only, and word when its loop has ended. `ServingManager` gives it these.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, Protocol

from transformers.generation.continuous_batching import continuous_api
from transformers.utils.versions import require_version

from mixadapters.core.context import ForwardContext
from mixadapters.core.streams import PackedRequests

# Earlier ones know no pause, or refuse the forwards that are tried in it.
require_version("transformers>=5.19", "the server needs its continuous batching: pip install -U transformers")
SALTED = 4  # tokens at the beginning of a prefix that are salted: no page of the cache is shorter


class Work(Protocol):
    """What a server does for its manager, in the manager's thread."""

    def before_step(self) -> None:
        """Called before the tokens of a step are chosen."""

    def packed(self, ids: Sequence[str], lengths: Sequence[int], past: Sequence[int]) -> PackedRequests:
        """Whose tokens a step packs: these requests, each with so many, after so many that are in the cache."""

    def salt(self, request_id: str) -> str:
        """Requests of other salts share no prefix."""

    def deliver(self, output: Any) -> None:
        """What a request has come to so far (transformers' GenerationOutput)."""

    def ended(self, error: Exception | None) -> None:
        """The loop has ended, by this error if by one."""


class Deliveries(continuous_api.OutputRouter):
    """Hands each output to the server at once."""

    def __init__(self, deliver: Callable[[Any], None]) -> None:
        super().__init__()
        self._deliver = deliver

    def deliver(self, output: Any) -> None:
        self._deliver(output)

    def deliver_batch(self, outputs: list[Any]) -> None:
        for output in outputs:
            self._deliver(output)


class ServingManager(continuous_api.ContinuousBatchingManager):
    """A manager of continuous batching whose steps know the adapter of each request."""

    def __init__(self, context: ForwardContext, work: Work, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.context, self.work = context, work
        self.output_router = Deliveries(work.deliver)

    def wake(self) -> None:
        """Have an idle loop look for work at once."""
        self._wake_up_loop.set()

    def _create_batch_processor(self) -> Any:
        processor = super()._create_batch_processor()
        if processor.cache.use_prefix_sharing:
            salt_prefixes(processor.cache, self.work.salt)
        return processor

    def _generation_loop_body(self, *args: Any, **kwargs: Any) -> bool:
        self.work.before_step()
        return super()._generation_loop_body(*args, **kwargs)

    def _generation_step(self) -> None:
        batch = self.batch_processor.inputs_and_outputs.requests_in_batch
        lengths = [one.query_length for one in batch]
        past = [one.state.position_offset - one.query_length for one in batch]  # it counts those of the step already
        requests = self.work.packed([one.state.request_id for one in batch], lengths, past)
        with self.context.packing(requests):
            super()._generation_step()

    def _run_generation_loop(self, **modes: Any) -> None:
        try:
            super()._run_generation_loop(**modes)
        finally:
            self.work.ended(self.background_thread_status.fatal_error)


def salt_prefixes(cache: Any, salt_of: Callable[[str], str]) -> None:
    """Have a paged cache share prefixes only between requests of one salt.

    It knows a prefix by a hash of its tokens, under which the keys and values of another adapter would be found too.
    Here it hashes the tokens with the first of them changed by a digest of the salt. transformers has no seam for
    that, so the two methods that look at tokens are wrapped, once.
    """
    if hasattr(cache, "salted"):
        return
    search, mark = cache.search_prefix_match, cache.mark_complete_blocks

    def search_prefix_match(request_id: str, prompt_ids: list[int]) -> int:
        return search(request_id, salted(prompt_ids, salt_of(request_id)))

    def mark_complete_blocks(state: Any, complete_blocks: dict[str, int]) -> None:
        if complete_blocks:
            tokens = salted(state.initial_tokens + state.generated_tokens, salt_of(state.request_id))
            state = SimpleNamespace(
                request_id=state.request_id, status=state.status, initial_tokens=tokens, generated_tokens=[]
            )
        mark(state, complete_blocks)

    cache.search_prefix_match, cache.mark_complete_blocks, cache.salted = (
        search_prefix_match, mark_complete_blocks, True,
    )  # fmt: skip


def salted(tokens: list[int], salt: str) -> list[int]:
    """The tokens, the first of them mixed with a digest of the salt: equal only for equal tokens and salts."""
    digest = array("i", hashlib.blake2b(salt.encode(), digest_size=4 * SALTED).digest())
    return [token ^ mask for token, mask in zip(tokens, digest, strict=False)] + tokens[SALTED:]
