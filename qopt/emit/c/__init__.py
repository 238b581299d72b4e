"""Portable C99 for microcontrollers: integers only, static memory, no allocation, nothing beyond stdint and string."""

from qopt.emit.c.program import CProgram, emit_c

__all__ = ["CProgram", "emit_c"]
