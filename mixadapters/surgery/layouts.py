"""How many experts each layer of a base model has, and that its config and the folders it saves say so.

Surgery and loaders share it, so it looks at modules alone.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from mixadapters.core.folders import written_aside
from mixadapters.core.walking import plain_path

EXPERTS_FILE = "mixadapters_experts.json"
FORMAT = 1
FUSED = ("gate_up_proj", "up_proj", "down_proj")
COUNTS = ("num_experts", "n_routed_experts", "num_local_experts")  # attributes of modules
Layouts = dict[str, dict[str, Any]]  # path of the experts' module -> its number of experts, and who takes each column


def holds_experts(module: nn.Module) -> bool:
    """Whether a module holds fused experts, in whatever form, or is a list of experts beside a router."""
    if "Experts" not in type(module).__name__:
        return False
    tensors = (*module._parameters.values(), *module._buffers.values())
    if any(t is not None and t.dim() >= 3 for t in tensors) or isinstance(module, nn.ModuleList):
        return True
    return any(name.startswith(FUSED) for name in (*module._parameters, *module._buffers))


def layouts_of(root: nn.Module) -> Layouts:
    """How many experts each layer has, and which takes the rows of each of its router's columns."""
    found: Layouts = {}
    for name, module in root.named_modules():
        down = module._parameters.get("down_proj") if holds_experts(module) else None
        if down is not None:
            numbers: Any = module._modules.get("expert_map")
            columns = list(range(len(down))) if numbers is None else numbers.numbers.tolist()
            found[plain_path(name)] = {"experts": len(down), "columns": columns}
    return found


def is_plain(layouts: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether stock transformers loads it: layers have as many experts, each with a column of its own."""
    counts = {layout["experts"] for layout in layouts.values()}
    return len(counts) <= 1 and all(said["columns"] == list(range(said["experts"])) for said in layouts.values())


def settle_config(root: Any) -> None:
    """Have the config, and modules that repeat it, say how many experts the blocks have, where all have as many."""
    layouts = layouts_of(root)
    if not layouts or not is_plain(layouts):
        return
    experts = next(module for module in root.modules() if holds_experts(module))
    config = getattr(experts, "config", root.config)
    field = count_field(config)
    before, now = getattr(config, field), next(iter(layouts.values()))["experts"]
    setattr(config, field, now)
    for module in root.modules():
        if before != now:
            recount(module, before, now)


def count_field(config: Any) -> str:
    """The field of a model's config that says how many experts a block has."""
    said = config.to_dict()
    return next(name for name in (*COUNTS, "moe_num_experts") if name in said)


def recount(module: Any, before: int, now: int) -> None:
    """Set what a module says of the number of experts."""
    for name in (*COUNTS, *(("out_features",) if isinstance(module, nn.Linear) else ())):
        if module.__dict__.get(name) == before:
            setattr(module, name, now)


def hook_saving(root: nn.Module) -> None:
    """Have `save_pretrained` of a base whose experts have been cut, which Trainers call, write what can be read, and
    forwards refuse a loss that there is not."""
    if isinstance(root, PreTrainedModel):
        root.__dict__["save_pretrained"] = partial(save_cut, root)  # copies and pickles of the model have their own
        if refuse_router_loss not in root._forward_pre_hooks.values():
            root.register_forward_pre_hook(refuse_router_loss, with_kwargs=True)


def refuse_router_loss(root: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """Raise ValueError where a forward asks for the load-balancing loss of transformers, and layers differ.

    It joins the logits of all routers into one tensor, and would end in an error of its axes.
    """
    asked = kwargs.get("output_router_logits")
    if asked is None:
        asked = getattr(root.config, "output_router_logits", False)
    forward = inspect.unwrap(type(root).forward)  # of models without a head, which only give the logits, it has none
    if asked and "load_balancing_loss_func" in forward.__code__.co_names:
        columns = sorted({len(layout["columns"]) for layout in layouts_of(root).values()})
        if len(columns) > 1:
            raise ValueError(
                f"output_router_logits=True: the layers have {' and '.join(map(str, columns))} experts now, and "
                "transformers' load-balancing loss is for layers that have as many: turn it off (also in the config), "
                "or prune with scope='layer'"
            )


def save_cut(root: Any, folder: str | Path, *args: Any, **options: Any) -> bool:
    """`save_pretrained` with a model card, and where stock transformers cannot load it a file by which ours does.

    Returns:
        Whether stock transformers can.

    Raises:
        ValueError: `push_to_hub`, which would leave out what is written beside the weights.
    """
    if options.get("push_to_hub"):
        raise ValueError(
            "push_to_hub=True would leave out what is written beside the weights of a model whose experts have been "
            "cut: save it first, then upload the folder"
        )
    settle_config(root)
    layouts = layouts_of(root)
    plain = is_plain(layouts)
    main, file = options.get("is_main_process", True), Path(folder) / EXPERTS_FILE
    if main:
        file.unlink(missing_ok=True)  # of an earlier save: it must not speak of other weights, whenever this is killed
    type(root).save_pretrained(root, folder, *args, **options)
    if main:
        if not plain:
            with written_aside(file) as aside:
                aside.write_text(json.dumps({"format": FORMAT, "layers": layouts}, indent=1), encoding="utf-8")
        (Path(folder) / "README.md").write_text(_card(root, layouts, plain), encoding="utf-8")
    return plain


def _card(root: Any, layouts: Mapping[str, Mapping[str, Any]], plain: bool) -> str:
    """The model card: what it is, and what loads it."""
    base = str(getattr(root.config, "_name_or_path", "") or "")
    named = base if base.count("/") == 1 and not Path(base).exists() else Path(base).name
    cls = type(root).__name__
    load = [f"from transformers import {cls}", "", f'model = {cls}.from_pretrained("PATH")']
    if not plain:
        load = ["from mixadapters.surgery import load_pruned", "", 'model = load_pruned("PATH")']
    head = ["---", f"library_name: {'transformers' if plain else 'mixadapters'}", "tags: [mixadapters, moe, pruned]"]
    head += [f"base_model: {json.dumps(named)}"] if named and named == base else []
    text = ["---", "", f"# {named or cls}, with fewer experts", ""]
    text += [f"A {cls} whose experts have been cut with mixadapters."]
    if not plain:
        text += ["Its layers have different experts, which stock transformers refuses to load: use mixadapters."]
    text += ["", "```python", *load, "```", "", "| layer | experts | columns of the router |", "|---|---|---|"]
    text += [f"| `{path}` | {layout['experts']} | {len(layout['columns'])} |" for path, layout in layouts.items()]
    return "\n".join([*head, *text, ""])
