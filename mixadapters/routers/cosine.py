"""A top-k by direction."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from mixadapters.core.bank import Scale
from mixadapters.routers.base import ROUTERS
from mixadapters.routers.options import check_options
from mixadapters.routers.score import linear
from mixadapters.routers.top_k import TopKRouter

LARGEST_SCALE = 100.0


@ROUTERS.register("cosine")
class CosineRouter(TopKRouter):
    """Top-k by s cos(W x, c_e) + b_e, with a learned factor s of at most 100.

    Source: Liu et al. 2022 (Swin V2's MoE), as in Tutel; the bias, which starts at 0, is ours.

    Args:
        projection: rows of W.
    """

    def __init__(self, in_features: int, experts: list[str], *, projection: int = 256, **options: Any) -> None:
        super().__init__(in_features, experts, **options)
        check_options(projection=projection)
        self.hidden.append(nn.Linear(self.output.in_features, projection, bias=False))
        output = nn.Linear(projection, len(self.arms))
        nn.init.normal_(output.weight, std=self.init_range)
        output.bias = self.output.bias
        self.output = output
        self.log_scale = Scale(math.log(2.0))

    def project(self, read: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        scale = self.log_scale.weight.to(read.dtype).clamp_max(math.log(LARGEST_SCALE)).exp()
        scores = scale * linear(F.normalize(read, dim=-1), F.normalize(weight.to(read.dtype), dim=-1), None)
        return scores if bias is None else scores + bias.to(scores.dtype)
