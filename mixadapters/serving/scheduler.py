"""Which prompts a step reads: long ones do not hold up short ones, nor do they wait for ever."""

from __future__ import annotations

from transformers.generation.continuous_batching.requests import FutureRequestState, RequestState, RequestStatus
from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING, FIFOScheduler

TURNS = 4  # one step in so many begins with the oldest prompt, whatever is left of it


class FairScheduler(FIFOScheduler):
    """First the requests that are being written, then prompts: the shortest rest first, in some steps the oldest.

    transformers' "fifo" reads prompts in the order in which they came, so that a short one waits for all before it.
    Here it waits for a step or two. Every prompt becomes the oldest and has its steps then, so that all are read.
    """

    def reset(self) -> None:
        super().reset()
        self._arrived: dict[str, int] = {}  # request id -> its number, which it keeps where it is put back
        self._count = self._turn = 0

    def add_waiting_request(self, state: RequestState) -> None:
        super().add_waiting_request(state)
        self._count += 1
        self._arrived.setdefault(state.request_id, self._count)

    def schedule_batch(
        self, token_budget: int, cache_budget: int
    ) -> tuple[list[FutureRequestState] | None, bool, int, int]:
        held = self.active_requests.keys() | self.waiting_requests.keys()
        self._arrived = {name: number for name, number in self._arrived.items() if name in held}
        written = [state for state in self.active_requests.values() if state.status == RequestStatus.DECODING]
        started = [state for state in self.active_requests.values() if state.status == RequestStatus.PREFILLING]
        waiting = [] if self.block_new_requests else list(self.waiting_requests.values())
        gone: set[str] = set()
        scheduled, denied, fast, tokens, read = self._process_candidates(
            written + self._in_order(started + waiting), token_budget, cache_budget, gone
        )
        self._cleanup_waiting_queue(gone)
        if not scheduled and denied:  # the cache is full, and the caller makes room
            return None, fast, 0, 0
        return scheduled, fast, tokens, read

    def _in_order(self, prompts: list[RequestState]) -> list[RequestState]:
        prompts.sort(key=lambda state: (len(state.remaining_prefill_tokens), self._arrived[state.request_id]))
        if len(prompts) > 1:
            self._turn = (self._turn + 1) % TURNS
            if self._turn == 0:
                oldest = min(range(len(prompts)), key=lambda i: self._arrived[prompts[i].request_id])
                prompts.insert(0, prompts.pop(oldest))
        return prompts


SCHEDULERS = {"fair": "mixadapters_fair", "fifo": "fifo"}  # a server's word -> transformers'
SCHEDULER_MAPPING[SCHEDULERS["fair"]] = FairScheduler
