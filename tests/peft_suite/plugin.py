"""pytest plugin: PEFT's own tests, with the types of a spec in place of PEFT's.

PEFT writes most of its tests once, for all its types, and lets `pytest.mark.parametrize` run them over lists of
configs. Before the tests of a file are collected, this plugin

* puts the spec's configs into every such list, told by the names of the arguments (`retarget`),
* mends the few helpers that know PEFT's types by name (`mend_helpers`), and
* makes every model id local (see `tiny_models.py`).

Afterwards it drops the tests that run no config of the spec: they build a config of another type in their body. At the
end it prints for each type what was collected, passed, failed, skipped and excluded, and why. `spec.py` says what
a spec consists of.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import peft
import pytest
import torch

spec = importlib.import_module(os.environ.get("PEFT_SUITE_SPEC", "spec"))
TYPE_OF_CONFIG: dict[type, str] = {config: name for name, config in spec.TYPES.items()}
EVERY_TYPE = "all types"

# Argument names of PEFT's lists -> the spec's rows. The other lists are handled by name in new_rows.
ROWS = {
    ("test_name", "model_id", "config_cls", "config_kwargs"): "CUSTOM_MODELS",
    ("test_name", "tuner_method", "config_cls", "config_kwargs_1", "config_kwargs_2"): "PAIRS",
    ("config_class", "mandatory_kwargs"): "MANDATORY",
    ("config_cls",): "BY_TARGET",
    ("config_class",): "BY_TARGET",
}


class Tally:
    """What became of the tests. A worker fills the first three, the main process gathers all of them."""

    def __init__(self) -> None:
        self.collected: Counter[str] = Counter()
        self.excluded: Counter[tuple[str, str]] = Counter()
        self.foreign = 0
        self.outcomes: dict[str, tuple[str, str, str]] = {}

    def exclude(self, name: str, reason: str) -> None:
        self.collected[name] += 1
        self.excluded[name, reason] += 1

    def sent(self) -> dict[str, Any]:
        """The worker's part, in what xdist can send."""
        excluded = [[*key, count] for key, count in self.excluded.items()]
        return {"collected": dict(self.collected), "excluded": excluded, "foreign": self.foreign}

    def receive(self, sent: dict[str, Any]) -> None:
        """Every worker collects the same tests: keep, do not add up."""
        self.collected = Counter(sent["collected"])
        self.excluded = Counter({(name, reason): count for name, reason, count in sent["excluded"]})
        self.foreign = sent["foreign"]

    def passed(self, name: str) -> int:
        return sum(outcome == "passed" for kind, outcome, _ in self.outcomes.values() if kind == name)


tally = Tally()


def type_of(value: Any) -> str | None:
    """Name of the type that `value`, a config or a class of configs, belongs to; None if it is not the spec's."""
    for base in (value if isinstance(value, type) else type(value)).__mro__:
        if base in TYPE_OF_CONFIG:
            return TYPE_OF_CONFIG[base]
    return None


# --- the configs ---


def cells(row: Any) -> tuple[Any, ...]:
    """The values of one row of a parametrize list."""
    row = getattr(row, "values", row)
    return tuple(row) if isinstance(row, (tuple, list)) else (row,)


def from_lora_rows(names: Sequence[str], rows: Sequence[Any]) -> list[Any] | None:
    """Rows that hold LoRA configs as objects, rebuilt with the spec's configs; None if there are none.

    Only LoRA's rows: the other types of PEFT repeat them.
    """
    columns = [index for index, name in enumerate(names) if name.startswith("config")]
    lora_rows = [row for row in map(cells, rows) if all(type(row[index]) is peft.LoraConfig for index in columns)]
    if not columns or not lora_rows:
        return None
    new = []
    for row in lora_rows:
        targets = [row[index].target_modules for index in columns]
        for label, make in spec.MIXED:
            if not all(isinstance(target, set) and target <= spec.MIXED_TARGETS for target in targets):
                tally.exclude(str(type_of(make(0, target_modules=["lin0"]))), spec.MIXED_TARGETS_REASON)
                continue
            values = [value.replace("LoRA", label) if isinstance(value, str) else value for value in row]
            for position, (index, target) in enumerate(zip(columns, targets, strict=True)):
                saved = row[index].modules_to_save
                values[index] = make(position, target_modules=sorted(target), modules_to_save=saved)
            new.append(tuple(values) if len(values) > 1 else values[0])
    return new


def new_rows(file: str, names: tuple[str, ...], rows: list[Any]) -> list[Any] | None:
    """What takes the place of `rows`; None leaves them as they are."""
    if names in ROWS:
        return list(getattr(spec, ROWS[names]))
    if names == ("config_cls", "config_kwargs"):
        configs = [cells(row)[0] for row in rows]
        if configs and all(issubclass(config, peft.PromptLearningConfig) for config in configs):
            return None
        # One list per task type where a file has several, else one list that names its task type.
        tasks = sorted({cells(row)[1]["task_type"] for row in rows if "task_type" in cells(row)[1]}) or [None]
        return [
            (config, {"task_type": task, **arguments} if task else arguments)
            for task in tasks
            for config, arguments in spec.BY_FILE[file]
        ]
    if any(name.startswith("config") for name in names):
        return from_lora_rows(names, rows)
    return None


def retarget(file: str, function: FunctionType) -> None:
    """Put the spec's configs into the marks of a test function."""
    marks = []
    for mark in getattr(function, "pytestmark", []):
        if mark.name == "parametrize":
            names, rows = (mark.args + tuple(mark.kwargs.values()))[:2]
            names = tuple(re.split(r"\s*,\s*", names.strip())) if isinstance(names, str) else tuple(names)
            rows = new_rows(file, names, list(rows))
            if rows is not None:
                mark = pytest.mark.parametrize(",".join(names), rows).mark
        marks.append(mark)
    if marks:
        function.pytestmark = marks  # type: ignore[attr-defined]


# --- the helpers ---


def mend_helpers(module: ModuleType) -> None:
    """Replace, in a test file and in PEFT's shared ones, the helpers that know PEFT's types by name."""
    package = module.__name__.rpartition(".")[0]
    common = sys.modules.get(f"{package}.testing_common")

    def skip_if_merging_not_supported(model_id, config_cls, config_kwargs):
        reason = spec.why_not_mergeable(model_id, config_cls, config_kwargs)
        if reason:
            pytest.skip(f"not mergeable: {reason}")

    replacements = {
        "_skip_if_merging_not_supported": skip_if_merging_not_supported,
        # transformers' Conv1D (GPT-2) is no reason to skip for us.
        "_skip_if_conv1d_not_supported": lambda *_: None,
        # Means to skip merging for one type, but skips it for all on models without biases (peft 0.21).
        "check_beft_config": lambda *_: None,
        # Lets the first use of a model id go to the hub; ours are folders.
        "hub_online_once": contextlib.nullcontext,
    }
    for place in filter(None, (module, common)):
        for name, replacement in replacements.items():
            if hasattr(place, name):
                setattr(place, name, replacement)


@pytest.hookimpl(tryfirst=True)
def pytest_collectstart(collector):
    if not isinstance(collector, pytest.Module):
        return
    module = collector.obj
    mend_helpers(module)
    file = Path(module.__file__).name
    own = [value for value in vars(module).values() if getattr(value, "__module__", None) == module.__name__]
    for value in own:
        for function in [value, *vars(value).values()] if isinstance(value, type) else [value]:
            if isinstance(function, FunctionType):
                retarget(file, function)


# --- the choice ---


def choose(item: pytest.Item) -> bool:
    """Whether a collected test is to run; notes in the tally what it is, or why not."""
    callspec = getattr(item, "callspec", None)
    params = callspec.params if callspec else {}
    name = next(filter(None, map(type_of, params.values())), None)
    if name is None and any(re.search(pattern, item.nodeid) for pattern in spec.ALL_TYPES):
        name = EVERY_TYPE
    if name is None:
        tally.foreign += 1
        return False
    for exclusion in spec.EXCLUDE:
        if re.search(exclusion.test, item.nodeid) and exclusion.when(params):
            tally.exclude(name, exclusion.reason)
            return False
    tally.collected[name] += 1
    item.user_properties.append(("peft_type", name))
    return True


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    chosen = {item: choose(item) for item in items}
    dropped = [item for item, keep in chosen.items() if not keep]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
    items[:] = [item for item, keep in chosen.items() if keep]


@pytest.fixture(autouse=True)
def seed():
    """Many of the tests draw weights without a seed of their own."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def learning_rate(request, monkeypatch):
    """Where PEFT's tests would train at 0.5, unless it is a type that they know a better rate for."""
    params = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if "model_id" in params and "config_cls" in params:
        rate = spec.LEARNING_RATES.get((type_of(params["config_cls"]), params["model_id"]), 0.5)
        original = torch.optim.SGD
        monkeypatch.setattr(torch.optim, "SGD", lambda p, lr: original(p, lr=rate if lr == 0.5 else lr))


# --- the report ---


def pytest_runtest_logreport(report):
    name = dict(report.user_properties).get("peft_type")
    if name is None or (report.passed and report.when != "call"):
        return
    reason = report.longrepr[2].removeprefix("Skipped: ") if report.skipped else ""
    # A failure in set-up or tear-down outweighs the outcome of the call.
    if report.failed or report.nodeid not in tally.outcomes:
        tally.outcomes[report.nodeid] = (name, report.outcome, reason)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """Main process of xdist: a worker is done."""
    sent = getattr(node, "workeroutput", {}).get("peft_suite")
    if sent:
        tally.receive(sent)


def too_few() -> list[str]:
    """Types that passed fewer tests than the spec asks for: PEFT renamed its lists, or something broke them."""
    return [
        f"{name}: {tally.passed(name)} tests passed, but the spec asks for {least}: "
        "does the plugin still know the names of PEFT's lists?"
        for name, least in spec.AT_LEAST.items()
        if tally.passed(name) < least
    ]


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session, exitstatus):
    worker_output = getattr(session.config, "workeroutput", None)
    if worker_output is not None:
        worker_output["peft_suite"] = tally.sent()
    elif os.environ.get("PEFT_SUITE_COMPLETE") == "1" and exitstatus == pytest.ExitCode.OK and too_few():
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter):
    write = terminalreporter.write_line
    outcomes: defaultdict[str, Counter[str]] = defaultdict(Counter)
    skips: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for name, outcome, reason in tally.outcomes.values():
        outcomes[name][outcome] += 1
        if reason:
            # Reasons that differ in a name only are one reason.
            skips[name][re.sub(r"<class '[\w.]+'>", "this type", reason)] += 1
    terminalreporter.section(f"tests of peft {peft.__version__}")
    write(f"{'type':12}{'collected':>10}{'passed':>8}{'failed':>8}{'skipped':>9}{'excluded':>10}")
    for name, collected in sorted(tally.collected.items()):
        out = outcomes[name]
        reasons = Counter({reason: count for (kind, reason), count in tally.excluded.items() if kind == name})
        write(f"{name:12}{collected:>10}{out['passed']:>8}{out['failed']:>8}{out['skipped']:>9}{reasons.total():>10}")
        for what, counts in (("skipped", skips[name]), ("excluded", reasons)):
            for reason, count in counts.most_common():
                write(f"    {what:9}{count:>6}  {reason}")
    write(f"{tally.foreign} tests not run: they build a config of another type, or none, in their own body")
    for file, reason in spec.FILES_NOT_RUN.items():
        write(f"{file} not run: {reason}")
    if os.environ.get("PEFT_SUITE_COMPLETE") == "1":
        used = {reason for _, reason in tally.excluded}
        for exclusion in spec.EXCLUDE:
            if exclusion.reason not in used:
                write(f"exclusion without a test: {exclusion.test} ({exclusion.reason})", yellow=True)
        for message in too_few():
            write(message, red=True)
