"""Modality experts (MoME, Multiway): an expert for each row of a stream."""
