"""The version, from the installed metadata."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("mmfast")
except PackageNotFoundError:
    __version__ = "0+unknown"
