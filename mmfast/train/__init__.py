"""The training loop: checkpoints, averaged weights, logs, many processes."""
