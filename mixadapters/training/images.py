"""The former place of what is now in `mixadapters.tuners.pill`, for scripts that import it from here."""

from mixadapters.tuners.pill import ImageInputs, ImageTextCollator

__all__ = ["ImageInputs", "ImageTextCollator"]
