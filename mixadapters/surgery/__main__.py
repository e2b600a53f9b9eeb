"""`python -m mixadapters.surgery COMMAND`: see docs/surgery.md, or `--help`.

A command reads its arguments and its files first. Only `Inputs`, or what follows the last check, imports torch.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mixadapters.core.fields import check_share
from mixadapters.core.folders import check_saved_pair, folder_aside, new_folder
from mixadapters.core.starting import end_by_signal, import_what_waits
from mixadapters.surgery.choices import (
    AVERAGINGS,
    CODECS,
    COMPRESSIONS,
    CRITERIA,
    GROUPINGS,
    ROUNDINGS,
    SCALES,
    SCOPES,
    SIMILARITIES,
    check_tolerance,
)
from mixadapters.surgery.texts import read_texts

USAGE = """usage: python -m mixadapters.surgery COMMAND MODEL [--adapter ADAPTER] --data FILE ...

  report   what the experts are, cost and do: tables, a picture, and the record as a file
  routes   a page in which text is coloured by the expert that took each token, layer by layer
  prune    the experts that matter least for the texts leave
  merge    experts that serve the same tokens become one
  compress their weights become smaller, and lie in codes; `expand` is the way back
  expand   the folder that `compress` has written as an ordinary one
COMMAND --help lists all arguments, with an example. A text of FILE is a line of a .txt, or a field of a line of a
.jsonl."""
SILENCE = 20.0  # seconds without a word where there is no bar
ADAPTERS = "mistral-7b --adapter runs/mixture"  # of examples


def _bare_parser(command: str, about: str, example: str) -> argparse.ArgumentParser:
    name = f"python -m mixadapters.surgery {command}"
    shape = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(
        name, description=about, epilog=f"example:\n  {name} {example}", formatter_class=shape
    )


def _parser(command: str, about: str, texts: int, example: str) -> argparse.ArgumentParser:
    """What all commands that read texts take. texts: of each label, where the user does not say how many."""
    parser = _bare_parser(command, about, example)
    parser.add_argument("model", metavar="MODEL", help="base model: a folder, or a name on the hub")
    parser.add_argument("--adapter", help="adapter on it: a folder, or a name on the hub; its experts alone are meant")
    parser.add_argument("--data", required=True, type=Path, metavar="FILE", help="texts: .txt or .jsonl, also .gz")
    parser.add_argument("--text-field", default="text", help="of a .jsonl; default: text")
    parser.add_argument("--label-field", default="label", help="of a .jsonl, such as a domain; default: label, if any")
    parser.add_argument("--limit", type=int, default=texts, help=f"texts of each label; default: {texts}")
    parser.add_argument("--length", type=int, default=256, help="tokens of each text that are read; default: 256")
    parser.add_argument("--batch", type=int, default=8, help="texts of a forward; default: 8")
    parser.add_argument("--device", default="cpu", help="default: cpu")
    return parser


class Inputs:
    """The texts, the model and its tokenizer. What can be wrong with arguments is found before these load."""

    def __init__(self, args: argparse.Namespace) -> None:
        for name in ("limit", "length", "batch", "keep", "factor", "groups"):
            number = getattr(args, name, None)
            if number is not None and not 1 <= number < float("inf"):
                raise ValueError(f"--{name} {number} must be 1 or more")
        self.args = args
        self.read = read_texts(args.data, args.limit, args.text_field, args.label_field)
        wanted, have = getattr(args, "label", None), sorted(set(self.read.labels or ()))
        if wanted is not None and wanted not in have:
            raise ValueError(f"--label {wanted!r} is no label of {str(args.data)!r}; have {have}")
        if self.read.left_out:
            _say(f"{len(self.read.texts)} texts are read, {self.read.left_out} are left out by --limit {args.limit}")
        check_saved_pair(args.model, args.adapter)
        import_what_waits()
        from transformers import logging as transformers_logging

        from mixadapters.surgery.loading import load_model, load_tokenizer

        if not _on_terminal():
            transformers_logging.disable_progress_bar()
        self.tokenizer = load_tokenizer(args.model)
        self.model: Any = load_model(args.model, args.adapter, args.device)
        # Of an adapter's experts, or of the base's.
        self.owner = "" if args.adapter is None else "default"
        if args.adapter is not None:
            trained = self.model.peft_config["default"].base_model_name_or_path
            if trained and Path(trained).name != Path(args.model).name:
                _say(f"note: the adapter says that it was trained on {trained!r}, and MODEL is {args.model!r}")

    def batches(self, what: str) -> Iterator[tuple[dict[str, Any], list[str] | None]]:
        """Arguments of the model and the labels of their rows, under a progress bar."""
        from mixadapters.surgery.tracing import padded, read_tokens

        rows = read_tokens(self.model, self.tokenizer, self.read.texts, self.args.length)
        size, labels = self.args.batch, self.read.labels
        for start in _followed(range(0, len(rows), size), what):
            part = slice(start, start + size)
            yield padded(self.model, rows[part]), None if labels is None else labels[part]

    def save(self, folder: Path) -> None:
        """The adapter; or the base with its tokenizer."""
        if self.args.adapter is not None:
            self.model.save_pretrained(folder)
            return
        from mixadapters.surgery.saving import save_pruned

        save_pruned(self.model, folder)
        self.tokenizer.save_pretrained(folder)

    def usage(self) -> Any:
        """What the experts do with the texts."""
        from mixadapters.surgery.tracing import evaluating
        from mixadapters.surgery.usage import record_usage

        with evaluating(self.model), record_usage(self.model, adapter=self.owner) as usage:
            for batch, labels in self.batches("usage"):
                usage.labels = labels
                self.model(**batch)
        return usage


def report(arguments: Sequence[str]) -> int:
    parser = _parser(
        "report", "What the experts of a model are, cost, and do with some texts.", 256,
        f"{ADAPTERS} --data texts.jsonl --out report",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="new folder; without it tables are printed alone")
    args = parser.parse_args(arguments)
    if args.out is not None:
        new_folder(args.out)
    inputs = Inputs(args)
    from mixadapters.surgery.overspecification import overspecification_report
    from mixadapters.surgery.reporting import report as reported

    usage = inputs.usage()
    batches = (batch for batch, _ in inputs.batches("experts that compute the same"))
    same = overspecification_report(inputs.model, batches, adapter=inputs.owner)
    found = reported(inputs.model, usage, same, inputs.owner)
    print(found.markdown())
    if args.out is not None:
        with folder_aside(args.out) as aside:
            (aside / "report.json").write_text(json.dumps(found.as_dict(), indent=1), encoding="utf-8")
            (aside / "report.md").write_text(found.markdown(), encoding="utf-8")
            usage.save(aside / "usage.safetensors")
            try:
                found.plot(aside / "load.png")
            except ImportError as error:
                _say(f"no picture: {error}")
        _say(f"wrote {args.out}")
    return 0


def routes(arguments: Sequence[str]) -> int:
    parser = _parser(
        "routes", "A page of text, coloured by the expert that took each token.", 6,
        f"{ADAPTERS} --data texts.jsonl --out routes.html",
    )  # fmt: skip
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.html", help="new file")
    parser.add_argument("--title", help="of the page; default: the model's name")
    args = parser.parse_args(arguments)
    _check_new_file(args.out, ".html")
    inputs = Inputs(args)
    from mixadapters.surgery.page import check_counts, write_page
    from mixadapters.surgery.tracing import most_choices, read_tokens
    from mixadapters.surgery.tracing import routes as routed

    rows = read_tokens(inputs.model, inputs.tokenizer, inputs.read.texts, args.length)
    tokens = sum(map(len, rows))
    check_counts(tokens, tokens * most_choices(inputs.model, inputs.owner))
    table = routed(
        inputs.model, inputs.tokenizer, inputs.read.texts, inputs.read.labels, adapter=inputs.owner,
        length=args.length, batch=args.batch, progress=_on_terminal(),
    )  # fmt: skip
    whose = Path(args.adapter or args.model).name
    write_page(table, args.out, title=args.title or f"Which expert took each token: {whose}")
    _say(f"wrote {args.out}")
    return 0


def prune(arguments: Sequence[str]) -> int:
    parser = _parser(
        "prune", "The experts that matter least for some texts leave.", 256,
        "olmoe-1b-7b --data texts.jsonl --label law --factor 2 --out pruned",
    )  # fmt: skip
    count = parser.add_mutually_exclusive_group(required=True)
    count.add_argument("--keep", type=int, metavar="N", help="experts that stay in each layer")
    count.add_argument("--factor", type=float, help="instead: a layer of E experts keeps E / factor")
    parser.add_argument("--criterion", choices=CRITERIA, default="saliency", help="default: saliency")
    parser.add_argument("--scope", choices=SCOPES, default="layer", help="of the budget; default: layer")
    parser.add_argument("--preserve-mass", action="store_true", help="those that stay get nothing of the others'")
    _add_cutting(parser)
    args = parser.parse_args(arguments)

    def verb(inputs: Inputs, usage: Any, criterion: Any = args.criterion, **options: Any) -> Any:
        from mixadapters.surgery.pruning import prune_experts

        return prune_experts(
            inputs.model, usage, args.keep, factor=args.factor, criterion=criterion, scope=args.scope,
            preserve_mass=args.preserve_mass, **options,
        )  # fmt: skip

    def check(inputs: Inputs) -> None:
        verb(inputs, None, "random", adapter=inputs.owner, dry_run=True)

    return _cut(args, verb, check)


def merge(arguments: Sequence[str]) -> int:
    parser = _parser(
        "merge", "Experts that serve the same tokens of some texts, or compute the same, become one.", 256,
        f"{ADAPTERS} --data texts.jsonl --groups 4 --out merged",
    )  # fmt: skip
    count = parser.add_mutually_exclusive_group(required=True)
    count.add_argument("--groups", type=int, metavar="N", help="experts that each layer has afterwards")
    count.add_argument(
        "--doubles", type=float, metavar="TOLERANCE",
        help="instead: those alone that compute the same, up to this distance from 0 to 2, such as 0.01",
    )  # fmt: skip
    parser.add_argument("--similarity", choices=SIMILARITIES, default="router_logits", help="default: router_logits")
    parser.add_argument("--grouping", choices=GROUPINGS, default="dominant", help="default: dominant")
    parser.add_argument("--weight", choices=AVERAGINGS, default="usage", help="default: usage")
    parser.add_argument("--no-align", action="store_true", help="add up neurons as they are numbered")
    parser.add_argument("--scope", choices=SCOPES, default="layer", help="of the budget; default: layer")
    _add_cutting(parser)
    args = parser.parse_args(arguments)
    if args.doubles is not None:
        check_tolerance("--doubles", args.doubles)
        if (args.similarity, args.grouping, args.scope) != ("router_logits", "dominant", "layer"):
            raise ValueError("--doubles says which experts become one: leave out --similarity, --grouping and --scope")

    def check(inputs: Inputs) -> None:
        from mixadapters.surgery.pruning import layers_to_cut

        most = max(len(layer.names) for layer in layers_to_cut(inputs.model, inputs.owner))
        if args.groups is not None and args.groups > most:
            raise ValueError(f"--groups {args.groups}: no layer has more than {most} experts")

    def verb(inputs: Inputs, usage: Any, **options: Any) -> Any:
        from mixadapters.surgery.merging import merge_experts
        from mixadapters.surgery.overspecification import overspecification_report

        groups: Any = args.groups
        if args.doubles is not None:
            batches = (batch for batch, _ in inputs.batches("experts that compute the same"))
            same = overspecification_report(inputs.model, batches, tolerance=args.doubles, adapter=inputs.owner)
            groups = same.groups
        return merge_experts(
            inputs.model, usage, groups, similarity=args.similarity, grouping=args.grouping,
            align=not args.no_align, weight=args.weight, scope=args.scope, **options,
        )  # fmt: skip

    return _cut(args, verb, check)


def compress(arguments: Sequence[str]) -> int:
    parser = _parser(
        "compress", "Smaller experts, calibrated on some texts, in a folder of codes.", 64,
        "olmoe-1b-7b --data texts.jsonl --out compressed",
    )  # fmt: skip
    parser.add_argument(
        "--method", choices=tuple(COMPRESSIONS), default="qmoe",
        help="ternary weights, or products of low rank with some rows beside; default: qmoe",
    )  # fmt: skip
    parser.add_argument("--scale", choices=SCALES, help="qmoe: of each row's two values; default: minmax")
    parser.add_argument("--rounding", choices=ROUNDINGS, help="qmoe; default: gptq")
    parser.add_argument("--codec", choices=CODECS, help="qmoe; default: qmoe")
    parser.add_argument("--share", type=float, help="lowrank_sparse: of the weights, for the product; default: 0.25")
    parser.add_argument("--keep-rows", type=float, help="lowrank_sparse: share of rows beside it; default: 0.1")
    parser.add_argument("--dry-run", action="store_true", help="say what would happen, and write nothing")
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="new folder, for the result")
    args = parser.parse_args(arguments)
    new_folder(args.out)
    options = _options_of(args)
    inputs = Inputs(args)
    from mixadapters.surgery.compressed import save_compressed
    from mixadapters.surgery.compressing import compress_experts

    batches = [batch for batch, _ in inputs.batches("texts")]
    told = compress_experts(
        inputs.model, batches, method=args.method, adapter=inputs.owner, dry_run=args.dry_run, **options
    )
    print(
        f"{len(told.experts)} experts: {told.nbytes} bytes for {told.plain_bytes}, {told.bits_per_weight:.2f} bits "
        f"per weight; their outputs moved by {told.error:.3f} of their square"
    )
    if args.dry_run:
        return 0
    with folder_aside(args.out) as aside:
        sizes = save_compressed(inputs.model, aside, codec=args.codec or "qmoe", factors=told.factors)
        (aside / "surgery.json").write_text(json.dumps(told.as_dict(), indent=1), encoding="utf-8")
        if args.adapter is None:
            inputs.tokenizer.save_pretrained(aside)
    _say(f"wrote {args.out}: {sizes.on_disk} bytes of weights for {sizes.plain}")
    return 0


def _options_of(args: argparse.Namespace) -> dict[str, Any]:
    """Those of a method that were given. Raises ValueError for those of another, and for shares out of range."""
    given = {"scale": args.scale, "rounding": args.rounding, "codec": args.codec, "share": args.share,
             "keep": args.keep_rows}  # fmt: skip
    given = {name: value for name, value in given.items() if value is not None}
    flags = {name: "--keep-rows" if name == "keep" else f"--{name}" for name in given}
    if odd := [flags[name] for name in given if name not in COMPRESSIONS[args.method]]:
        raise ValueError(f"{odd[0]} is no option of --method {args.method}")
    for name in given.keys() & {"share", "keep"}:
        check_share(flags[name], given[name])
    return given


def expand(arguments: Sequence[str]) -> int:
    parser = _bare_parser(
        "expand", "The folder that `compress` has written as an ordinary one, for stock libraries.",
        "compressed --out expanded",
    )  # fmt: skip
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="a model or an adapter in codes")
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="new folder")
    args = parser.parse_args(arguments)
    if not args.folder.is_dir():
        raise ValueError(f"FOLDER {str(args.folder)!r}: there is no such folder")
    new_folder(args.out)
    import_what_waits()
    from mixadapters.surgery.compressed import expand_compressed

    expand_compressed(args.folder, args.out)
    _say(f"wrote {args.out}")
    return 0


def _add_cutting(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--label", help="record the texts of this label alone: what the model is to be good at")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--dry-run", action="store_true", help="say what would happen, and write nothing")
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="new folder, for the result")


def _cut(
    args: argparse.Namespace, verb: Callable[..., Any], check: Callable[[Inputs], object] = lambda inputs: None
) -> int:
    """Record, cut and save. check: raises ValueError for what cannot be cut so, before the texts are read."""
    new_folder(args.out)
    inputs = Inputs(args)
    check(inputs)
    usage = inputs.usage()
    usage = usage if args.label is None else usage.by_label[args.label]
    result = verb(inputs, usage, adapter=inputs.owner, seed=args.seed, dry_run=args.dry_run)
    print(result)
    if args.dry_run:
        return 0
    with folder_aside(args.out) as aside:
        inputs.save(aside)
        (aside / "surgery.json").write_text(json.dumps(result.as_dict(), indent=1), encoding="utf-8")
    _say(f"wrote {args.out}")
    return 0


def _check_new_file(path: Path, suffix: str) -> None:
    if path.suffix != suffix:
        raise ValueError(f"--out {str(path)!r} must end in {suffix}")
    if path.exists():
        raise ValueError(f"--out {str(path)!r} is there already; name a new file")
    if not path.parent.is_dir():
        raise ValueError(f"--out {str(path)!r}: there is no folder {str(path.parent)!r}")


def _followed(starts: range, what: str) -> Iterator[int]:
    """Under a progress bar; without a terminal a line from time to time."""
    if _on_terminal():
        from tqdm import tqdm

        yield from tqdm(starts, what, unit="batch", leave=False)
        return
    said = time.monotonic()
    for number, start in enumerate(starts):
        if time.monotonic() - said > SILENCE:
            _say(f"{what}: {number} of {len(starts)} batches")
            said = time.monotonic()
        yield start


def _on_terminal() -> bool:
    return sys.stderr.isatty()


def _say(text: str) -> None:
    print(text, file=sys.stderr)


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "report": report,
    "routes": routes,
    "prune": prune,
    "merge": merge,
    "compress": compress,
    "expand": expand,
}


def main(argv: list[str] | None = None) -> int:
    command, *arguments = (sys.argv[1:] if argv is None else argv) or [""]
    if command not in COMMANDS:
        print(USAGE, file=sys.stderr)
        return 0 if command in ("-h", "--help") else 2
    try:
        return COMMANDS[command](arguments)
    except (ValueError, OSError) as error:
        _say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        _say("interrupted: nothing is half-written")
        return 130


if __name__ == "__main__":
    end_by_signal()
    sys.exit(main())
