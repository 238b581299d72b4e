"""Measuring a quantized network: its divergence from float, its accuracy, its robustness, on twin and artefact."""
