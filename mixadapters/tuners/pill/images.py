"""Images for models of text: a frozen vision encoder, and a projector into the embeddings.

    images = ImageInputs.attach(model, encoder)
    model = get_peft_model(model, PILLConfig(token_ids=images.token_ids, modules_to_save=["projector"]))
    collator = ImageTextCollator(tokenizer, processor, images.token_id, images.tokens_per_image)

As one of `modules_to_save` the projector is trained, saved and loaded with the adapter.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixadapters.core.fields import LARGEST, fits

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTRIBUTE = "images"  # of the model that takes them


class ImageInputs(nn.Module):
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

    def __init__(
        self, model: PreTrainedModel, encoder: PreTrainedModel, token_id: int | None = None, grid: int | None = None,
        layer: int = -1, projector: nn.Module | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        config = encoder.config
        if not isinstance(getattr(config, "image_size", None), int) or not hasattr(config, "patch_size"):
            raise ValueError(
                f"encoder={type(encoder).__name__} is no vision encoder with an image_size and a patch_size; give the "
                "vision part of a model of two, such as model.vision_model"
            )
        self.side = config.image_size // config.patch_size
        layers = getattr(config, "num_hidden_layers", None)
        depth = layers if isinstance(layers, int) else LARGEST
        for name, value, least, most in (
            ("grid", grid, 1, self.side), ("token_id", token_id, 0, LARGEST), ("layer", layer, -1 - depth, depth),
        ):  # fmt: skip
            if value is not None and not (fits(value, int) and least <= value <= most):
                raise ValueError(f"{name}={value!r} must be an integer from {least} to {most}")
        self.grid, self.layer = grid or self.side, layer
        table = model.get_input_embeddings()
        self.token_id = table.num_embeddings if token_id is None else token_id
        self.__dict__["model"] = model  # not a child: it is the parent
        self.__dict__["encoder"] = encoder.requires_grad_(False).eval()
        if projector is None:
            weight = table.weight
            projector = nn.Linear(
                config.hidden_size, table.embedding_dim, bias=False, device=weight.device,
                dtype=weight.dtype if weight.is_floating_point() else None,
            )  # fmt: skip
            nn.init.normal_(projector.weight, std=0.02)
        self.projector = projector

    @classmethod
    def attach(cls, model: PreTrainedModel, encoder: PreTrainedModel, **options: Any) -> ImageInputs:
        """Make `model` take images; see the class. Raises ValueError where it does already."""
        if hasattr(model, ATTRIBUTE):
            raise ValueError(f"{type(model).__name__} has a module {ATTRIBUTE!r} already")
        images = cls(model, encoder, **options)
        model.add_module(ATTRIBUTE, images)
        model.register_forward_pre_hook(images.before, with_kwargs=True)
        return images

    @property
    def tokens_per_image(self) -> int:
        return self.grid * self.grid

    @property
    def token_ids(self) -> dict[str, list[int]]:
        """For configs: the tokens that stand for images."""
        return {"image": [self.token_id]}

    def _apply(self, fn: Any, recurse: bool = True) -> ImageInputs:
        self.encoder._apply(fn)
        return super()._apply(fn, recurse)

    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        kwargs = {**dict(zip(inspect.signature(module.forward).parameters, args, strict=False)), **kwargs}
        pixel_values, ids = kwargs.pop("pixel_values", None), kwargs.get("input_ids")
        if ids is None:
            if pixel_values is not None:
                raise ValueError("pixel_values need input_ids, whose placeholders say where the images go")
        elif pixel_values is not None or (self.training and torch.is_grad_enabled()) or self._places(ids).any():
            kwargs |= {"input_ids": None, "inputs_embeds": self.embed(ids, pixel_values)}
        return (), kwargs

    def _places(self, ids: Tensor) -> Tensor:
        return ids == self.token_id

    def embed(self, input_ids: Tensor, pixel_values: Tensor | None = None) -> Tensor:
        """input_ids (B, T), pixel_values (I, 3, H, W) -> embeddings (B, T, d).

        Raises:
            ValueError: there are more or fewer placeholders than tokens of images, or a row ends inside an image.
        """
        places = self._places(input_ids)
        embeddings = self.model.get_input_embeddings()(input_ids.masked_fill(places, 0))
        like = next(self.projector.parameters())
        if pixel_values is None:
            states = like.new_zeros(0, self.tokens_per_image, self.encoder.config.hidden_size)
        else:
            states = self.encode(pixel_values).to(like.dtype)
        per_row = places.sum(1)
        if (per_row % self.tokens_per_image).any() or int(per_row.sum()) != states.shape[0] * self.tokens_per_image:
            raise ValueError(
                f"rows with {per_row.tolist()} placeholders (token {self.token_id}) do not fit {states.shape[0]} "
                f"images of {self.tokens_per_image} tokens each"
            )
        tokens = self.projector(states).flatten(0, 1).to(embeddings.dtype)
        return embeddings.index_put(places.nonzero(as_tuple=True), tokens)

    @torch.no_grad()
    def encode(self, pixel_values: Tensor) -> Tensor:
        """pixel_values (I, 3, H, W) -> (I, tokens_per_image, width of the encoder)."""
        size = self.encoder.config.image_size
        if pixel_values.shape[-2:] != (size, size):
            raise ValueError(
                f"pixel_values {tuple(pixel_values.shape)} must be {size} x {size}; use the encoder's own image "
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

    @torch.no_grad()
    def inputs(self, input_ids: Tensor, pixel_values: Tensor | None = None, **others: Any) -> dict[str, Any]:
        """The arguments of `generate` for such a batch: it takes embeddings and what each token is, but no images."""
        types = self._places(input_ids).long()
        return {**others, "inputs_embeds": self.embed(input_ids, pixel_values), "mm_token_type_ids": types}
