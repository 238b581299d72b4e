"""Models in: loading, the prepared ONNX graph (the truth) and its torch.fx twin."""
