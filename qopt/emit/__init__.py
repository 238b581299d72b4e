"""The emitter: it edits the prepared ONNX graph and leaves everything it need not touch alone."""

from qopt.emit.editor import emit

__all__ = ["emit"]
