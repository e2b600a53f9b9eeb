"""Whole runs on tiny models: cached, repeatable, and blind to test until the end."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from accelerate import PartialState
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, HfArgumentParser

from mixadapters.tasks import __main__ as cli
from mixadapters.tasks import runner as runner_module
from mixadapters.tasks.arguments import TrainArguments
from mixadapters.tasks.report import read_results
from mixadapters.tasks.run_arguments import RunArguments

SMALL = (
    "--max_steps 2 --per_device_train_batch_size 4 --max_length 24 --parameters 1200 --stage1_steps 1 --stage1_batch 4"
)
SHOTS = "--shots 4 --shots_from rule --test_rows 8"


def run(model: Path, data: Path, out: Path, line: str) -> int:
    return cli.main(["run", "--model", str(model), "--data-dir", str(data), "--out", str(out),
                     *f"{SMALL} --stage1_steps 1 {line}".split()])  # fmt: skip


def results(out: Path) -> dict[tuple[str, str, int], dict[str, Any]]:
    found = [json.loads(f.read_text()) for f in sorted(out.glob("*/*-s*-*.json"))]
    return {(r["task"], r["method"], r["seed"]): r for r in found}


def test_all_methods_run_once_and_are_then_cached(encoder, data, tmp_path, capsys, caplog, monkeypatch) -> None:
    methods = "majority tfidf probe lora bottleneck mixda_untuned mixda moa full"
    line = f"--tasks imdb --methods {methods} --seeds 1 {SHOTS} --layers 2"
    assert run(encoder, data, tmp_path, line) == 0
    found = results(tmp_path)
    assert {m for _, m, _ in found} == set(methods.split())
    assert len(found) == 9
    one = found["imdb", "mixda", 1]
    assert one["rows"] == {"train": 8, "dev": 8, "test": 8}
    assert len(one["predictions"]) == len(one["gold"]) == 8
    assert one["retention"]["drift"] >= 0
    assert one["versions"]["torch"]
    assert one["setup"]["training"]["max_steps"] == "2"
    assert len({r["digests"]["test"] for r in found.values()}) == 1
    assert len({r["digests"]["train"] for r in found.values()}) == 1
    assert len(list((tmp_path / "domains").iterdir())) == 4
    sizes = [found["imdb", m, 1]["trainable_parameters"] for m in ("lora", "moa")]
    assert sizes[0] == sizes[1]
    assert "mixda seed 1: accuracy 0." in capsys.readouterr().out
    assert not any("base model of other weights" in message for message in caplog.messages)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(runner_module.TaskTrainer, "train", refuse)
    assert run(encoder, data, tmp_path, line) == 0
    assert capsys.readouterr().out.count(": cached, ") == 9
    with pytest.raises(AssertionError, match="trained again"):
        run(encoder, data, tmp_path, f"{line} --weight_decay 0.5")
    # Where results go, and how often they are logged, decides nothing.
    assert run(encoder, data, tmp_path, f"{line} --logging_steps 1 --per_device_eval_batch_size 3") == 0


def test_lora_domains_are_frozen_and_chosen_by_counted_text(encoder, data, tmp_path, monkeypatch) -> None:
    built = []
    build = runner_module.Method.build
    monkeypatch.setattr(runner_module.Method, "build", lambda self, base: built.append(build(self, base)) or built[-1])
    assert (
        run(encoder, data, tmp_path, f"--tasks imdb --methods moa --seeds 0 {SHOTS} --layers 2 --stage1_steps 2") == 0
    )
    model = built[0][0]
    for folder in (tmp_path / "domains").iterdir():
        before = load_file(folder / "adapter_model.safetensors")
        assert all(key.startswith("base_model.model.encoder.layer.") for key in before)
        assert any(tensor.any() for key, tensor in before.items() if "lora_B" in key)  # from zero
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(".shared0." in name or "classifier" in name for name in trained)
    router = next(iter(model.base_model.mixtures().values())).router
    assert router.counted.domains == ["reviews", "biomed"]
    assert router.counted.totals[:2].tolist() == [480, 360]  # 40 and 30 texts of 12 words
    assert router.counted.totals[2] in range(6 * 60, 7 * 60)  # of general text all but the last 200 of 260


def test_a_run_can_be_repeated(encoder, data, tmp_path) -> None:
    line = f"--tasks imdb --methods bottleneck --seeds 3 {SHOTS} --max_steps 6"
    for out in ("a", "b"):
        run(encoder, data, tmp_path / out, line)
    a, b = (results(tmp_path / out)["imdb", "bottleneck", 3] for out in ("a", "b"))
    assert {k: v for k, v in a.items() if k != "seconds"} == {k: v for k, v in b.items() if k != "seconds"}


def test_the_seed_reaches_everything_that_draws(encoder, data, tmp_path, monkeypatch) -> None:
    heads = []

    def spy(self: Any, **_: Any) -> None:
        assert (self.args.seed, self.args.data_seed) == (7 + len(heads), 7 + len(heads))
        heads.append(self.model.classifier.weight.tolist())

    monkeypatch.setattr(runner_module.TaskTrainer, "train", spy)
    line = "--tasks imdb --methods probe --max_length 24"
    run(encoder, data, tmp_path, f"{line} --seeds 7 8")
    assert heads[0] != heads[1]
    digests = [r["digests"]["train"] for r in results(tmp_path).values()]
    assert digests[0] == digests[1]
    run(encoder, data, tmp_path, f"{line} {SHOTS} --methods majority --seeds 7 8")
    assert len({r["digests"]["train"] for r in results(tmp_path).values()}) == 3


def test_only_the_rate_chosen_on_dev_meets_test(encoder, data, tmp_path, monkeypatch) -> None:
    asked: list[int] = []
    predict = runner_module.Run._predict

    def spy(self: Any, trainer: Any, examples: Any) -> list[Any]:
        asked.append({id(self.rows.dev): 0, id(self.rows.test): 1}[id(examples)])
        gold = [e.target for e in examples]
        if asked[-1]:
            return predict(self, trainer, examples)
        return gold if trainer.args.learning_rate == 2e-3 else [1 - g for g in gold]

    monkeypatch.setattr(runner_module.Run, "_predict", spy)
    run(encoder, data, tmp_path, f"--tasks imdb --methods lora --seeds 0 {SHOTS} --rates 1e-3 2e-3 3e-3")
    assert asked == [0, 0, 0, 1]
    result = results(tmp_path)["imdb", "lora", 0]
    assert result["settings"]["rate"] == 2e-3
    assert result["candidates"] == [{"rate": r, "dev": float(r == 2e-3)} for r in (1e-3, 2e-3, 3e-3)]


@pytest.mark.parametrize("task", ["stsb", "commonsenseqa"])
def test_scores_and_choices_with_an_encoder(encoder, data, tmp_path, task) -> None:
    run(encoder, data, tmp_path, f"--tasks {task} --methods bottleneck --seeds 0 {SHOTS}")
    result = results(tmp_path)[task, "bottleneck", 0]
    kind = float if task == "stsb" else int
    assert all(isinstance(p, kind) for p in result["predictions"])


def test_decoders_rank_and_generate(decoder, data, tmp_path) -> None:
    line = f"--tasks fever commonsenseqa trex_slotfilling --methods frozen lora bottleneck --seeds 0 {SHOTS}"
    assert run(decoder, data, tmp_path, f"{line} --max_new_tokens 3 --keep_adapters") == 0
    found = results(tmp_path)
    (saved,) = tmp_path.glob("fever/lora-s0-*/")
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(decoder), str(saved))
    assert len(found) == 9
    said = found["trex_slotfilling", "lora", 0]["predictions"]
    assert all(isinstance(p, str) and len(p.split()) <= 3 for p in said)
    before = found["fever", "lora", 0]["retention"]["untouched"]
    assert found["fever", "frozen", 0]["retention"] == {"token loss": before, "untouched": before}


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_encoder_decoders_rank_and_generate(request, data, tmp_path, kind) -> None:
    model = request.getfixturevalue(kind)
    methods = "frozen lora bottleneck mixda_untuned"
    line = f"--tasks fever commonsenseqa trex_slotfilling --methods {methods} --seeds 0 {SHOTS} --max_new_tokens 3"
    assert run(model, data, tmp_path, f"{line} --keep_adapters") == 0
    found = results(tmp_path)
    assert len(found) == 12
    said = found["trex_slotfilling", "lora", 0]["predictions"]
    assert all(isinstance(p, str) and len(p.split()) <= 3 for p in said)
    assert found["fever", "frozen", 0]["trainable_parameters"] == 0
    for task, method in ((t, m) for t in ("fever", "trex_slotfilling") for m in methods.split()[1:]):
        (saved,) = tmp_path.glob(f"{task}/{method}-s0-*/")
        tuned = PeftModel.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained(model), str(saved))
        names = [n for n, _ in tuned.named_parameters()]
        assert any("encoder" in n and "default" in n for n in names)
        assert any("decoder" in n and "default" in n for n in names)
        # What begins as zero has moved: the adapter learned.
        ends = {n: v for n, v in load_file(saved / "adapter_model.safetensors").items()
                if "lora_B" in n or ("up." in n and "domain.bank" not in n)}  # fmt: skip
        assert ends
        assert [n for n, v in ends.items() if not v.any()] == []


@pytest.mark.parametrize("kind", ["decoder", "t5", "bart"])
def test_a_model_learns_to_generate_answers(request, data, tmp_path, kind) -> None:
    answers = {"bel": "kog", "mit": "bad bel", "dus": "kim kim fon", "gak": "dur"}
    for split in (
        "train",
        "dev",
        "test",
    ):  # words that the tokenizer has not: rows differ, what the model sees does not
        rows = ({"input": f"{w} {split}", "output": [{"answer": a}]} for w, a in answers.items())
        (data / f"kilt/trex_slotfilling/{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    line = "--tasks trex_slotfilling --methods full --seeds 0 --full_rates 1e-2 --max_steps 120 --max_new_tokens 8"
    run(request.getfixturevalue(kind), data, tmp_path, line)
    result = results(tmp_path)["trex_slotfilling", "full", 0]
    assert result["rows"] == {"train": 4, "dev": 4, "test": 4}
    assert result["predictions"] == [right for (right,) in result["gold"]]  # no prompt in it, and it ends
    assert result["metrics"]["accuracy"] == 1


def test_dry_run_trains_nothing_and_tells_sizes_and_time(encoder, data, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(runner_module.TaskTrainer, "train", None)
    run(encoder, data, tmp_path, f"--tasks imdb --methods majority bottleneck mixda --seeds 0 1 {SHOTS} --dry-run")
    out = capsys.readouterr().out
    assert "bottleneck: 8 train, 8 dev, 8 test rows; trains 1,2" in out
    assert "2 x about " in out
    assert "layer.*.output.dense.mixda_adapters.default.domain.router.output.weight" in out
    assert not list(tmp_path.glob("imdb"))


@pytest.mark.parametrize("method", ["mixda_untuned", "mixda", "moa"])
def test_dry_run_counts_what_the_run_trains(encoder, data, tmp_path, capsys, method) -> None:
    line = f"--tasks imdb --methods {method} --seeds 0 {SHOTS}"
    run(encoder, data, tmp_path, f"{line} --dry-run")
    (said,) = re.findall(r"trains ([\d,]+) parameters", capsys.readouterr().out)
    run(encoder, data, tmp_path, line)
    assert said == f"{results(tmp_path)['imdb', method, 0]['trainable_parameters']:,}"


@pytest.mark.parametrize(
    ("kind", "line", "message"),
    [
        ("encoder", "--tasks imdb trex_slotfilling --methods majority lora", "task 'trex_slotfilling' wants text"),
        ("decoder", "--tasks fever --methods majority probe", "method 'probe' trains a head"),
        ("encoder", "--tasks imdb rte --methods majority", r"has no file glue/rte/train\*\.jsonl"),
        ("encoder", "--tasks imdb fever --methods probe mixda", "task 'fever' has domain='' and 260 general texts"),
        ("t5", "--tasks imdb --methods majority mixda", "not of an encoder-decoder model_type='t5'; pass --domains"),
        ("encoder", "--tasks fever --methods moa", "moa trains domain .* pass --domains name=folder, or take lora"),
        ("encoder", "--tasks imdb --methods moa --domains law=x", r"domains=\['law'\]: moa counts text .* name them"),
        ("encoder", "--tasks imdb --methods majority no/such.json", r"method 'no/such\.json' is no file"),
    ],
)
@pytest.mark.parametrize("dry", ["", "--dry-run"])
def test_what_cannot_run_is_found_at_once(request, data, tmp_path, capsys, kind, line, message, dry) -> None:
    assert run(request.getfixturevalue(kind), data, tmp_path / "out", f"{line} --seeds 0 {SHOTS} {dry}") == 1
    said = capsys.readouterr()
    assert re.search(message, said.err)
    assert not said.out
    assert not results(tmp_path / "out")


def test_a_model_that_is_not_there_is_named(data, tmp_path, capsys) -> None:
    assert run(tmp_path / "nowhere", data, tmp_path, f"--tasks imdb --methods probe --seeds 0 {SHOTS}") == 1
    assert re.search(r"error: model='.*nowhere' cannot be loaded: ", capsys.readouterr().err)


def test_a_run_that_fails_does_not_stop_the_others(encoder, data, tmp_path, capsys) -> None:
    line = f"--tasks trex_slotfilling imdb --methods majority probe --seeds 0 {SHOTS} --keep_going"
    assert run(encoder, data, tmp_path, line) == 1
    assert "trex_slotfilling probe seed 0: FAILED: ValueError: task" in capsys.readouterr().err
    assert len(results(tmp_path)) == 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--tasks imbd", "task 'imbd' is unknown"),
        ("--tasks imdb --methods lorra", "method 'lorra' is unknown"),
        ("--tasks imdb --rates 0", r"rates=[0.0] must be one or more positive"),
        ("--tasks imdb --rates 1e-3 nan", r"rates=[0.001, nan] must be one or more positive"),
        (
            "--tasks imdb --rates 1e-3 1.0000001e-3",
            "must be one or more positive learning rates, finite and different",
        ),
        ("--tasks imdb --full_rates inf", r"full_rates=[inf] must be one or more positive"),
        ("--tasks imdb --head_rate nan", "head_rate=nan must be a positive learning rate, and finite"),
        ("--tasks imdb --head_rate -1", "head_rate=-1.0 must be a positive learning rate"),
        ("--tasks imdb --head_rate 0", "head_rate=0.0 must be a positive learning rate"),
        ("--tasks imdb --stage1_rate inf", "stage1_rate=inf must be a positive learning rate"),
        ("--tasks imdb --seeds 1 1", "seeds=[1, 1] must be one or more different numbers from 0 to 4294967295"),
        ("--tasks imdb --seeds -1", "seeds=[-1] must be one or more different numbers"),
        ("--tasks imdb --max_steps 0", "max_steps=0 must be 1 or more, or -1 for --num_train_epochs"),
        ("--tasks imdb --num_train_epochs nan", "num_train_epochs=nan must be finite"),
        ("--tasks imdb --weight_decay nan", "weight_decay=nan must be finite"),
        ("--tasks imdb --weight_decay -0.1", "weight_decay=-0.1 must be 0 or more"),
        ("--tasks imdb --adam_beta2 1", "adam_beta2=1.0 must be 0 or more and less than 1"),
        ("--tasks imdb --per_device_train_batch_size 0", "per_device_train_batch_size=0 must be 1 or more"),
        ("--tasks imdb --gradient_accumulation_steps 0", "gradient_accumulation_steps=0 must be 1 or more"),
        ("--tasks imdb --eval_accumulation_steps 0", "eval_accumulation_steps=0 must be 1 or more"),
        ("--tasks imdb --generation_num_beams 0", "generation_num_beams=0 must be 1 or more"),
        (
            "--tasks imdb --dataloader_drop_last true",
            "dataloader_drop_last=True is set by each run; pass nothing: all",
        ),
        ("--tasks imdb --prediction_loss_only true", "prediction_loss_only=True is set by each run; pass nothing"),
        ("--tasks imdb --label_names x", "label_names=['x'] is set by each run; pass nothing"),
        (
            "--tasks imdb --gradient_checkpointing true",
            "gradient_checkpointing=True needs a model of transformers' own, and task 'imdb' puts a head on model",
        ),
        ("--tasks imdb --methods lora --parameters 99999999999", "parameters=99999999999 is more than the "),
        ("--tasks imdb --methods mixda --stage1_batch 36", "stage 1 has 30 texts, which fill no batch of 36: nothing"),
        ("--tasks imdb --methods mixda --domains a=/no/such", "--domains '/no/such': there is no such folder."),
        ("--tasks imdb --save_only_model", "save_only_model=True leaves nothing to go on from"),
        (
            "--tasks imdb --methods probe --max_length 65",
            "has 64 positions, too few for 65 of --max-length; pass less",
        ),
        ("--tasks imdb --shots_from mine", "shots_from='mine' must be 'published' or 'rule'"),
        ("--tasks imdb --learning_rate 1e-4", "learning_rate=0.0001 is set by each run; pass --rates"),
        ("--tasks imdb --seed 3", "seed=3 is set by each run; pass --seeds"),
        ("--tasks imdb --domains reviews", "domains='reviews' must be name=folder"),
        ("--tasks imdb --domains a=x a=y", "domains=['a=x', 'a=y'] have a name twice"),
        ("--tasks imdb --domains =x", "domains='=x' must be name=folder"),
        ("--tasks imdb --test_rows 0", "test_rows=0 must be 1 or more"),
        ("--tasks imdb --shots -1", "shots=-1 must be 1 or more"),
        ("--tasks imdb --shots 4 --train_rows 9", "shots=4 and train_rows=9: give one of the two"),
        ("--tasks imdb --layers 4 --methods lora", "layers=4 must be at most the 3 layers of model"),
        ("--tasks imdb --pooling max", "pooling='max' must be 'mean' or 'first'"),
        ("--tasks fever --methods mixda", "pass --domains name=folder, or take mixda_untuned"),
    ],
)
def test_bad_arguments_are_named(encoder, data, tmp_path, capsys, line, message) -> None:
    assert run(encoder, data, tmp_path, line) == 1
    assert message in capsys.readouterr().err


def test_a_decoder_needs_positions_for_what_it_writes(decoder, data, tmp_path, capsys) -> None:
    line = "--tasks trex_slotfilling --methods frozen --seeds 0 --max_length 60 --max_new_tokens 4"
    assert run(decoder, data, tmp_path, f"{line} {SHOTS}") == 1
    said = "has 64 positions, too few for 60 of --max-length + 1 of a token to begin with + 4 of --max-new-tokens"
    assert said in capsys.readouterr().err
    assert run(decoder, data, tmp_path, f"{line} {SHOTS} --max_length 59") == 0


def test_an_output_folder_that_is_a_file_is_refused_before_training(
    encoder, data, tmp_path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr(runner_module.TaskTrainer, "train", None)
    (tmp_path / "out").write_text("mine")
    for out in (tmp_path / "out", tmp_path / "out" / "deeper"):
        assert run(encoder, data, out, f"--tasks imdb --methods lora --seeds 0 {SHOTS}") == 1
        assert re.search(r"error: --out .* must be a folder that can be written to: ", capsys.readouterr().err)
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("name", ["imdb", "trainer", "domains"])
def test_folders_inside_the_output_are_looked_at_before_training(encoder, data, tmp_path, capsys, name) -> None:
    (tmp_path / name).write_text("mine")
    assert run(encoder, data, tmp_path, f"--tasks imdb --methods majority lora --seeds 0 {SHOTS}") == 1
    said = capsys.readouterr()
    assert f"{name} must be a folder that can be written to" in said.err
    assert not said.out
    assert (tmp_path / name).read_text() == "mine"


@pytest.mark.parametrize("name", ["glue/stsb/dev", "glue/qnli/train"])
def test_a_faulty_row_of_other_sets_is_no_missing_file(encoder, data, write, tmp_path, capsys, name) -> None:
    """Domain adapters would read the test sentences of that task, and general text would be thought to be missing."""
    write(data, name, [{"sentence": 3, "sentence1": 3}])
    assert run(encoder, data, tmp_path / "out", f"--tasks imdb --methods mixda --seeds 0 {SHOTS} --layers 2") == 1
    assert re.search(
        rf"error: .*{name}\.jsonl, row 1: field 'sentence1?' must be text, got 3", capsys.readouterr().err
    )


def test_a_test_set_without_its_dev_set_is_unseen_too(encoder, data, tmp_path) -> None:
    (data / "reviews/imdb/dev.jsonl").unlink()
    for other in ("kilt", "commonsenseqa", "glue/stsb"):  # they have the same texts
        shutil.rmtree(data / other)
    arguments = RunArguments(["imdb"], str(encoder), str(data), str(tmp_path))
    unseen = runner_module.Runner(arguments, TrainArguments(use_cpu=True)).unseen
    rows = map(json.loads, (data / "reviews/imdb/test.jsonl").read_text().splitlines())
    assert {row["text"] for row in rows} <= unseen


def test_of_a_set_in_several_files_those_that_are_there_are_unseen(data, write, tmp_path, encoder) -> None:
    """Domain adapters would read its test sentences, as if there were no file of it."""
    write(
        data, "reviews/blitzer/kitchen/test", [{"text": "the kettle sings early in the morning", "label": "positive"}]
    )
    shutil.rmtree(data / "glue")
    only = {name: task for name, task in runner_module.TASKS.items() if name == "sentiment"}
    arguments = RunArguments(["imdb"], str(encoder), str(data), str(tmp_path))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner_module, "TASKS", only)
        unseen = runner_module.Runner(arguments, TrainArguments(use_cpu=True)).unseen
    assert unseen == {runner_module.domains.key("the kettle sings early in the morning")}


def test_general_text_of_which_a_file_is_missing_is_left_out_by_name(data, encoder, tmp_path, capsys) -> None:
    (data / "glue/qnli/train.jsonl").unlink()
    assert run(encoder, data, tmp_path, f"--tasks imdb --methods probe --seeds 0 {SHOTS} --max_steps 1") == 0
    assert re.search(
        r"general text is left out: --data-dir .* has no file glue/qnli/train\*\.jsonl or", capsys.readouterr().out
    )


def test_what_became_of_general_text_is_left_out_where_it_is_no_number(
    encoder, data, tmp_path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr(runner_module.retention, "drift", lambda *_: float("nan"))
    assert run(encoder, data, tmp_path, f"--tasks imdb --methods probe --seeds 0 {SHOTS}") == 0
    assert "probe seed 0: drift of general text is NaN or infinite" in capsys.readouterr().out
    assert set(read_results(tmp_path)[0]["retention"]) == {"STS-B"}


def spoil(trainer: Any) -> None:
    for value in trainer.model.parameters():
        if value.requires_grad:
            value.data.fill_(float("nan"))


def test_predictions_that_are_no_numbers_are_not_scored(encoder, data, tmp_path, capsys, monkeypatch) -> None:
    train = runner_module.TaskTrainer.train
    monkeypatch.setattr(runner_module.TaskTrainer, "train", lambda self, **o: (train(self, **o), spoil(self)))
    assert run(encoder, data, tmp_path, f"--tasks imdb --methods lora --seeds 0 {SHOTS}") == 1
    assert "training at rate 0.001 ended in weights that are NaN or infinite" in capsys.readouterr().err
    assert not results(tmp_path)


def test_a_model_whose_logits_are_no_numbers_is_named(decoder, data, tmp_path, capsys, monkeypatch) -> None:
    load = runner_module.Base.load

    def spoiled(self: Any, empty: bool = False) -> Any:
        model = load(self, empty)
        model.lm_head.weight.data.fill_(float("inf"))
        return model

    monkeypatch.setattr(runner_module.Base, "load", spoiled)
    assert run(decoder, data, tmp_path, f"--tasks fever --methods frozen --seeds 0 {SHOTS}") == 1
    assert re.search(r"8 of 8 predictions are NaN or infinite and are not scored.*decoder", capsys.readouterr().err)


def test_a_rate_that_diverges_is_out_and_named(encoder, data, tmp_path, capsys, monkeypatch) -> None:
    train = runner_module.TaskTrainer.train

    def diverges(self: Any, **options: Any) -> None:
        train(self, **options)
        if self.args.learning_rate != 2e-3:
            spoil(self)

    monkeypatch.setattr(runner_module.TaskTrainer, "train", diverges)
    line = f"--tasks imdb --methods lora --seeds 0 {SHOTS}"
    assert run(encoder, data, tmp_path, f"{line} --rates 1e-3 2e-3 3e-3") == 0
    result = results(tmp_path)["imdb", "lora", 0]
    assert result["settings"]["rate"] == 2e-3
    assert [c["dev"] is None for c in result["candidates"]] == [True, False, True]
    assert "rate 0.001 is out: training at rate 0.001 ended in weights" in capsys.readouterr().out
    assert run(encoder, data, tmp_path, f"{line} --rates 1e-3 3e-3") == 1


def test_methods_that_a_table_cannot_tell_apart_are_refused(encoder, data, tmp_path, capsys) -> None:
    (tmp_path / "lora.json").write_text('{"peft_type": "LORA"}')
    assert run(encoder, data, tmp_path, f"--tasks imdb --methods lora {tmp_path}/lora.json") == 1
    assert "have a name twice, and a table could not tell them apart; rename" in capsys.readouterr().err


def test_what_a_command_changes_is_found_without_leaving_other_processes() -> None:
    """Several on a CPU know of each other by it alone: otherwise each would train by itself."""
    training = TrainArguments(use_cpu=True, weight_decay=0.5)
    assert training.device.type == "cpu"
    assert training.changes()["weight_decay"] == "0.5"
    assert PartialState()._cpu


def test_rows_that_fill_up_the_last_batches_of_several_processes_are_no_predictions(
    encoder, data, tmp_path, monkeypatch
) -> None:
    predict = runner_module.TaskTrainer.predict

    def filled(self: Any, features: Any, **options: Any) -> Any:
        return predict(self, [*features, *features[:3]], **options)

    line = f"--tasks imdb --methods probe --seeds 0 {SHOTS}"
    assert run(encoder, data, tmp_path / "one", line) == 0
    monkeypatch.setattr(runner_module.TaskTrainer, "predict", filled)
    assert run(encoder, data, tmp_path / "several", line) == 0
    one, several = (results(tmp_path / out)["imdb", "probe", 0]["predictions"] for out in ("one", "several"))
    assert one == several


def test_documented_arguments_exist() -> None:
    parser = HfArgumentParser([RunArguments, TrainArguments])
    known = {name for action in parser._actions for name in action.option_strings}
    pages = (Path(__file__).parents[2] / page for page in ("README.md", "docs/tasks.md", "docs/results.md"))
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages).replace("\\\n", " ")
    commands = re.findall(r"mixadapters\.tasks run (.*)", text)
    assert commands
    for command in commands:
        assert set(re.findall(r"--[\w-]+", command)) <= known, command
