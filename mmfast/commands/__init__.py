"""The commands of ``mmfast``, one file each, and beside them what several share.

A command's module has its name, ``add_arguments(parser)`` and ``run(given) -> int``, the exit
status. It is imported only when its command is given. ``run`` raises :class:`CommandError` for what
is the user's to mend: it is printed as one line, without a traceback, and the status is 1.
"""

COMMANDS = {
    "info": "show versions, devices, and which backend runs each op here and why",
    "train": "train a VQ-VAE or a diffusion transformer",
    "bench": "compare a few ops with plain PyTorch, or run the repository's benchmarks",
    "reconstruct": "show files beside what a VQVAE makes of them",
    "sample": "draw samples from a DiT",
    "compress": "write a picture, video or sound as the codes of a VQVAE",
    "decompress": "the way back of compress",
    "evaluate": "measure a VQVAE or a DiT on data",
}

INTERRUPTED = 130
"""The exit status of programs that Ctrl-C ended."""


class CommandError(Exception):
    """A failure that the user can mend; the message says what and how."""
