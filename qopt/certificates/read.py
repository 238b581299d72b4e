"""From a twin to the steps of `qopt.certificates.network`."""

from __future__ import annotations

from torch.fx import GraphModule

from qopt.certificates.network import Network
from qopt.certificates.operators import handler_of
from qopt.certificates.reader import Reader


def read(twin: GraphModule, image_shape: tuple[int, ...]) -> Network:
    """The steps of ``twin``, which maps images (n, *image_shape), float32, to logits (n, classes).

    Weight quantizers must be folded (`qopt.passes.fold_weights`) or hold still; activation quantizers stay. Operators
    that bounds do not pass become `Opaque` steps; what cannot be a step at all is an error.

    Raises:
        UnsupportedModelError: the network does not run on one image alone, an operator mixes images, or the output is
            no row of numbers.
        CorruptModelError: a weight or another constant is not finite, naming it.
    """
    return Reader(twin, image_shape, handler_of).read()
