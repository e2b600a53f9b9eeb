"""Sounds for models of text: encoders that read samples or spectrograms, clips of any length, and their batches."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    Wav2Vec2FeatureExtractor,
    WhisperFeatureExtractor,
)

from mixadapters import PILLConfig, StageCallback
from mixadapters.tuners.pill import AudioInputs, AudioTextCollator, ImageInputs

transformers.logging.set_verbosity_error()
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]
RATE = 16_000
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
STACK = {"conv_dim": [8, 8], "conv_kernel": [10, 4], "conv_stride": [5, 4], "num_feat_extract_layers": 2,
         "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}  # fmt: skip


def encoder(kind: str = "wav2vec2") -> nn.Module:
    """One that reads samples (A, S), and one that reads two seconds of a spectrogram (A, 8, 200)."""
    torch.manual_seed(0)
    if kind == "wav2vec2":
        return transformers.Wav2Vec2Model(transformers.Wav2Vec2Config(**SMALL, **STACK)).eval()
    config = transformers.WhisperConfig(
        d_model=16, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=24, decoder_layers=1,
        decoder_attention_heads=2, decoder_ffn_dim=24, num_mel_bins=8, max_source_positions=100, vocab_size=32,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    return transformers.WhisperModel(config).eval().get_encoder()


def extractor(kind: str = "wav2vec2") -> Any:
    if kind == "wav2vec2":
        return Wav2Vec2FeatureExtractor(return_attention_mask=True)
    return WhisperFeatureExtractor(feature_size=8, chunk_length=2)


WORDS = ["<pad>", "<s>", "</s>", "<unk>", "what", "is", "it", "?", "a", "cat", "dog", "and", "one", "two"]


def tokenizer() -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), WORDS, strict=False))
    return PreTrainedTokenizerFast(tokenizer_object=raw, padding_side="left", **names)


def sound(seconds: float, pitch: float = 300.0) -> np.ndarray:
    time = np.arange(int(seconds * RATE)) / RATE
    return np.sin(2 * np.pi * pitch * time).astype(np.float32)


def collator(audio: AudioInputs | None = None, kind: str = "wav2vec2", **options: Any) -> AudioTextCollator:
    fields = {"token_id": 99, "tokens_per_clip": 2} if audio is None else {
        "token_id": audio.token_id, "tokens_per_clip": audio.tokens_per_clip
    }  # fmt: skip
    return AudioTextCollator(tokenizer(), extractor(kind), **{**fields, **options})


def pill(base: nn.Module, audio: AudioInputs, **fields: Any) -> PeftModel:
    config = {"r": 4, "modalities": ["text", "audio"], "token_ids": audio.token_ids, "task_type": "CAUSAL_LM"}
    return get_peft_model(base, PILLConfig(**{**config, "modules_to_save": ["projector"], **fields}))


# --- the encoder ---------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kind", ["wav2vec2", "whisper"])
def test_a_clip_is_as_alone_whichever_batch_it_is_in(tiny, kind) -> None:
    audio = AudioInputs.attach(tiny("llama"), encoder(kind), tokens=3)
    rows = [{"prompt": "<audio>", "audio": [sound(seconds)]} for seconds in (0.2, 1.1, 0.5)]
    make = collator(audio, kind)
    fields = ("input_features", "feature_attention_mask")
    together = audio.encode(*(make(rows)[name] for name in fields))
    assert together.shape == (3, 3, 16)
    for row, expected in zip(rows, together, strict=True):
        torch.testing.assert_close(audio.encode(*(make([row])[name] for name in fields))[0], expected)
    assert not torch.allclose(audio.encode(make(rows)["input_features"]), together, atol=1e-3)  # padding is heard


@torch.no_grad()
def test_states_are_averaged_over_stretches_of_what_is_no_padding(tiny) -> None:
    audio = AudioInputs.attach(tiny("llama"), encoder("whisper"), tokens=2)
    features, mask = torch.randn(1, 8, 200), torch.arange(200)[None] < 80  # 40 of 100 states
    states = encoder("whisper")(features).last_hidden_state[0]
    expected = torch.stack([states[:20].mean(0), states[20:40].mean(0)])
    torch.testing.assert_close(audio.encode(features, mask)[0], expected)
    short = audio.encode(features, torch.arange(200)[None] < 1)  # shorter than its tokens
    torch.testing.assert_close(short[0], states[:1].expand(2, -1))


@torch.no_grad()
def test_images_and_sounds_stand_in_one_row(tiny) -> None:
    base = tiny("llama")
    audio = AudioInputs.attach(base, encoder(), tokens=2)
    seeing = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**SMALL, image_size=16, patch_size=4)).eval()
    images = ImageInputs.attach(base, seeing, grid=1)
    assert (audio.token_id, images.token_id) == (96, 97)
    ids = torch.tensor([[7, 96, 96, 8, 97], [97, 7, 8, 9, 10]])
    pixels, features = torch.randn(2, 3, 16, 16), torch.randn(1, 4000)
    expected = base.get_input_embeddings()(ids.clamp_max(95))
    expected[0, 1:3] = audio.projector(audio.encode(features))[0]
    expected[[0, 1], [4, 0]] = images.projector(images.encode(pixels))[:, 0]
    given = {"input_ids": ids, "pixel_values": pixels, "input_features": features}
    torch.testing.assert_close(base(**given).logits, tiny("llama")(inputs_embeds=expected).logits)
    tokens = {**images.token_ids, **audio.token_ids}
    model = pill(base, audio, modalities=["text", "image", "audio"], token_ids=tokens, init_weights=False).eval()
    generated = audio.inputs(ids, **{name: value for name, value in given.items() if name != "input_ids"})
    assert generated["mm_token_type_ids"].tolist() == [[0, 3, 3, 0, 1], [1, 0, 0, 0, 0]]
    torch.testing.assert_close(generated["inputs_embeds"], expected)
    torch.testing.assert_close(model(**generated).logits, model(**given).logits)
    with pytest.raises(ValueError, match="token_id=97 stands for another medium already"):
        AudioInputs(base, encoder(), token_id=97)


# --- a model that hears --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "steps"), [("wav2vec2", 30), ("whisper", 1)])
def test_a_model_of_text_learns_from_sounds_and_is_saved_loaded_and_generates(
    tiny, tmp_path: Path, kind, steps
) -> None:
    """High or low, which nothing but the sound tells; a random Whisper tells it badly, and trains one step."""
    base = tiny("llama")
    again = copy.deepcopy(base)
    audio = AudioInputs.attach(base, encoder(kind), tokens=2)
    keys = {name for name in base.state_dict() if name.startswith("audio")}
    assert keys == {"audio.projector.weight"}
    model = pill(base, audio, gate_init="one")
    rows = [
        {"prompt": "<audio> what is it ?", "answer": "cat" if pitch < 500 else "dog", "audio": [sound(0.1, pitch)]}
        for pitch in (200.0, 250.0, 300.0, 1500.0, 2000.0, 2500.0)
    ]
    rows.append({"prompt": "one ?", "answer": "two"})  # no sound
    make = collator(audio, kind)
    settings = TrainingArguments(
        str(tmp_path / "run"), max_steps=steps, per_device_train_batch_size=7, learning_rate=1e-2, report_to="none",
        remove_unused_columns=False, save_strategy="no", disable_tqdm=True, use_cpu=True, seed=0,
    )  # fmt: skip
    trainer = Trainer(model, settings, train_dataset=rows, data_collator=make, callbacks=[StageCallback("tune")])
    trainer.train()
    asked = make([{name: row[name] for name in ("prompt", "audio")} for row in rows[:6]])
    model.eval().save_pretrained(tmp_path / "adapter")
    tokens = model.generate(**audio.inputs(**asked), max_new_tokens=1, do_sample=False)
    if kind == "wav2vec2":
        assert tokens.flatten().tolist() == [9, 9, 9, 10, 10, 10]  # cat, dog
    assert not torch.equal(model(**asked).logits[0], model(**asked).logits[3])  # words are the same
    fresh = AudioInputs.attach(again, encoder(kind), tokens=2)
    loaded = PeftModel.from_pretrained(again, tmp_path / "adapter").eval()
    assert torch.equal(loaded(**asked).logits, model(**asked).logits)
    assert torch.equal(loaded.generate(**fresh.inputs(**asked), max_new_tokens=1, do_sample=False), tokens)


def test_a_batch_without_sounds_gives_zero_gradients_not_none(tiny) -> None:
    base = tiny("llama")
    audio = AudioInputs.attach(base, encoder(), tokens=1)
    model = pill(base, audio).train()
    model(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert (audio.projector.modules_to_save["default"].weight.grad == 0).all()
    assert not any(p.requires_grad for p in audio.encoder.parameters())
    assert not audio.encoder.training
    base.double()
    assert next(audio.encoder.parameters()).dtype == torch.float64


# --- what is refused -----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_batches_that_do_not_fit_are_refused(tiny) -> None:
    base = tiny("llama")
    AudioInputs.attach(base, encoder(), tokens=2)
    ids, features = torch.tensor([[7, 96, 96]]), torch.randn(1, 4000)
    base(input_ids=ids, input_features=features)
    mask = torch.ones(1, 4000, dtype=torch.long)
    for given, message in (
        ({"input_ids": ids}, r"rows with \[2\] placeholders \(token 96\) do not fit 0 sounds of 2 tokens each"),
        ({"input_ids": ids, "input_features": features.repeat(2, 1)}, "do not fit 2 sounds"),
        ({"input_ids": ids[:, :2], "input_features": features}, r"rows with \[1\] placeholders"),
        ({"inputs_embeds": torch.randn(1, 3, 32), "input_features": features}, "input_features need input_ids"),
        ({"input_ids": ids, "input_features": features.short()}, "features are torch.int16, not what the encoder"),
        ({"input_ids": ids, "feature_attention_mask": mask}, "feature_attention_mask is given without input_features"),
        ({"input_ids": ids, "input_features": features, "feature_attention_mask": mask[:, 1:]},
         r"feature_attention_mask \(1, 3999\) does not fit input_features \(1, 4000\)"),
        ({"input_ids": ids, "input_features": features, "feature_attention_mask": 0 * mask},
         r"leaves nothing of clips \[0\]"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            base(**given)


@pytest.mark.parametrize("kind", ["CLIPVisionConfig", "WhisperConfig", "LlamaConfig", "ASTConfig"])
def test_what_is_no_audio_encoder_is_refused(tiny, kind) -> None:
    small = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "num_hidden_layers": 1, "vocab_size": 32,
             "hidden_size": 16, "num_attention_heads": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
             "pad_token_id": 0}  # fmt: skip
    wrong = transformers.AutoModel.from_config(getattr(transformers, kind)(**small))
    with pytest.raises(ValueError, match=r"is no audio encoder .* model\.get_encoder\(\)"):
        AudioInputs.attach(tiny("llama"), wrong)
    with pytest.raises(ValueError, match="tokens=0 must be an integer, at least 1"):
        AudioInputs.attach(tiny("llama"), encoder(), tokens=0)


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        ("cat.wav", "row 0 of the batch has a clip 'cat.wav' of <U7, where floats from -1 to 1 are samples"),
        ((32767 * sound(0.1)).astype(np.int16), "(?s)of int16, where floats from -1 to 1 are samples; divide"),
        ([[0.1], [0.1, 0.2]], "that is no array of samples"),
        (np.zeros((2, 100)), r"has a clip \(2, 100\) that is no sound of one channel"),
        (np.zeros(0), r"has a clip \(0,\) that is no sound"),
        (np.array([0.0, np.nan]), "that is no sound of one channel; give finite samples"),
        (
            {"array": sound(0.1), "sampling_rate": 8000},
            r"sampling_rate=8000, where .* reads 16000.*resampled",
        ),
        ({"path": "cat.wav"}, "sampling_rate=None, where the encoder reads 16000"),
    ],
)
def test_clips_that_no_encoder_reads_are_refused(clip, message) -> None:
    with pytest.raises(ValueError, match=message):
        collator()([{"prompt": "<audio>", "audio": [clip]}])


def test_a_clip_that_whisper_would_cut_is_refused() -> None:
    good = {"prompt": "<audio>", "audio": [{"array": sound(2.0), "sampling_rate": RATE}]}
    batch = collator(kind="whisper")([good])
    assert batch["input_features"].shape == (1, 8, 200)
    assert batch["feature_attention_mask"].shape == (1, 200)
    with pytest.raises(ValueError, match=r"a clip of 2\.5 seconds, where the encoder reads 2; cut it into several"):
        collator(kind="whisper")([{"prompt": "<audio>", "audio": [sound(2.5)]}])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "what ?", "audio": [0]}, "has 0 markers '<audio>' for 1 audio; write one where each goes"),
        ({"prompt": "<audio>", "audio": sound(0.1)}, r"of type ndarray; give a list, of one clip too: \[clip\]"),
        ({"prompt": "<audio>", "audio": [None]}, "with None in it; give every clip"),
    ],
)
def test_markers_and_clips_that_do_not_match_are_refused(row, message) -> None:
    with pytest.raises(ValueError, match=message):
        collator()([row])


def test_a_clip_is_whole_or_left_out_with_its_samples_and_needs_an_extractor() -> None:
    row = {"prompt": "one <audio> two <audio> ?", "audio": [sound(0.1), sound(0.2)]}
    cut = collator(max_length=5)([row])
    assert cut["input_ids"].tolist() == [[12, 99, 99, 13]]
    assert cut["feature_attention_mask"].sum(1).tolist() == [RATE // 10]
    make = collator()
    make.feature_extractor = None
    assert "input_features" not in make([{"prompt": "what ?"}])
    with pytest.raises(ValueError, match="has a clip, but feature_extractor=None takes none"):
        make([row])
    with pytest.raises(ValueError, match="tokens_per_clip=0 must be an integer, at least 1"):
        collator(tokens_per_clip=0)
