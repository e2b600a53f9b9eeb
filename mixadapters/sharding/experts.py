"""Experts of a model spread over processes: switched on, dealt anew by their load, gathered to be saved."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from mixadapters.core.bank import AdapterBank
from mixadapters.core.engines import is_sharded
from mixadapters.core.fields import check_integer, check_number
from mixadapters.core.hooks import root_of
from mixadapters.core.mixture import Mixture
from mixadapters.core.model import MixtureModel
from mixadapters.core.names import UNNAMED
from mixadapters.core.processes import gathered
from mixadapters.sharding.bank import ShardedBank
from mixadapters.sharding.moving import forget, move
from mixadapters.sharding.placement import Placement, even_placement, plan_placement
from mixadapters.sharding.traffic import experts_bytes_per_step
from mixadapters.training.events import find_tuner

logger = logging.getLogger(__name__)

TYPES = ("MIXDA", "MOA")
IGNORED = "_ddp_params_and_buffers_to_ignore"  # where DistributedDataParallel looks for names


class ExpertSharding:
    """The experts of an adapter, spread over the processes of a group; `shard_experts` makes it.

    Attributes:
        banks: by module path, the banks that hold a part each.
        group: the processes.
    """

    def __init__(
        self, model: nn.Module, mixtures: dict[str, Mixture], group: Any, every: int, copies: int, optimizer: Any
    ) -> None:
        self.model, self.mixtures, self.group = model, mixtures, group
        self._roots = (model, root_of(model))
        self.every, self.copies = every, copies
        self.rank, self.processes = dist.get_rank(group), dist.get_world_size(group)
        self.wholes = {path: mixture.bank for path, mixture in mixtures.items()}
        self._handles: list[RemovableHandle] = []
        self._before: RemovableHandle | None = None
        keep_from_ddp(model, list(self.wholes.values()))
        self._steps = 0
        self.banks = {
            path: ShardedBank(bank, group, even_placement(len(bank.experts), self.processes))
            for path, bank in self.wholes.items()
        }
        for bank in self.banks.values():
            self._forget_others(bank, optimizer)
        self._begin()

    @property
    def is_whole(self) -> bool:
        """Whether this process holds all experts now: inside of `whole`, and once it is closed."""
        return not self._handles

    # --- for a training loop -----------------------------------------------------------------------------------

    def after_step(self, optimizer: Any) -> bool:
        """After each step of the optimizer, in every process: deals the experts anew every `every` steps.

        Returns whether it has.
        """
        self._steps += 1
        if not self.every or self._steps % self.every:
            return False
        self.reshard(optimizer)
        return True

    def reshard(self, optimizer: Any = None) -> None:
        """Deal the experts by the rows that they have been chosen for since the last time, in every process.

        Weights move, and with them what the optimizer keeps for them; gradients of what moves are dropped, so call it
        after a step. An optimizer that has made steps must be given.

        Raises:
            ValueError: an optimizer that does not have all experts, those elsewhere too.
            RuntimeError: inside of `whole`, or after `close`.
        """
        if self.is_whole:
            raise RuntimeError("every process holds all experts now: deal them outside of `whole`, and before `close`")
        self._check_optimizer(optimizer)
        plans = [self._plan(bank) for bank in self.banks.values()]
        move(list(self.banks.values()), plans, optimizer)
        for bank in self.banks.values():
            bank.used.zero_()
        self._watch()

    def _check_optimizer(self, optimizer: Any) -> None:
        """An expert that comes must find its place in the optimizer, or it would never train again."""
        if optimizer is None:
            return
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for path, bank in self.banks.items():
            for name, expert in bank.experts.items():
                if any(p.requires_grad and id(p) not in held for p in expert.parameters()):
                    raise ValueError(
                        f"the optimizer does not have expert {name!r} at {path!r}: give it the parameters of all "
                        "experts, also of those that lie in other processes and are empty here"
                    )

    def _plan(self, bank: ShardedBank) -> Placement:
        used = bank.used.clone()
        dist.all_reduce(used, group=self.group)
        load = (used / self.processes).tolist()
        if not sum(load):
            return bank.placement
        slots = -(-len(load) // self.processes)
        return plan_placement(load, self.processes, slots, t=self.copies, m=self.copies)

    def max_over_mean(self) -> dict[str, float]:
        """By module path, the rows of the busiest process over their mean, since experts were last dealt."""
        return {path: bank.placement.max_over_mean(bank.used.tolist()) for path, bank in self.banks.items()}

    @torch.no_grad()
    def clip_grad_norm(self, max_norm: float) -> float:
        """Scale gradients to a norm of at most `max_norm` over all parameters, wherever they lie; in every process.

        In place of torch.nn.utils.clip_grad_norm_, which would take each process's own norm for the whole, and scale
        the router by another factor in each. Returns the norm before.

        Raises:
            ValueError: a number that is not above 0.
        """
        check_number("max_norm", max_norm, above=0)
        experts = list(self._experts())
        squares = next(iter(self.banks.values())).used.new_zeros(len(experts) + 1)
        for place, (parameter, counts) in enumerate(experts):
            if counts and parameter.grad is not None:
                squares[place] = parameter.grad.double().square().sum()
        dist.all_reduce(squares, group=self.group)  # each from one process: the sum does not depend on who has which
        ours = {id(parameter) for parameter, _ in experts}
        grads = {id(p): p.grad for p in self.model.parameters() if p.grad is not None}
        for key, grad in grads.items():
            if key not in ours:
                squares[-1] += grad.double().square().sum().to(squares.device)
        norm = float(squares.sum().sqrt())
        if norm > max_norm:
            for grad in grads.values():
                grad.mul_(max_norm / (norm + 1e-6))
        return norm

    def _experts(self) -> Iterator[tuple[nn.Parameter, bool]]:
        """The parameters of all experts, and whether this process is the first holder: each expert counts once."""
        for bank in self.banks.values():
            for name, held in zip(bank.experts, bank.placement.holders, strict=True):
                for parameter in bank.experts[name].parameters():
                    yield parameter, held[0] == self.rank

    # --- whole ---------------------------------------------------------------------------------------------------

    @contextmanager
    def whole(self, optimizer: Any = None) -> Iterator[None]:
        """Inside the block every process holds all experts, in an ordinary model: for saving, merging and surgery.

        All processes enter it. With `optimizer`, what it keeps for the experts is whole too. Do not train inside: most
        of it would be lost.
        """
        self.gather(optimizer)
        try:
            yield
        finally:
            self.spread(optimizer)

    def gather(self, optimizer: Any = None) -> None:
        """What `whole` does where it begins, for those who end it elsewhere, by `spread`."""
        if self.is_whole:
            raise RuntimeError("every process holds all experts already")
        everywhere = tuple(range(self.processes))
        plans = [Placement((everywhere,) * len(bank.experts), self.processes) for bank in self.banks.values()]
        self._before_whole = [(bank.placement, bank.names) for bank in self.banks.values()]
        move(list(self.banks.values()), plans, optimizer)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._stop_looking()
        for path, mixture in self.mixtures.items():
            mixture.bank = self.wholes[path]

    def spread(self, optimizer: Any = None) -> None:
        """The end of `gather`: each process keeps its part, and gives up the rest. Where experts have come or gone,
        those of the layer are dealt evenly."""
        for bank, (placement, names) in zip(self.banks.values(), self._before_whole, strict=True):
            stayed = bank.read_again(names)
            bank.place(placement if stayed else even_placement(len(bank.experts), self.processes))
            self._forget_others(bank, optimizer)
        self._begin()

    def save_pretrained(self, folder: str | Path, **options: Any) -> None:
        """`model.save_pretrained` of the whole adapter, by the first process; all of them call it.

        Raises:
            RuntimeError: the first process could not, for a reason that it says.
        """
        reason: list[Any] = [None]
        with self.whole():
            if self.rank == 0:
                try:
                    self.model.save_pretrained(str(folder), **options)
                except Exception as error:  # the others wait for its end
                    reason = [error]
        failed = reason[0]
        said = [None if failed is None else f"{type(failed).__name__}: {failed}"]
        dist.broadcast_object_list(said, group=self.group, group_src=0)
        if said[0] is not None:
            raise RuntimeError(f"{folder} has not been saved: {said[0]}") from failed

    def close(self, optimizer: Any = None) -> None:
        """End it: the model is an ordinary one in every process, with all experts; all of them call it."""
        if not self.is_whole:
            self.gather(optimizer)
        give_to_ddp(self.model, list(self.wholes.values()))

    def _begin(self) -> None:
        for path, bank in self.banks.items():
            self.mixtures[path].bank = bank
            self._handles.append(bank.register_state_dict_pre_hook(_refuse_to_save))
        self._watch()

    def _forget_others(self, bank: ShardedBank, optimizer: Any) -> None:
        for name in set(bank.names).difference(bank.own):
            forget(list(bank.experts[name].parameters()), optimizer)

    # --- what cannot be --------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Look at the next forward: whether all processes read the same tokens, and nobody has taken experts apart."""
        next(iter(self.banks.values())).checks = self._look
        if self._before is None:  # before the hooks of any engine, whose processes would wait for each other
            self._before = register_module_forward_pre_hook(self._look_at_experts)

    def _look_at_experts(self, module: nn.Module, args: tuple) -> None:
        if any(module is one for one in self._roots):
            for bank in self.banks.values():
                bank.refuse_sharded()
            self._stop_looking()

    def _stop_looking(self) -> None:
        if self._before is not None:
            self._before.remove()
            self._before = None

    def _look(self, tokens: Tensor) -> None:
        read = tokens.detach().double()
        mine = torch.stack([read.new_tensor(len(read)), read.sum(), read.abs().sum()])
        said = [torch.empty_like(mine) for _ in range(self.processes)]
        dist.all_gather(said, mine, group=self.group)
        for other, theirs in enumerate(said):
            if not torch.equal(theirs, said[0]):
                raise RuntimeError(
                    f"process {other} of the expert group read other tokens than process 0 ({int(theirs[0])} rows and "
                    f"{int(said[0][0])}): experts that are spread over processes need the same batch, and the same "
                    "state of the random generator, in all of them. Leave out what gives each process rows of its "
                    "own, such as Trainer, or a DataLoader that accelerate has prepared"
                )


def shard_experts(
    model: nn.Module,
    group: Any = None,
    *,
    every: int = 0,
    copies: int = 0,
    optimizer: Any = None,
    adapter_name: str = UNNAMED,
) -> ExpertSharding:
    """Spread the experts of an adapter over processes: each holds, trains and keeps moments of its part alone.

        sharding = shard_experts(model, every=100)  # in every process of the group
        for batch in batches:  # the same in all of them
            model(**batch).loss.backward()
            sharding.clip_grad_norm(1.0)
            optimizer.step()
            optimizer.zero_grad()
            sharding.after_step(optimizer)
        sharding.save_pretrained(folder)

    Outputs and gradients are those of one process. Each process runs all tokens, and everything but the experts. What
    that costs and saves is logged: the experts of adapters mostly weigh less than the tokens that are summed for them.

    Source: Hecate (2025), fully sharded sparse data parallelism, here with tokens in every process.

    Args:
        model: of `get_peft_model`, the same in every process; make the optimizer afterwards, or name it.
        group: of torch.distributed. None: all processes.
        every: deal the experts anew by their load after so many steps; 0: only by `reshard`.
        copies: so many of a layer's busiest experts lie in every process, which share out their rows, once they have
            been dealt by load.
        adapter_name: the adapter; not given: the active one.
        optimizer: one that has made steps already: it keeps what belongs to the experts that stay.

    Raises:
        RuntimeError: torch.distributed has not been initialised.
        ValueError: a number out of range; an adapter of a type whose experts cannot be spread; a model inside or under
            another engine (DDP, FSDP2, DeepSpeed ZeRO, tensor parallelism), or parameters that differ between the
            processes.
    """
    check_integer("every", every, least=0)
    check_integer("copies", copies, least=0)
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError("call torch.distributed.init_process_group first: experts are spread over its processes")
    group = dist.group.WORLD if group is None else group
    if dist.get_rank(group) < 0:
        raise ValueError(f"process {dist.get_rank()} is not in the group: only its processes call shard_experts")
    _refuse_engines(model)
    mixtures = mixtures_to_spread(find_tuner(model), adapter_name)
    _refuse_different(model, group)
    sharding = ExpertSharding(model, mixtures, group, every, copies, optimizer)
    if sharding.rank == 0:
        logger.warning("%s", arithmetic(sharding))
    return sharding


def arithmetic(sharding: ExpertSharding, rows: int = 1024) -> str:
    """What spreading the experts saves in memory, and what it sends where plain data parallelism sends gradients."""
    held = total = 0
    sent = 0.0
    for bank in sharding.banks.values():
        sizes = {name: sum(s.numel() for s in shapes) for name, shapes in bank.shapes.items()}
        element = next(p.element_size() for p in bank.experts.parameters())
        total += sum(sizes.values()) * element
        held += sum(sizes[name] for name in bank.own) * element
        one = experts_bytes_per_step(rows, bank.in_features, bank.out_features, 1, element)
        sent += one.all_reduce
    each = sent / rows
    return (
        f"experts of {len(sharding.banks)} layers over {sharding.processes} processes: {held:,} of {total:,} bytes of "
        f"experts here. A step sums {sent:,.0f} bytes for {rows:,} tokens of the batch; data parallelism would sum "
        f"the experts' gradients, {total:,} bytes, which is less from {total / each:,.0f} tokens on"
    )


def keep_from_ddp(model: nn.Module, banks: list[AdapterBank]) -> None:
    """Tell DistributedDataParallel, before it wraps `model`, to leave the experts alone: it would send what others
    have not, and wait for gradients that never come."""
    ignored = set(getattr(model, IGNORED, ())) | set(_names(model, banks))
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)


def give_to_ddp(model: nn.Module, banks: list[AdapterBank]) -> None:
    """Take `keep_from_ddp` back: what is wrapped later trains them as everything else."""
    ignored = set(getattr(model, IGNORED, ())) - set(_names(model, banks))
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)


def _names(model: nn.Module, banks: list[AdapterBank]) -> list[str]:
    """Of the parameters of all experts, as `model` names them."""
    names = {id(p): name for name, p in model.named_parameters()}
    return [names[id(p)] for bank in banks for p in bank.experts.parameters() if id(p) in names]


def mixtures_to_spread(tuner: MixtureModel, adapter_name: str) -> dict[str, Mixture]:
    """The mixtures of an adapter whose experts can be spread, by where they are.

    Raises:
        ValueError: they cannot.
    """
    adapter_name = tuner.named(adapter_name)
    kind = tuner.config_of(adapter_name).peft_type.value
    if kind not in TYPES:
        raise ValueError(
            f"adapter {adapter_name!r} is of type {kind}, whose experts cannot be spread over processes; those of "
            f"{' and '.join(TYPES)} can"
        )
    found: dict[str, Mixture] = {}
    for key, mixture in tuner.mixtures().items():
        if key.adapter != adapter_name or len(mixture.bank.experts) < 2:
            continue
        if isinstance(mixture.bank, ShardedBank):
            raise ValueError(
                f"the experts of adapter {adapter_name!r} are spread over processes already, by a run that has failed "
                "perhaps: end that by its sharding.close(), in every process, or make the model anew"
            )
        if type(mixture.bank) is not AdapterBank or not mixture.bank.keeps_packed:
            raise ValueError(f"the experts at {key.path!r} are computed, or in an ExpertRing: they cannot be spread")
        found[f"{key.path} {key.step}".rstrip()] = mixture
    if not found:
        raise ValueError(f"adapter {adapter_name!r} has no layer with two experts: there is nothing to spread")
    return found


def _refuse_engines(model: nn.Module) -> None:
    if isinstance(model, DistributedDataParallel):
        raise ValueError(
            "shard_experts needs the model itself: wrap it in DistributedDataParallel afterwards, if at all"
        )
    for name, parameter in model.named_parameters():
        if is_sharded(parameter):
            raise ValueError(
                f"{name!r} is sharded by FSDP2, DeepSpeed ZeRO or tensor parallelism, beside which experts cannot be "
                "spread: use one of them"
            )


def _refuse_different(model: nn.Module, group: Any) -> None:
    """Raise ValueError, in every process, where the trainable parameters are not the same in all of them."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    sums = {name: float(p.detach().double().sum()) for name, p in model.named_parameters() if p.requires_grad}
    said = gathered((shapes, sums), group)
    for other, theirs in enumerate(said):
        for what, mine, first in zip(("shapes", "values"), theirs, said[0], strict=True):
            if wrong := [name for name in first.keys() | mine.keys() if first.get(name) != mine.get(name)]:
                raise ValueError(
                    f"{len(wrong)} trainable parameters have other {what} in process {other} than in process 0, such "
                    f"as {min(wrong)!r}: make the same model in every process, with the same seed"
                )


def _refuse_to_save(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    raise RuntimeError(
        f"the experts at {prefix!r} are spread over processes, most of them not here: use sharding.save_pretrained, "
        "or `with sharding.whole():`"
    )
