"""The Triton backend. Imported when a problem on a GPU first asks for it: a CPU needs no triton."""

from mixadapters.kernels.triton.backend import backward, forward, keeps, refuses

__all__ = ["backward", "forward", "keeps", "refuses"]
