"""A shared base for all, and a small adapter for each user, where a gate finds that a sample is the user's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mixadapters.core.evaluation import in_training
from mixadapters.core.fields import check_integer, check_kind, check_number, check_share
from mixadapters.core.files import weights_of
from mixadapters.core.folders import written_aside
from mixadapters.core.registry import nearest
from mixadapters.core.rows import BASE
from mixadapters.core.showing import brief
from mixadapters.serving.cascade import count_rows, rows_of
from mixadapters.serving.pooled_states import what_trains_kept

GATE = "gate.safetensors"


@dataclass(frozen=True)
class FeatureGaussian:
    """What generic samples are like, in place of the samples: their features' mean and spread, for replay.

    Args:
        mean: (d,)
        factor: (d, k) with covariance factor @ factor.T.
    """

    mean: Tensor
    factor: Tensor

    __repr__ = brief

    @classmethod
    def fit(cls, features: Tensor) -> FeatureGaussian:
        """features (N, d) with N of 2 or more."""
        if features.dim() != 2 or len(features) < 2:
            raise ValueError(f"features {tuple(features.shape)} must be (N, d) with N of 2 or more")
        mean = features.float().mean(0)
        centred = (features.float() - mean) / (len(features) - 1) ** 0.5
        _, values, directions = torch.linalg.svd(centred, full_matrices=False)
        return cls(mean, directions.T * values)

    def sample(self, count: int, seed: int = 0) -> Tensor:
        """(count, d) features, the same for the same seed."""
        noise = torch.randn(count, self.factor.shape[1], generator=torch.Generator().manual_seed(seed))
        return self.mean + noise @ self.factor.T


@dataclass(frozen=True)
class Gate:
    """How probable it is that a sample is the user's: sigmoid(features @ weight + bias)."""

    weight: Tensor  # (d,)
    bias: Tensor  # ()

    __repr__ = brief

    def __call__(self, features: Tensor) -> Tensor:
        """features (N, d) -> (N,)"""
        return (features.float() @ self.weight + self.bias).sigmoid()


@dataclass(frozen=True)
class Overhead:
    """What one user adds to the base."""

    parameters: int  # of the adapter and the gate
    share: float  # of the base's parameters
    macs: int  # multiplications for each token of the user's, besides the gate's, which are few for each text


class GlobalLocalMixture:
    """The base model for generic samples, and a user's adapter for the user's own, by a gate on base states.

    Adapters have the names of their users. The base is never changed, and no user's files hold anything of another's.

        mixture = GlobalLocalMixture(model, embed=PooledStates(model))
        mixture.fit_user("alice", samples, replay)
        output = mixture("alice", batch)

    Source: arXiv 1811.00056, low-cost customisation: a frozen global network, a tiny local one for what it gets wrong,
    and a gate that picks one of them for each sample.

    Args:
        model: a PEFT model that runs mixed batches, with an adapter for each user.
        embed: input_ids, attention_mask (N, T) -> features (N, d), such as `PooledStates`.
        threshold: the user's adapter runs where the gate is at least so sure, 0 to 1.

    Attributes:
        gates: user -> `Gate`.

    Raises:
        ValueError: a threshold out of range.
    """

    def __init__(self, model: Any, embed: Callable[..., Tensor], threshold: float = 0.5) -> None:
        check_kind("model", model, nn.Module, "a PeftModel with an adapter for each user")
        check_share("threshold", threshold)
        if not hasattr(model, "peft_config") or not callable(embed):
            raise ValueError(
                f"model={type(model).__name__} must be a PeftModel with an adapter for each user, and embed "
                f"({type(embed).__name__}) make features of tokens, such as PooledStates(model)"
            )
        self.model, self.embed, self.threshold = model, embed, threshold
        self.gates: dict[str, Gate] = {}

    # --- learning -------------------------------------------------------------------------------------------------

    def fit_user(
        self,
        user: str,
        samples: Mapping[str, Tensor],
        generic: Tensor | FeatureGaussian,
        *,
        epochs: int = 10,
        batch_size: int = 16,
        rate: float = 1e-3,
        seed: int = 0,
    ) -> list[float]:
        """Train the user's adapter on the user's samples, then the gate, which replays what is generic.

        Args:
            samples: input_ids, attention_mask and labels, with a row for each sample.
            generic: features of samples that are nobody's (N, d), or what they are like.
            rate: of AdamW.

        Returns:
            The mean loss of each epoch.

        Raises:
            ValueError: no adapter has the user's name, or something else of it would train.
        """
        self._check(user)
        check_integer("epochs", epochs, least=1)
        check_integer("batch_size", batch_size, least=1)
        check_number("rate", rate, above=0)
        count = count_rows(samples)
        with what_trains_kept(self.model), self._alone(user):
            optimizer = torch.optim.AdamW(self._trained(user), rate)
            draw, losses = torch.Generator().manual_seed(seed), []
            for _ in range(epochs):
                total = 0.0
                for rows in torch.randperm(count, generator=draw).split(batch_size):
                    chosen = torch.zeros(count, dtype=torch.bool).index_fill(0, rows, True)
                    loss = self.model(**rows_of(samples, chosen)).loss
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    total += float(loss.detach()) * len(rows)
                losses.append(total / count)
            optimizer.zero_grad()
        read = {name: samples[name] for name in ("input_ids", "attention_mask") if name in samples}
        self.fit_gate(user, self.embed(**read), generic)
        return losses

    def fit_gate(self, user: str, features: Tensor, generic: Tensor | FeatureGaussian) -> None:
        """Learn to tell the user's samples, features (N, d), from generic ones.

        A logistic regression, to which both sides count alike, however many samples they have.

        Raises:
            ValueError: no adapter has the user's name, or features of other widths.
            ImportError: scikit-learn is missing.
        """
        self._check(user)
        try:
            from sklearn.linear_model import LogisticRegression  # only who fits a gate needs scikit-learn
        except ImportError as error:
            raise ImportError("fitting a gate needs scikit-learn: pip install 'mixadapters[choose]'") from error
        others = generic.sample(max(len(features), 256)) if isinstance(generic, FeatureGaussian) else generic
        if features.dim() != 2 or others.dim() != 2 or features.shape[1] != others.shape[1]:
            raise ValueError(f"features {tuple(features.shape)} and generic ones {tuple(others.shape)} must be (N, d)")
        both = torch.cat([features.float(), others.float()])
        mean, deviation = both.mean(0), both.std(0).clamp_min(1e-6)
        mine = torch.arange(len(both)) < len(features)
        model = LogisticRegression(class_weight="balanced", max_iter=1000)
        model.fit(((both - mean) / deviation).numpy(), mine.numpy())
        weight = torch.from_numpy(model.coef_[0]).float() / deviation
        self.gates[user] = Gate(weight, torch.tensor(float(model.intercept_[0])) - mean @ weight)

    @contextmanager
    def _alone(self, user: str) -> Iterator[None]:
        """The user's adapter is the active one, in training mode."""
        active = self.model.active_adapters
        self.model.set_adapter(user)
        try:
            with in_training(self.model):
                yield
        finally:
            self.model.set_adapter(active if len(active) > 1 else active[0])

    def _trained(self, user: str) -> list[nn.Parameter]:
        found = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        strangers = [name for name, _ in found if f".{user}." not in name]
        if strangers or not found:
            raise ValueError(
                f"user={user!r}: {f'{strangers[:3]} would train too' if strangers else 'its adapter trains nothing'}; "
                "only the adapter of that name may"
            )
        return [p for _, p in found]

    # --- use --------------------------------------------------------------------------------------------------------

    def choose(self, user: str, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> list[str]:
        """input_ids, attention_mask (N, T) -> the user's name or "__base__" for each row, for `adapter_names`.

        Raises:
            ValueError: the user has no gate, or one of features of another width.
        """
        if user not in self.gates:
            raise ValueError(f"user={user!r} has no gate; fit_user or load makes one.{nearest(user, self.gates)}")
        features, gate = self.embed(input_ids=input_ids, attention_mask=attention_mask), self.gates[user]
        if features.shape[-1:] != gate.weight.shape:
            raise ValueError(
                f"the gate of user={user!r} reads {len(gate.weight)} features, and embed gives "
                f"{tuple(features.shape)}: it was fitted with another embed, or for another model"
            )
        sure = gate(features) >= self.threshold
        return [user if mine else BASE for mine in sure.tolist()]

    @torch.no_grad()
    def __call__(self, user: str, batch: Mapping[str, Any]) -> Any:
        """The model's output for a batch of this user: rows that are not the user's are the base's, bit for bit."""
        return self.model(**batch, adapter_names=self.choose(user, **batch))

    def overhead(self, user: str) -> Overhead:
        """What this user adds to the base."""
        self._check(user)
        own = [p for name, p in self.model.named_parameters() if f".{user}." in name]
        all_adapters = [p for name, p in self.model.named_parameters() if self._is_adapter(name)]
        base = sum(p.numel() for p in self.model.parameters()) - sum(p.numel() for p in all_adapters)
        gate = self.gates[user].weight.numel() + 1 if user in self.gates else 0
        parameters = sum(p.numel() for p in own) + gate
        return Overhead(parameters, parameters / base, sum(p.numel() for p in own if p.dim() > 1))

    # --- files ------------------------------------------------------------------------------------------------------

    def save(self, user: str, folder: str | Path) -> Path:
        """Write the user's adapter and gate, and nothing of others; returns the folder `folder/user`."""
        self._check(user)
        if user not in self.gates:
            raise ValueError(f"user={user!r} has no gate; call fit_user first")
        self.model.save_pretrained(str(folder), selected_adapters=[user])
        place = Path(folder) if user == "default" else Path(folder) / user
        gate = self.gates[user]
        with written_aside(place / GATE) as aside:
            save_file({"weight": gate.weight.contiguous(), "bias": gate.bias}, aside)
        return place

    def load(self, user: str, folder: str | Path) -> None:
        """Read what `save` wrote into `folder`.

        Raises:
            ValueError: the gate's file is missing or cut, or is none; the message names it. Nothing is loaded then.
        """
        path = Path(folder) / GATE
        if not path.is_file():
            raise ValueError(f"{path} is missing: `save` writes it beside the adapter")
        with weights_of(path) as weights:
            if set(weights) != {"weight", "bias"}:
                raise ValueError(f"{path} must hold weight and bias, and holds {sorted(weights)}")
            weight, bias = weights["weight"], weights["bias"]
        real = weight.is_floating_point() and bias.is_floating_point()
        if not real or weight.dim() != 1 or bias.dim() != 0 or not bool(weight.isfinite().all() & bias.isfinite()):
            raise ValueError(f"{path}: weight must be (d,) and bias a number, real and all finite")
        self.model.load_adapter(str(folder), adapter_name=user)
        self.gates[user] = Gate(weight.float(), bias.float())

    def _check(self, user: str) -> None:
        known = self.model.peft_config
        if user not in known:
            raise ValueError(f"user={user!r} has no adapter; have {list(known)}.{nearest(user, known)}")

    def _is_adapter(self, name: str) -> bool:
        return any(f".{user}." in name for user in self.model.peft_config)
