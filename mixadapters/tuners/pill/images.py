"""Images for models of text: a frozen vision encoder, and a projector into the embeddings.

    images = ImageInputs.attach(model, encoder)
    model = get_peft_model(model, PILLConfig(token_ids=images.token_ids, modules_to_save=["projector"]))
    collator = ImageTextCollator(tokenizer, processor, images.token_id, images.tokens_per_image)

As one of `modules_to_save` the projector is trained, saved and loaded with the adapter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixadapters.core.fields import LARGEST, check_integer
from mixadapters.tuners.pill.inputs import EncodedInputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ImageInputs(EncodedInputs):
    """Puts projected images in the place of placeholder tokens. `attach` makes it a part of a model.

    The model's forward then takes `pixel_values` (I, 3, H, W): the images of all rows, in the order of their
    placeholders, any number per row. The encoder runs on these alone; it is frozen, moves with the model, and is not
    among the model's weights. While training, a batch without images gives the projector gradients of zero, not None.

    Args:
        model: takes embeddings (B, T, d).
        encoder: a vision model of transformers that gives a token per square patch (CLIP, SigLIP, ViT, DINOv2 ...).
        token_id: the placeholder. None: the first id behind the model's vocabulary, so that no table has to grow.
        grid: patches are averaged to grid x grid tokens. None: one token per patch.
        layer: which hidden state of the encoder is read; -1 is its output.
        projector: (..., width of the encoder) -> (..., d). None: a linear map without bias.
    """

    attribute, modality, medium, takes = "images", "image", "images", ("pixel_values",)

    def __init__(
        self, model: PreTrainedModel, encoder: PreTrainedModel, token_id: int | None = None, grid: int | None = None,
        layer: int = -1, projector: nn.Module | None = None,
    ) -> None:  # fmt: skip
        config = encoder.config
        if not isinstance(getattr(config, "image_size", None), int) or not hasattr(config, "patch_size"):
            raise ValueError(
                f"encoder={type(encoder).__name__} is no vision encoder with an image_size and a patch_size; give the "
                "vision part of a model of two, such as model.vision_model"
            )
        side = config.image_size // config.patch_size
        layers = getattr(config, "num_hidden_layers", None)
        depth = layers if isinstance(layers, int) else LARGEST
        if grid is not None:
            check_integer("grid", grid, least=1, most=side)
        check_integer("layer", layer, least=-1 - depth, most=depth)
        grid = grid or side
        super().__init__(
            model, encoder, width=config.hidden_size, tokens=grid * grid, token_id=token_id, projector=projector
        )
        self.side, self.grid, self.layer = side, grid, layer

    @property
    def tokens_per_image(self) -> int:
        return self.tokens

    def facts(self) -> dict[str, int]:
        return {**super().facts(), "layer": self.layer}

    def states(self, *given: Any) -> Tensor:
        return self.encode(*given)

    @torch.no_grad()
    def encode(self, pixel_values: Tensor) -> Tensor:
        """pixel_values (I, 3, H, W) -> (I, tokens_per_image, width of the encoder)."""
        size, channels = self.encoder.config.image_size, getattr(self.encoder.config, "num_channels", 3)
        if pixel_values.shape[1:] != (channels, size, size):
            raise ValueError(
                f"pixel_values {tuple(pixel_values.shape)} must be (images, {channels}, {size}, {size}), those of all "
                f"rows one after the other, with {channels} channels and {size} x {size}; use the encoder's own image "
                "processor, set to this size"
            )
        weight = next(self.encoder.parameters())
        output = self.encoder(
            pixel_values=pixel_values.to(weight.device, weight.dtype), output_hidden_states=self.layer != -1
        )
        states = output.last_hidden_state if self.layer == -1 else output.hidden_states[self.layer]
        patches = states[:, -(self.side**2) :]  # class and register tokens, if any, come first
        if self.grid == self.side:
            return patches
        planes = patches.transpose(1, 2).unflatten(2, (self.side, self.side))
        return F.adaptive_avg_pool2d(planes, self.grid).flatten(2).transpose(1, 2)
