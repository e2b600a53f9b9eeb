"""Serving adapters and mixtures: requests that name what they want, and requests that choose."""
