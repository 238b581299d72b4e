"""qopt: a quantization compiler with robustness-aware search."""

from __future__ import annotations

from qopt._version import __version__

__all__ = ["__version__"]
