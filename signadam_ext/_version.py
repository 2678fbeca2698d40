"""The version, which setup.py takes from git's tags and builds into the module."""

from .core.native import compiled

__version__: str = compiled.build_info()["version"]
