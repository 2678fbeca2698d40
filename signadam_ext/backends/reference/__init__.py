"""The rules in torch operations, and the backend that runs them; the other backends are held against it."""

from .backend import ReferenceBackend

__all__ = ["ReferenceBackend"]
