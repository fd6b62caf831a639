"""Triton code that the families share."""
