"""A router of one's own: the experts whose score is within a margin of the best.

python examples/moa_router.py BASE
"""

import argparse

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from mixadapters import ROUTERS, MoAConfig
from mixadapters.core.routing import Routing
from mixadapters.routers import LearnedRouter


@ROUTERS.register("near_best")
class NearBest(LearnedRouter):
    frozen_arm = False

    def __init__(self, *args, margin=0.1, **options):
        super().__init__(*args, **options)
        self.margin = margin

    def choose(self, logits):
        probs = logits.softmax(-1)
        near = probs >= probs.amax(-1, keepdim=True) - self.margin
        return Routing(torch.where(near, torch.arange(near.shape[1], device=near.device), -1), probs, probs=probs)


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("base")
given = parser.parse_args()
model = AutoModelForCausalLM.from_pretrained(given.base)
model = get_peft_model(model, MoAConfig(experts=["law", "code", "chat"], router={"kind": "near_best", "margin": 0.2}))
tokens = AutoTokenizer.from_pretrained(given.base)("A first try", return_tensors="pt")
with model.base_model.record_usage() as usage:
    model.eval()(**tokens)
print(usage.report())
