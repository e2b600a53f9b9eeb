"""A dense FFN as experts: its hidden units in groups, and a router that says which groups a token needs.

Source: Cai et al. 2024, Read-ME (arXiv 2410.19123), section 3. There a domain's expert is a mask of the channels that
are most active on it, masks may overlap, and one router before the first layer serves all. Here the groups part the
units, so that all of them together are the FFN, exactly; each layer has a router, fitted in closed form to how
strongly the groups answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from mixadapters.core.bank import AdapterBank, Weights
from mixadapters.core.evaluation import in_evaluation
from mixadapters.core.fields import check_integer, check_kind, check_number
from mixadapters.core.files import weights_of
from mixadapters.core.folders import written_aside
from mixadapters.core.hooks import root_of
from mixadapters.core.routing import Routing
from mixadapters.core.showing import brief
from mixadapters.surgery.splitting import split_expert
from mixadapters.surgery.view import batches_of, check_model

Batches = Sequence[dict[str, Any]]  # arguments of a model
PARTS = ("gate_proj", "up_proj", "down_proj")  # of the FFNs that are known here
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "relu": "relu", "gelu_pytorch_tanh": "gelu_tanh",
               "gelu_new": "gelu_tanh"}  # fmt: skip
SHARED = "shared"


@dataclass(frozen=True)
class FFNPlan:
    """How one FFN of H units is parted."""

    groups: tuple[Tensor, ...]  # (h,) int64 each, the units of each expert
    shared: Tensor  # (s,) int64, units that are always on
    router: Tensor  # (n, K + 1), how strongly each group answers; the last column is the bias

    __repr__ = brief


class ExtractedFFN(nn.Module):
    """An FFN of which each token uses `top_k` experts of n, with weight 1, and what is shared.

    With top_k = n it is the dense FFN. The router learns by the gradient of its chosen scores, while their value is 1.
    """

    def __init__(self, ffn: Any, plan: FFNPlan, activation: str, top_k: int) -> None:
        super().__init__()
        gate, down, up = (getattr(ffn, name) for name in PARTS)
        weights = Weights(down.weight, up.weight, down.bias, up.bias, gate.weight, gate.bias)
        groups = [*plan.groups, *([plan.shared] if len(plan.shared) else [])]
        names = [*(f"expert{i}" for i in range(len(plan.groups))), *([SHARED] if len(plan.shared) else [])]
        bias = gate.bias is not None or up.bias is not None
        self.bank = AdapterBank(gate.in_features, up.out_features, activation=activation, glu=True, bias=bias)
        for name, part in zip(names, split_expert(weights, groups), strict=True):
            self.bank.add(name, len(part.down))
            self.bank.experts[name].to(gate.weight.device, gate.weight.dtype)
            for key, parameter in self.bank.experts[name].named_parameters():
                held = getattr(part, ("" if key.endswith("weight") else "b_") + key.partition(".")[0])
                parameter.data.copy_(torch.zeros_like(parameter) if held is None else held)
                parameter.requires_grad_(gate.weight.requires_grad)
        self.router = nn.Linear(gate.in_features, len(plan.groups)).to(gate.weight.device)
        self.router.weight.data.copy_(plan.router[:, :-1])
        self.router.bias.data.copy_(plan.router[:, -1])
        self.shared, self.top_k = len(plan.shared) > 0, top_k

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        count = self.router.out_features
        scores = self.router(tokens.to(self.router.weight.dtype))
        chosen = scores.topk(min(self.top_k, count)).indices
        kept = scores.gather(1, chosen)
        weights = (1 + kept - kept.detach()).to(tokens.dtype)
        if self.shared:
            chosen = F.pad(chosen, (0, 1), value=count)
            weights = F.pad(weights, (0, 1), value=1.0)
        return self.bank(tokens, Routing(chosen, weights), None).view_as(x)


@dataclass(frozen=True)
class Extraction:
    """What `extract_experts` has found, by the path of each FFN."""

    plans: dict[str, FFNPlan]

    __repr__ = brief

    def apply(self, model: nn.Module, top_k: int | None = None) -> None:
        """Put experts in the place of the model's FFNs.

        top_k: experts that a token uses; None: all, which is the dense model.

        Raises:
            ValueError: FFNs that are not there, or of another width; or top_k out of range. Nothing is changed.
        """
        check_model(model)
        root = root_of(model)
        ffns = dense_ffns(root)
        for path, plan in self.plans.items():
            units = torch.cat([*plan.groups, plan.shared]).sort().values
            if path not in ffns:
                raise ValueError(f"the model has no FFN at {path!r}; it has {sorted(ffns)}")
            gate = ffns[path][0].gate_proj
            if units.tolist() != list(range(gate.out_features)) or plan.router.shape[1] != gate.in_features + 1:
                raise ValueError(
                    f"the plan for {path!r} is not for an FFN of {gate.in_features} x {gate.out_features}"
                )
            _check_top_k(top_k, len(plan.groups))
        for path, plan in self.plans.items():
            ffn, activation = ffns[path]
            owner, _, name = path.rpartition(".")
            made = ExtractedFFN(ffn, plan, activation, len(plan.groups) if top_k is None else top_k)
            setattr(root.get_submodule(owner), name, made.train(ffn.training))

    def save(self, file: str | Path) -> None:
        """Write which units go together, and the routers: what makes experts of the dense model again."""
        tensors: dict[str, Tensor] = {}
        for path, plan in self.plans.items():
            tensors |= {f"{path}:{i}": group for i, group in enumerate(plan.groups)}
            tensors |= {f"{path}:shared": plan.shared, f"{path}:router": plan.router.contiguous()}
        with written_aside(file) as aside:
            save_file(tensors, aside)

    @classmethod
    def load(cls, file: str | Path) -> Extraction:
        """What `save` has written. Raises ValueError for another file."""
        found: dict[str, dict[str, Tensor]] = {}
        check_kind("file", file, (str, PathLike), "the path of a file")
        with weights_of(file) as tensors:
            for key in tensors:
                path, _, name = key.rpartition(":")
                found.setdefault(path, {})[name] = tensors[key]
        plans = {}
        for path, parts in found.items():
            names = {"shared", "router", *(str(i) for i in range(len(parts) - 2))}
            if not path or parts.keys() != names or parts["router"].shape[:1] != (len(parts) - 2,):
                raise ValueError(f"{file} holds no extraction: {path!r} has {sorted(parts)}")
            groups = tuple(parts[str(i)] for i in range(len(parts) - 2))
            if any(t.dtype != torch.int64 or t.dim() != 1 for t in (*groups, parts["shared"])):
                raise ValueError(f"{file} holds no extraction: groups at {path!r} are no lists of units")
            router = parts["router"]
            if router.dim() != 2 or not router.is_floating_point() or not bool(router.isfinite().all()):
                raise ValueError(f"{file} holds no extraction: the router at {path!r} is no matrix of finite numbers")
            plans[path] = FFNPlan(groups, parts["shared"], router)
        if not plans:
            raise ValueError(f"{file} holds no extraction: it is empty")
        return cls(plans)


def dense_ffns(root: nn.Module) -> dict[str, tuple[Any, str]]:
    """path -> (module, activation) of the gated FFNs of a model. Raises ValueError where there is none."""
    found: dict[str, tuple[Any, str]] = {}
    for path, module in root.named_modules():
        parts = [getattr(module, name, None) for name in PARTS]
        if not all(type(part) is nn.Linear for part in parts):
            continue
        config: Any = getattr(module, "config", None) or getattr(root, "config", None)
        name = next((n for key in ("hidden_act", "hidden_activation") if (n := getattr(config, key, None))), None)
        if name not in ACTIVATIONS:
            raise ValueError(f"the FFN at {path!r} has the activation {name!r}; known are {sorted(ACTIVATIONS)}")
        found[path] = (module, ACTIVATIONS[name])
    if not found:
        raise ValueError(
            f"{type(root).__name__} has no FFN of {', '.join(PARTS)}, plain linear layers as in Llama: others, "
            "quantized ones and those with adapters are not known here"
        )
    return found


@torch.no_grad()
def extract_experts(
    model: nn.Module,
    n: int,
    calibration: Batches | Mapping[str, Batches],
    *,
    shared: float = 0.0,
    top_k: int | None = None,
    samples: int = 2048,
    seed: int = 0,
) -> Extraction:
    """Part each dense FFN of a model into n experts, in place. With all of them on it computes what it did.

    Args:
        calibration: batches by domain, as many domains as experts, of which each gets the units that are active on it
            beyond other domains; or a list of batches, whose tokens are clustered by the units that they activate.
        shared: share of the units that are always on: those that are active on the whole.
        top_k: experts that a token uses; None: all.
        samples: tokens of each domain, or of the list, at most.
        seed: of the clustering.

    Raises:
        ValueError: a number out of range, other numbers of domains, FFNs that are not known, or no tokens.
    """
    check_model(model)
    check_integer("seed", seed)
    _check_numbers(n, shared, top_k, samples)
    domains = dict(calibration) if isinstance(calibration, Mapping) else {"": calibration}
    if isinstance(calibration, Mapping) and len(domains) != n:
        raise ValueError(
            f"n={n} experts of {len(domains)} domains {sorted(domains)}: give as many, or one list of batches"
        )
    ffns, plans = dense_ffns(root_of(model)), {}
    for path, (ffn, _) in ffns.items():
        units = ffn.down_proj.in_features
        if units - round(shared * units) < n:
            raise ValueError(f"n={n} and shared={shared} leave no unit for some experts of the {units} at {path!r}")
    for path, (ffn, _) in ffns.items():
        seen = [_seen(model, ffn, batches, samples) for batches in domains.values()]
        if not all(len(inputs) for inputs, _ in seen):
            raise ValueError(f"no token of calibration reaches the FFN at {path!r} in each domain")
        if not all(bool(part.isfinite().all()) for parts in seen for part in parts):
            raise ValueError(f"the FFN at {path!r} reads or makes values of calibration that are NaN or infinite")
        inputs, active = torch.cat([x for x, _ in seen]), torch.cat([h for _, h in seen])
        if isinstance(calibration, Mapping):
            of_domain = torch.arange(n).repeat_interleave(torch.tensor([len(x) for x, _ in seen]))
        else:
            of_domain = cluster(active, n, seed)
        plans[path] = plan_ffn(inputs, active, ffn.down_proj.weight, of_domain, n, shared)
    found = Extraction(plans)
    found.apply(model, top_k)
    return found


def _check_numbers(n: int, shared: float, top_k: int | None, samples: int) -> None:
    check_integer("n", n, least=2)
    check_number("shared", shared, least=0, below=1)
    check_integer("samples", samples, least=n)
    _check_top_k(top_k, n)


def _check_top_k(top_k: int | None, n: int) -> None:
    if top_k is not None:
        check_integer("top_k", top_k, least=1, most=n)


def _seen(model: nn.Module, ffn: Any, batches: Iterable[dict[str, Any]], samples: int) -> tuple[Tensor, Tensor]:
    """What an FFN reads, (N, K), and the sizes of its hidden units, (N, H), of the first N <= samples real tokens."""
    inputs: list[Tensor] = []
    active: list[Tensor] = []
    mask: Tensor | None = None

    def look(module: nn.Module, args: tuple) -> None:
        hidden = args[0].reshape(-1, args[0].shape[-1])
        real = slice(None) if mask is None or mask.numel() != len(hidden) else mask.reshape(-1).bool()
        left = samples - sum(map(len, active))
        (active if module is ffn.down_proj else inputs).append(hidden[real][:left].float())

    handles = [ffn.gate_proj.register_forward_pre_hook(look), ffn.down_proj.register_forward_pre_hook(look)]
    try:
        with in_evaluation(model):
            for batch in batches_of("calibration", batches):
                mask = batch.get("attention_mask")
                if sum(map(len, active)) < samples:
                    model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    if not active:
        return torch.zeros(0, ffn.gate_proj.in_features), torch.zeros(0, ffn.gate_proj.out_features)
    return torch.cat(inputs), torch.cat(active).abs()


def cluster(active: Tensor, n: int, seed: int = 0, rounds: int = 20) -> Tensor:
    """active (N, H) sizes of hidden units -> (N,) the cluster of each token, by the angle between patterns."""
    rows = F.normalize(active, dim=1)
    generator = torch.Generator().manual_seed(seed)
    centres = [rows[int(torch.randint(len(rows), (), generator=generator))]]
    for _ in range(n - 1):  # each next centre is far from those before
        far = 1 - torch.stack([rows @ centre for centre in centres]).amax(0)
        centres.append(rows[int(torch.multinomial(far.clamp_min(1e-9), 1, generator=generator))])
    means = torch.stack(centres)
    of_cluster = torch.zeros(len(rows), dtype=torch.long)
    for _ in range(rounds):
        of_cluster = (rows @ means.t()).argmax(1).cpu()
        for i in range(n):
            if (of_cluster == i).any():
                means[i] = F.normalize(rows[of_cluster == i].mean(0), dim=0)
    return of_cluster


def plan_ffn(inputs: Tensor, active: Tensor, down: Tensor, of_domain: Tensor, n: int, shared: float = 0.0) -> FFNPlan:
    """Which units of an FFN go together, and a router for them.

    Args:
        inputs: (N, K) what it reads. active: (N, H) sizes of its units.
        down: (M, H) the weight that reads the units: what a unit adds is its size times the norm of its column.
        of_domain: (N,) the domain of each token, from 0 to n - 1.
    """
    said = active * down.float().norm(dim=0)
    members = [said[of_domain == i] for i in range(n)]
    strength = torch.stack([rows.sum(0) / max(len(rows), 1) for rows in members])
    order = strength.amin(0).argsort(descending=True)  # active in every domain: the intersection of the masks
    always, rest = order[: round(shared * active.shape[1])].sort().values, order[round(shared * active.shape[1]) :]
    groups = balanced_groups(strength[:, rest] / strength[:, rest].sum(0).clamp_min(1e-12), rest)
    answers = torch.stack([said[:, group].square().sum(1).sqrt() for group in groups], 1)  # (N, n)
    return FFNPlan(tuple(groups), always, _fitted(inputs, answers))


def balanced_groups(preference: Tensor, units: Tensor) -> list[Tensor]:
    """Groups of equal size (by one); the strongest preferences are met first.

    preference: (n, U) of n groups for each of the units (U,).
    """
    n, count = preference.shape
    room = [count // n + (i < count % n) for i in range(n)]
    groups: list[list[int]] = [[] for _ in range(n)]
    placed = [False] * count
    for place in preference.flatten().argsort(descending=True, stable=True).tolist():
        group, unit = divmod(place, count)
        if not placed[unit] and len(groups[group]) < room[group]:
            groups[group].append(int(units[unit]))
            placed[unit] = True
    return [torch.tensor(sorted(group), dtype=torch.long) for group in groups]


def _fitted(inputs: Tensor, answers: Tensor, ridge: float = 1e-2) -> Tensor:
    """(n, K + 1) the linear map, with a bias, from inputs (N, K) to answers (N, n) in least squares."""
    read = F.pad(inputs.double(), (0, 1), value=1.0)
    moments = read.t() @ read
    shift = ridge * moments.diagonal().mean() * torch.eye(len(moments), dtype=moments.dtype)
    return torch.linalg.solve(moments + shift, read.t() @ answers.double()).t().float()


@contextmanager
def using_experts(model: nn.Module, top_k: int) -> Iterator[None]:
    """Have each token use so many experts of every extracted FFN inside the block.

    Raises:
        ValueError: the model has none, or top_k is out of range.
    """
    check_model(model)
    found = [module for module in model.modules() if isinstance(module, ExtractedFFN)]
    if not found:
        raise ValueError(f"{type(model).__name__} has no extracted experts; extract_experts makes some")
    for module in found:
        check_integer("top_k", top_k, least=1, most=module.router.out_features)
    before = [module.top_k for module in found]
    try:
        for module in found:
            module.top_k = top_k
        yield
    finally:
        for module, k in zip(found, before, strict=True):
            module.top_k = k
