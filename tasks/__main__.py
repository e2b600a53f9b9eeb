"""`python -m mixadapters.tasks list | run | table | shots | kilt`: see docs/tasks.md, or `run --help`.

Arguments are read before torch and the rest are imported, but for those of `run`, which are in part transformers' own.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mixadapters.core.starting import import_what_waits, whole
from mixadapters.tasks.registry import TASKS, get_task
from mixadapters.tasks.run_arguments import RunArguments, show_help

USAGE = """usage: python -m mixadapters.tasks COMMAND ...

  list                          the tasks
  run --tasks NAME ... --model MODEL --data-dir DATA ...
                                train and evaluate (--help for its arguments)
  table FOLDER [--reference METHOD] [--latex] [--plot FILE.png]
                                a table from results
  shots --data-dir DATA TASK ...
                                write a few-shot index file of a task into the current folder
  kilt GOLD GUESS [--recall-at K ...]
                                KILT's measures of a file of predictions"""


def show_list(arguments: list[str]) -> int:
    for task in TASKS.values():
        source = [n for n, there in (("hub", "path" in task.hub), ("local", task.local)) if there]
        labels = f"{len(task.labels)} labels" if task.labels else ""
        print(f"{task.name:>20}  {task.family:8} {task.kind:15}{labels:10} {task.metrics[0]:12} {', '.join(source)}")
    return 0


def run(arguments: list[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        show_help()
        return 0
    if "--help_training" in arguments:
        arguments = ["--help"]
    import_what_waits()
    from transformers import HfArgumentParser
    from transformers import logging as transformers_logging

    from mixadapters.tasks.arguments import TrainArguments
    from mixadapters.tasks.runner import Runner

    parser = HfArgumentParser([RunArguments, TrainArguments], prog="python -m mixadapters.tasks run")
    args, training = parser.parse_args_into_dataclasses(arguments)
    if not sys.stderr.isatty():
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        training.disable_tqdm = True
    return 1 if Runner(args, training).main() else 0


def table(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m mixadapters.tasks table")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--reference", help="the method that others are compared with; default: bottleneck")
    parser.add_argument("--latex", action="store_true")
    parser.add_argument("--plot", type=Path, help="write a figure to this file")
    args = parser.parse_args(arguments)
    import_what_waits()
    from mixadapters.tasks import report

    results = report.read_results(args.folder)
    methods = sorted({result["method"] for result in results})
    if args.reference is not None and args.reference not in methods:
        raise ValueError(f"--reference {args.reference} has no results in {args.folder}; have {', '.join(methods)}")
    found = report.tables(results, args.reference or "bottleneck")
    print("\n\n".join(map(report.latex if args.latex else report.markdown, found)))
    if args.plot:
        report.plot(found, args.plot)
    return 0


def shots(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m mixadapters.tasks shots")
    parser.add_argument("tasks", nargs="+")
    parser.add_argument("--data-dir", type=Path)
    args = parser.parse_args(arguments)
    tasks = list(map(get_task, args.tasks))
    from mixadapters.tasks.protocols import publish
    from mixadapters.tasks.sources import read_task

    for task in tasks:
        print(publish(task, read_task(task, args.data_dir), Path()))
    return 0


def kilt(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m mixadapters.tasks kilt")
    parser.add_argument("files", type=Path, nargs="*", metavar="GOLD GUESS")
    parser.add_argument("--recall-at", type=whole(1), nargs="+", default=[5], metavar="K", help="places; default: 5")
    args = parser.parse_args(arguments)
    if len(args.files) != 2:
        raise ValueError("kilt takes two files, GOLD and GUESS")
    from mixadapters.tasks.kilt import score_file

    gold, guess = args.files
    for name, value in score_file(gold, guess, args.recall_at).items():
        print(f"{name:>16} {value:.4f}")
    return 0


COMMANDS = {"list": show_list, "run": run, "table": table, "shots": shots, "kilt": kilt}


def main(argv: list[str] | None = None) -> int:
    command, *arguments = (sys.argv[1:] if argv is None else argv) or [""]
    if command not in COMMANDS:
        print(USAGE, file=sys.stderr)
        return 0 if command in ("-h", "--help") else 2
    try:
        return COMMANDS[command](arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
