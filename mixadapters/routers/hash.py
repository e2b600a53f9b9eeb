"""A router without weights: each token has its expert."""

from __future__ import annotations

from zlib import crc32

from torch import Tensor

from mixadapters.core.context import ForwardContext
from mixadapters.core.routing import Routing
from mixadapters.routers.base import LOSS_OPTIONS, ROUTERS, Router
from mixadapters.routers.options import check_options
from mixadapters.routers.tokens import token_ids


@ROUTERS.register("hash")
class HashRouter(Router):
    """One expert for each id of a token, with weight 1, by arithmetic (Roller et al. 2021, arXiv 2106.04426).

    Reads `input_ids`. Routers of one seed and one number of experts agree, in any process.

    Args:
        seed: of the hash.
    """

    fixed_experts = "with other experts every token would have another one; make a new router"
    without = LOSS_OPTIONS
    by_text = True

    def __init__(self, in_features: int, experts: list[str], *, seed: int = 0) -> None:
        super().__init__(in_features, experts)
        check_options(seed=seed)
        self.seed, self.salt = seed, crc32(str(seed).encode())

    def forward(self, tokens: Tensor, context: ForwardContext) -> Routing:
        ids = token_ids(context, self.stack, tokens.numel() // tokens.shape[-1], "router 'hash'").to(tokens.device)
        code = (ids.long().reshape(-1, 1) ^ self.salt) & 0xFFFFFFFF
        for _ in range(2):  # the finalizer of MurmurHash3 in 32 bits, of which 64 hold the products
            code = ((code ^ (code >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
        return Routing((code ^ (code >> 16)) % len(self.experts))

    def add_expert(self, name: str, share: float) -> None:
        raise ValueError(f"HashRouter: {self.fixed_experts}")

    def remove_expert(self, name: str, renormalize: bool) -> None:
        raise ValueError(f"HashRouter: {self.fixed_experts}")
