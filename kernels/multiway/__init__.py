"""Modality experts (MoME, Multiway): an expert for each row of a stream."""

from mmfuse.kernels.multiway.routing import Routing

__all__ = ["Routing"]
