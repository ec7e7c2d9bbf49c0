"""A small classifier of signals, images and videos, to judge samples by."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from mmfast.checks import check_least
from mmfast.models.configured import Configured
from mmfast.models.convolutions import Downsample, ResidualBlock, convolution


class Classifier(Configured):
    """Residual convolutions, the mean over all places, and a linear layer.

    Args:
        num_classes: of the labels.
        channels: of the data.
        spatial_dims: 1 for audio, 2 for images, 3 for videos.
        widths: channels of each level; each level after the first halves all sizes.
        dropout: before the linear layer.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        channels: int = 3,
        spatial_dims: int = 2,
        widths: Sequence[int] = (16, 32, 64),
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        check_least(1, num_classes=num_classes, channels=channels)
        self.num_classes, self.channels, self.spatial_dims = num_classes, channels, spatial_dims
        width = widths[0]
        layers: list[nn.Module] = [convolution(spatial_dims, channels, width)]
        for wider in widths:
            layers += [ResidualBlock(spatial_dims, width, wider), Downsample(spatial_dims, wider)]
            width = wider
        self.body = nn.Sequential(*layers)
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(B, num_classes)`` of x ``(B, channels, *sizes)``."""
        features = self.body(x).flatten(2).mean(2)
        return self.head(self.dropout(self.norm(features)))
