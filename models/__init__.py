"""Reference systems, installed as ``mmfuse.models``: short PyTorch models that take the official weights."""

from mmfuse.models.registry import create, list, load_dense, load_official, to_official

__all__ = ["create", "list", "load_dense", "load_official", "to_official"]
