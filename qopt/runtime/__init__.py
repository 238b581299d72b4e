"""What a stock runtime does with a file: packed ONNX patterns, ONNX Runtime sessions, fused kernels, latency."""
