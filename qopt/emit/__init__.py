"""The emitter: it edits the prepared ONNX graph and leaves everything it need not touch alone."""

from qopt.emit.dequantized import AGREES, check_structure, check_weight_only, dequantized
from qopt.emit.dialect import fused_layers
from qopt.emit.editor import emit
from qopt.emit.integer import integer_layers, integer_parts, runs_on_integers
from qopt.emit.nbits import packed_layers
from qopt.emit.opset import lower_opset
from qopt.emit.pair_sums import SATURATES, worst_pair_sums
from qopt.emit.shipped import check_shipped
from qopt.emit.weight_by_weight import check_weights

__all__ = [
    "AGREES",
    "SATURATES",
    "check_shipped",
    "check_structure",
    "check_weight_only",
    "check_weights",
    "dequantized",
    "emit",
    "fused_layers",
    "integer_layers",
    "integer_parts",
    "lower_opset",
    "packed_layers",
    "runs_on_integers",
    "worst_pair_sums",
]
