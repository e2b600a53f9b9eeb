"""Seeing and cutting experts: those of our mixtures and those of MoE base models."""
