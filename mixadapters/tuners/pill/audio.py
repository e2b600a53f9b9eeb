"""Sounds for models of text: a frozen audio encoder, and a projector into the embeddings.

    audio = AudioInputs.attach(model, encoder)
    config = PILLConfig(modalities=["text", "audio"], token_ids=audio.token_ids, modules_to_save=["projector"])
    model = get_peft_model(model, config)
    collator = AudioTextCollator(tokenizer, feature_extractor, audio.token_id, audio.tokens_per_clip)

As one of `modules_to_save` the projector is trained, saved and loaded with the adapter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixadapters.core.fields import LARGEST, check_integer
from mixadapters.core.sites import hidden_size_of
from mixadapters.tuners.pill.inputs import EncodedInputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class AudioInputs(EncodedInputs):
    """Puts projected sounds in the place of placeholder tokens. `attach` makes it a part of a model.

    The model's forward then takes `input_features`: the clips of all rows, in the order of their placeholders, any
    number per row, as the encoder's feature extractor gives them; (A, S) samples or (A, mel, frames). With
    `feature_attention_mask` (A, S) or (A, frames), 1 where a clip is no padding, each clip is as alone. What the
    encoder makes of a clip, of whatever length, is averaged to `tokens` stretches of equal length. The encoder is
    frozen, moves with the model, and is not among the model's weights. While training, a batch without sounds gives
    the projector gradients of zero, not None.

    Args:
        model: takes embeddings (B, T, d).
        encoder: an audio model of transformers that gives a state per stretch of time (the encoder of Whisper,
            wav2vec 2.0, HuBERT, WavLM, w2v-BERT ...).
        token_id: the placeholder. None: the first id behind the model's vocabulary, so that no table has to grow.
        tokens: how many stand for a clip.
        projector: (..., width of the encoder) -> (..., d). None: a linear map without bias.
    """

    attribute, modality, medium = "audio", "audio", "sounds"
    takes = ("input_features", "feature_attention_mask")

    def __init__(
        self, model: PreTrainedModel, encoder: PreTrainedModel, token_id: int | None = None, tokens: int = 8,
        projector: nn.Module | None = None,
    ) -> None:  # fmt: skip
        name, config = str(encoder.main_input_name), encoder.config
        width, listens = hidden_size_of(config), name in ("input_features", "input_values")
        if width is None or not listens or hasattr(encoder, "decoder") or hasattr(config, "patch_size"):
            raise ValueError(
                f"encoder={type(encoder).__name__} is no audio encoder that gives a state per stretch of time, such "
                "as Wav2Vec2Model; of a model of two stacks, such as Whisper, give the encoder: model.get_encoder()"
            )
        check_integer("tokens", tokens, least=1, most=LARGEST)
        super().__init__(model, encoder, width=width, tokens=tokens, token_id=token_id, projector=projector)
        self.name = name

    @property
    def tokens_per_clip(self) -> int:
        return self.tokens

    def states(self, *given: Any) -> Tensor:
        return self.encode(*given)

    @torch.no_grad()
    def encode(self, input_features: Tensor, feature_attention_mask: Tensor | None = None) -> Tensor:
        """input_features (A, S) or (A, mel, frames), feature_attention_mask (A, S) or (A, frames), or None
        -> (A, tokens_per_clip, width of the encoder).

        Raises:
            ValueError: a mask of another shape than the features, or a clip without a sound.
        """
        weight = next(self.encoder.parameters())
        features = input_features.to(weight.device, weight.dtype)
        if feature_attention_mask is None:
            return self._averaged(self._run(features))
        mask = feature_attention_mask.to(weight.device).bool()
        padded = hasattr(self.encoder.config, "max_source_positions")  # Whisper's read so many frames, always
        time = features.dim() - 1 if padded else 1
        if mask.shape != (features.shape[0], features.shape[time]):
            raise ValueError(
                f"feature_attention_mask {tuple(mask.shape)} does not fit input_features {tuple(features.shape)}; "
                "give both as the feature extractor made them, the mask (clips, time)"
            )
        lengths = mask.sum(1)
        if silent := (lengths == 0).nonzero().flatten().tolist():
            raise ValueError(
                f"feature_attention_mask leaves nothing of clips {silent}; leave them out, with their placeholders"
            )
        if not padded:  # norms over time and convolutions would see the padding, so each clip goes alone
            alone = (self._run(clip[valid][None]) for clip, valid in zip(features, mask, strict=True))
            return torch.cat([self._averaged(states) for states in alone])
        states = self._run(features)
        kept = (states.shape[1] * lengths / mask.shape[1]).ceil().long().tolist()
        return torch.cat([self._averaged(one[None, :n]) for one, n in zip(states, kept, strict=True)])

    def _run(self, features: Tensor) -> Tensor:
        return self.encoder(**{self.name: features}).last_hidden_state

    def _averaged(self, states: Tensor) -> Tensor:
        """(A, S, width) -> (A, tokens, width)."""
        return F.adaptive_avg_pool1d(states.transpose(1, 2), self.tokens).transpose(1, 2)
