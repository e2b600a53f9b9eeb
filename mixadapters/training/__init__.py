"""Trainer callbacks, objectives and collators."""
