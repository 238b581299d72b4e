"""The emitter: it edits the prepared ONNX graph and leaves everything it need not touch alone."""

from qopt.emit.dequantized import check_weight_only, dequantized
from qopt.emit.editor import emit
from qopt.emit.integer import integer_layers, integer_parts, runs_on_integers

__all__ = ["check_weight_only", "dequantized", "emit", "integer_layers", "integer_parts", "runs_on_integers"]
