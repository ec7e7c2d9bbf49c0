"""Readers of images, videos, sound and text, and datasets of them."""
