"""diffusers: the activations of its feed-forwards, which split and gate in one pass."""

from __future__ import annotations
