"""What costs are called and in which unit they are, in one place: models, limits and solver all mean the same.

- ``code_bits``, bit: codes of the weights
- ``bytes``, B: codes, scales and zero points in the ONNX file
- ``flash``, B: program memory of a microcontroller
- ``latency``, s: one image
- ``energy``, J: one image
- ``bops``, bit operations: one image
- ``bits`` and ``stored_bits``, bit per weight: whole networks only
- ``size``, B: whole networks only, all weights, shared tables included
- ``sram``, B: whole networks only, the most that is live at once
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

ADDITIVE: Final[Mapping[str, str]] = MappingProxyType(
    {"code_bits": "bit", "bytes": "B", "flash": "B", "latency": "s", "energy": "J", "bops": "bit operations"}
)
"""Quantities that are sums over layers, to their units."""

WHOLE: Final[Mapping[str, str]] = MappingProxyType(
    {**ADDITIVE, "bits": "bit per weight", "stored_bits": "bit per weight", "size": "B", "sram": "B"}
)
"""Quantities of a whole network, to their units."""


def units(*quantities: str) -> dict[str, str]:
    """The quantities to their units, as a cost model declares them; KeyError for an unknown one."""
    return {quantity: WHOLE[quantity] for quantity in quantities}
