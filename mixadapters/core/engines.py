"""What engines that train a model over processes need of its adapters, and what they leave out without a word."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mixadapters.core.processes import rank
from mixadapters.core.rows import saved_modules


class Engine:
    """Looks at what shards a model when its training begins, and keeps what the engine would not save.

    Attributes:
        kept: name in the root model -> weight on the CPU, of the frozen weights of adapters and heads that ZeRO-3 has
            shared out; in the first process alone. Its trainers save trainable weights only, and the first process
            cannot ask the others while it writes.
    """

    def __init__(self, context: Any) -> None:
        self.context = context
        self.kept: dict[str, Tensor] = {}
        self._checked = False
        self._known: set[str] | None = None  # names of the frozen weights that have been looked at

    def look(self, root: nn.Module, trains: bool) -> None:
        """Called before each forward of several processes.

        Raises:
            ValueError: parts of adapters are sharded by themselves, or weights train of which DDP does not know.
        """
        if trains and not self._checked:
            self._check(root)
            refuse_untold(root)
            self._checked = True
        # The first forward of all is the best: in later ones DeepSpeed fetches weights before it needs them.
        if not is_partitioned(next(root.parameters())) or not (trains or self._known is None):
            return
        frozen = {name: p for name, p in self._own(root) if not p.requires_grad and is_partitioned(p)}
        if self._known != frozen.keys():
            self._known = set(frozen)
            with gathered_parameters(list(frozen.values())):
                self.kept = {} if rank() else {name: p.detach().cpu().clone() for name, p in frozen.items()}

    def changed(self) -> None:
        """Other weights train from now on, or there are others: the next forward looks anew."""
        self._checked = False

    def refuse_sharded(self, verb: str, hosts: Iterable[Any]) -> None:
        """Raise ValueError where what `verb` is to change has been shared out: it would change one part of it."""
        if any(is_sharded(p) for host in hosts for p in host.adapters.parameters()):
            raise ValueError(
                f"{verb}: the weights of this model's adapters are shared out over processes (FSDP2 or ZeRO-3), and "
                "new ones would lie beside them, in each process by itself. Change the model before it is sharded"
            )

    def _check(self, root: nn.Module) -> None:
        for _, host in self._hosts(root):
            for path, part in host.adapters.named_modules():
                if isinstance(part, loaded("torch.distributed.fsdp", "FSDPModule")):
                    raise ValueError(
                        f"FSDP shards the part {path!r} of the adapters at {host.path!r} by itself, but experts are "
                        "read together: wrap whole transformer blocks (fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP)"
                    )
        sharded = any(map(is_sharded, root.parameters()))
        if whole := self._left_out(root):
            warnings.warn(
                f"{whole[0]!r} trains and is not sharded, as it has come after fully_shard or was left out: unless "
                "you sum its gradients, every process trains a copy of its own. Add adapters before fully_shard",
                stacklevel=2,
            )
        if os.environ.get("ACCELERATE_USE_FSDP") == "true" and not sharded and not on_accelerator(root):
            warnings.warn(
                "accelerate has been asked for FSDP, which it keeps for GPUs and the like: on the CPU every process "
                "trains the whole model, as under DDP. The results are the same, the memory is not; call "
                "torch.distributed.fsdp.fully_shard on the blocks to shard on a CPU",
                stacklevel=2,
            )

    def _left_out(self, root: nn.Module) -> list[str]:
        """The names of weights of adapters that train and are not shared out, in blocks of FSDP2 that are.

        Of a block that is whole now, as that of the root in its forward, there is no telling.
        """
        kind = loaded("torch.distributed.fsdp", "FSDPModule")
        blocks = [path for path, module in root.named_modules() if isinstance(module, kind)]
        if not blocks:
            return []
        own = {name: p for name, p in self._own(root) if p.requires_grad}
        others = root.named_parameters()
        whole = {_nearest(name, blocks) for name, p in others if name not in own and not is_dtensor(p)}
        plain = [name for name, p in own.items() if not is_dtensor(p)]
        return [name for name in plain if _nearest(name, blocks) not in {None, *whole}]

    def _hosts(self, root: nn.Module) -> Iterator[tuple[str, Any]]:
        """The layers with adapters in `root`, with their paths."""
        for path, host in root.named_modules():
            if getattr(host, "context", None) is self.context and hasattr(host, "adapters"):
                yield path, host

    def _own(self, root: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        """The weights of adapters in `root` and of the modules that are saved with them, by their names in it."""
        for path, host in self._hosts(root):
            for name, parameter in host.adapters.named_parameters():
                yield f"{path}.{host.prefix}adapters.{name}", parameter
        for path, wrapper in saved_modules(root):
            for name, parameter in wrapper.named_parameters():
                if not name.startswith("original_module."):
                    yield f"{path}.{name}", parameter


def _nearest(name: str, paths: Iterable[str]) -> str | None:
    """The innermost of the modules at these paths that a parameter lies in; None: in none of them."""
    around = [path for path in paths if not path or name.startswith(f"{path}.")]
    return max(around, key=len, default=None)


def refuse_untold(root: nn.Module) -> None:
    """Raise ValueError where DDP, in whose forward this is, does not sum the gradients of weights that train.

    It takes down which these are when it wraps a model, and says nothing of those that begin to train later.
    """
    ddp: Any = getattr(DistributedDataParallel, "_active_ddp_module", None)
    buckets = getattr(getattr(ddp, "reducer", None), "_get_zeros_like_grad_buckets", None)
    if buckets is None or not any(module is root for module in ddp.module.modules()):
        return
    known = {id(p) for bucket in buckets() for p in bucket.parameters()}
    known |= {id(p) for name, p in ddp.module.named_parameters() if name in ddp.parameters_to_ignore}
    if untold := [name for name, p in root.named_parameters() if p.requires_grad and id(p) not in known]:
        raise ValueError(
            f"{untold[0]!r} and {len(untold) - 1} other weights train, but did not when DistributedDataParallel "
            "wrapped the model, which would leave each process its own gradients of them. Set stage and adapters "
            "before, or wrap the model anew: DistributedDataParallel(ddp.module)"
        )


def loaded(module: str, name: str) -> Any:
    """A class of a module that nobody may have imported, which takes seconds: then nothing is of it."""
    return getattr(sys.modules.get(module), name, ())


def is_dtensor(parameter: Tensor) -> bool:
    return isinstance(parameter, loaded("torch.distributed.tensor", "DTensor"))


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Whether ZeRO-3 has shared the parameter out."""
    return hasattr(parameter, "ds_id")


def is_sharded(parameter: nn.Parameter) -> bool:
    """Whether an engine (FSDP2, tensor parallelism, ZeRO-3) has shared the parameter out."""
    return is_dtensor(parameter) or is_partitioned(parameter)


def on_accelerator(module: nn.Module) -> bool:
    return any(parameter.device.type != "cpu" for parameter in module.parameters())


def gathered_parameters(parameters: list[nn.Parameter], writes: bool = False) -> Any:
    """A block in which parameters that ZeRO-3 has shared out are whole. All processes enter it together.

    writes: the first process changes them, and the others get what it has made of them.
    """
    zero: Any = sys.modules.get("deepspeed.runtime.zero.partition_parameters")
    partitioned = [p for p in parameters if is_partitioned(p)]
    if zero is None or not partitioned:
        return torch.no_grad()
    return zero.GatheredParameters(partitioned, modifier_rank=0 if writes else None)


@torch.no_grad()
def overwrite(parameter: nn.Parameter, value: Tensor) -> None:
    """Give a parameter another value, however it is sharded. All processes call it with the same value."""
    if is_dtensor(parameter):
        like: Any = parameter
        share: Any = loaded("torch.distributed.tensor", "distribute_tensor")
        like.copy_(share(value.to(like.device), like.device_mesh, like.placements))
        return
    with gathered_parameters([parameter], writes=True):
        if not is_partitioned(parameter) or rank() == 0:
            parameter.copy_(value)
