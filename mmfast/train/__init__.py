"""The training loop: checkpoints, averaged weights, logs, many processes."""

from mmfast.train.about import about_data
from mmfast.train.conditional import ConditionalTask
from mmfast.train.config import TrainConfig
from mmfast.train.context import Context
from mmfast.train.dit import DiTTask
from mmfast.train.grids import as_images, grid
from mmfast.train.logs import read_log
from mmfast.train.loop import Fit, fit
from mmfast.train.multimodal import MultimodalTask
from mmfast.train.stopping import Stopped
from mmfast.train.task import Step, Task
from mmfast.train.vqvae import VQVAETask
from mmfast.train.window import NonFiniteError

__all__ = [
    "ConditionalTask",
    "Context",
    "DiTTask",
    "Fit",
    "MultimodalTask",
    "NonFiniteError",
    "Step",
    "Stopped",
    "Task",
    "TrainConfig",
    "VQVAETask",
    "about_data",
    "as_images",
    "fit",
    "grid",
    "read_log",
]
