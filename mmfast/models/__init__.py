"""Whole models made of mmfast's modules."""

from mmfast.models.dit import DiT

__all__ = ["DiT"]
