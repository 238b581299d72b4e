"""Fifteen architectures of `transformers` with random weights, small enough for a laptop, and inputs to export them.

``pip install qopt[architectures]``; nothing is downloaded. Weights are random, so that only shapes, operators and sizes
mean anything.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")

Build = Callable[[], tuple[nn.Module, tuple[Any, ...]]]

IMAGE = (1, 3, 224, 224)
TOKENS = (1, 16)


class Logits(nn.Module):
    """The network without the dataclass around its output."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: Tensor) -> Tensor:
        """The logits, or the last hidden state of networks without a head."""
        found = self.network(inputs)
        return found.logits if hasattr(found, "logits") else found.last_hidden_state


def _image(name: str, size: tuple[int, ...] = IMAGE, **config: Any) -> Build:
    return lambda: (_network(name, "ForImageClassification", **config), (torch.rand(size),))


def _text(name: str, head: str, **config: Any) -> Build:
    return lambda: (_network(name, head, **config), (torch.randint(0, 1000, TOKENS),))


def _network(name: str, head: str, **config: Any) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    settings = getattr(transformers, f"{name}Config")(**config)
    return Logits(getattr(transformers, f"{name}{head}")(settings)).eval()


_WIDE: dict[str, Any] = {
    "hidden_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "intermediate_size": 1536,
}
_BERT = {**_WIDE, "vocab_size": 8000}

ARCHITECTURES: dict[str, Build] = {
    "ResNet": _image(
        "ResNet", layer_type="basic", embedding_size=64, hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2]
    ),
    "MobileNetV2": _image("MobileNetV2"),
    "ConvNeXt": _image("ConvNext"),
    "ViT": _image("ViT", **_WIDE),
    "DeiT": _image("DeiT", **_WIDE),
    "Swin": _image("Swin"),
    "BERT": _text("Bert", "ForSequenceClassification", **_BERT),
    "DistilBERT": _text(
        "DistilBert", "ForSequenceClassification", dim=384, n_layers=4, n_heads=6, hidden_dim=1536, vocab_size=8000
    ),
    "ALBERT": _text("Albert", "ForSequenceClassification", **_BERT, embedding_size=128),
    "GPT-2": _text(
        "GPT2", "LMHeadModel", n_embd=384, n_layer=4, n_head=6, vocab_size=8000, bos_token_id=0, eos_token_id=0
    ),
    "Llama": _text("Llama", "ForCausalLM", **_BERT, num_key_value_heads=2),
    "SegFormer": _image("Segformer"),
    "Wav2Vec2": lambda: (
        _network("Wav2Vec2", "ForSequenceClassification", **_WIDE, conv_dim=[256] * 7),
        (torch.randn(1, 16000),),
    ),
    "EfficientNet": _image("EfficientNet"),
    "RegNet": _image("RegNet"),
}
"""Name to a function that builds the network, in eval mode, and the arguments of its forward()."""
