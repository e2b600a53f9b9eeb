"""Mixed-adapter batches on language models, for our types.

`run.py` copies this file beside PEFT's tests. PEFT has the two tests, but runs them only for the configs that it
knows by name; here these names are ours. The plugin fills in the configs.
"""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from . import testing_common
from .test_decoder_models import PEFT_DECODER_MODELS_TO_TEST
from .test_encoder_decoder_models import PEFT_ENCODER_DECODER_MODELS_TO_TEST
from .testing_common import PeftCommonTester


class MixedBatches(PeftCommonTester):
    """The two tests; the subclasses name the models."""

    def mixed_batch(self, model_id, config_cls, config_kwargs, monkeypatch):
        monkeypatch.setattr(testing_common, "RoadConfig", config_cls)
        self._test_mixed_adapter_batches(model_id, config_cls, config_kwargs.copy())

    def beam_search(self, model_id, config_cls, config_kwargs, monkeypatch):
        monkeypatch.setattr(testing_common, "LoraConfig", config_cls)
        self._test_generate_with_mixed_adapter_batches_and_beam_search(model_id, config_cls, config_kwargs.copy())


class TestDecoderMixedBatches(MixedBatches):
    transformers_class = AutoModelForCausalLM

    def prepare_inputs_for_testing(self):
        return {
            "input_ids": torch.tensor([[1, 1, 1], [1, 2, 1]]),
            "attention_mask": torch.tensor([[1, 1, 1], [1, 0, 1]]),
        }

    @pytest.mark.parametrize("model_id", PEFT_DECODER_MODELS_TO_TEST)
    @pytest.mark.parametrize(("config_cls", "config_kwargs"), [])
    def test_mixed_batch(self, model_id, config_cls, config_kwargs, monkeypatch):
        self.mixed_batch(model_id, config_cls, config_kwargs, monkeypatch)

    @pytest.mark.parametrize("model_id", PEFT_DECODER_MODELS_TO_TEST)
    @pytest.mark.parametrize(("config_cls", "config_kwargs"), [])
    def test_mixed_beam_search(self, model_id, config_cls, config_kwargs, monkeypatch):
        self.beam_search(model_id, config_cls, config_kwargs, monkeypatch)


class TestEncoderDecoderMixedBatches(MixedBatches):
    transformers_class = AutoModelForSeq2SeqLM

    def prepare_inputs_for_testing(self):
        return {
            "input_ids": torch.tensor([[1, 1, 1], [1, 2, 1]]),
            "decoder_input_ids": torch.tensor([[1, 1, 1], [1, 2, 1]]),
            "attention_mask": torch.tensor([[1, 1, 1], [1, 0, 1]]),
        }

    @pytest.mark.parametrize("model_id", PEFT_ENCODER_DECODER_MODELS_TO_TEST)
    @pytest.mark.parametrize(("config_cls", "config_kwargs"), [])
    def test_mixed_batch(self, model_id, config_cls, config_kwargs, monkeypatch):
        self.mixed_batch(model_id, config_cls, config_kwargs, monkeypatch)

    @pytest.mark.parametrize("model_id", PEFT_ENCODER_DECODER_MODELS_TO_TEST)
    @pytest.mark.parametrize(("config_cls", "config_kwargs"), [])
    def test_mixed_beam_search(self, model_id, config_cls, config_kwargs, monkeypatch):
        self.beam_search(model_id, config_cls, config_kwargs, monkeypatch)
