"""The former place of these names, which belong to `mixadapters.tuners.agd`."""

from mixadapters.tuners.agd import encode_prompts, record_pipeline

__all__ = ["encode_prompts", "record_pipeline"]
