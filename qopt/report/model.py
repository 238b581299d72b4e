"""The report as data. Every view is drawn from it, so that they cannot disagree; times live in the manifest."""

from __future__ import annotations

from typing import Literal, final

from pydantic import Field

from qopt.documents import Document, read
from qopt.errors import UsageError

SCHEMA: Literal[1] = 1
"""The version of the file format; a reader refuses any other."""


@final
class ModelFacts(Document):
    """The network that went in."""

    name: str
    digest: str
    input: str
    input_shape: list[int]
    classes: int
    batch: int | None
    layers: int
    weights: int
    notes: list[str]


@final
class DataFacts(Document):
    """The images that were used, by part."""

    digest: str
    calibrate: int
    select: int
    report: int
    attacked: int
    notes: list[str]


@final
class LayerRow(Document):
    """One layer: its format, why, and what it does. Norms are upper ends of sound bounds on the reshaped matrix.

    ``worst_pair_sum`` is the largest |sum of two products| of neighbouring codes along the reduction; above 32767 it
    saturates on x86 without VNNI. None where no integer kernel adds products in pairs.
    """

    name: str
    op: str
    shape: list[int]
    format: str
    bits: int
    container_bits: int | float
    norm_w: float
    norm_wq: float
    norm_dw: float
    row_norm_w: float
    row_norm_dw: float
    macs: int
    integer: bool
    reason: str
    worst_pair_sum: int | None = None

    @property
    def shown_format(self) -> str:
        """The format as tables show it: of rows only the word, since ``reason`` counts them."""
        return self.format.partition("(")[0]


@final
class ActivationRow(Document):
    """One activation tensor with the codes it got."""

    tensor: str
    format: str
    low: float
    high: float
    scale: float
    zero_point: int


@final
class EvaluatedPlan(Document):
    """One plan that was measured on the select images: mean KL divergence from float's clean predictions, in nats.

    The adversarial one is the largest over examples made on float, on the plan itself and on the plans beside it. Drops
    are points of accuracy lost against float in the finals, on more of the select images; None where it was not there.
    """

    name: str
    digest: str
    code_bits: float
    bias_correction: bool
    clean_divergence: float
    adversarial_divergence: float | None
    chosen: bool
    clean_drop: float | None = None
    robust_drop: float | None = None


@final
class MeasuredPlan(Document):
    """One plan that search or selection measured, as all of them were: a point of the trade-off.

    Divergences as of `EvaluatedPlan`, the robust one on examples made on float and on the plan itself. ``front``: no
    other plan has less of bits, clean or robust divergence without more of another; ``knee`` is the point of the front
    nearest to having the least of each.
    """

    code_bits: float
    bytes: int
    clean: float
    robust: float | None
    front: bool
    knee: bool
    chosen: bool


@final
class SearchFacts(Document):
    """How the plan was found."""

    strategy: str
    sensitivity: str
    thresholds: str
    factor: float
    relaxed: list[str]
    gap: float | None
    evaluated: list[EvaluatedPlan]
    notes: list[str]
    measured: list[MeasuredPlan] = Field(default_factory=list)


@final
class SizeFacts(Document):
    """Bytes of the files and the two measures of size."""

    float_bytes: int
    file_bytes: int
    ratio: float
    code_bits: float
    stored_bits: float


@final
class Share(Document):
    """An accuracy in percent with its 95 % Wilson interval, on ``n`` images."""

    value: float
    low: float
    high: float
    n: int


@final
class Drop(Document):
    """Float minus this network on the same images, in points, with its paired standard error and 95 % interval."""

    value: float
    standard_error: float
    low: float
    high: float
    n: int


@final
class Row(Document):
    """One network under attack.

    Attributes:
        name: what it is.
        code_bits: average container bits of a weight.
        clean: accuracy on all report images.
        attacked: accuracy under each attack, by its name; ``transfer`` is made on the float network.
        robust: the per-example worst over clean and all attacks.
        clean_drop: against float; None for float itself.
        robust_drop: against float.
        masking: verdict of the masking rules, or ``not checked``.
        note: what the reader must know of it.
    """

    name: str
    code_bits: float
    clean: Share
    attacked: dict[str, Share] = Field(default_factory=dict)
    robust: Share | None = None
    clean_drop: Drop | None = None
    robust_drop: Drop | None = None
    masking: Literal["none", "masked", "not checked"] = "not checked"
    note: str = ""


@final
class SweepPoint(Document):
    """Accuracy under PGD within ``eps``, which is 0 for clean images."""

    eps: float
    accuracy: Share


@final
class SweepLine(Document):
    """One network's accuracy against the radius of the attack, growing; on a part of the report images."""

    network: str
    points: list[SweepPoint]


@final
class LayerErrors(Document):
    """How far the output of one layer is from what it should be, relative to its size: the mean over images.

    ``||A - A_adv|| / ||A||`` (Lin, Gan, Han 2019, eq. 4) of an image's output A against that of the adversarial image
    made from it, in the float network (``attack_float``) and in the chosen one (``attack``); ``||A - A_q|| / ||A||`` of
    float's output against the chosen network's, on clean images (``clean``) and on adversarial ones (``attacked``).
    None where nothing was attacked, or where every A is zero.
    """

    layer: str
    attack_float: float | None
    attack: float | None
    clean: float | None
    attacked: float | None


@final
class ErrorAmplification(Document):
    """Errors along the network, layer by layer in its order, on the first ``images`` of the report images.

    Adversarial images are those that PGD made on the float network; all networks look at the same.
    """

    images: int
    layers: list[LayerErrors]


@final
class Transfers(Document):
    """The networks of the table against each other, on the first ``images`` of the attacked ones.

    Attributes:
        images: how many.
        networks: their names, in the order of rows and columns.
        clean: share of the clean images that each gets wrong, in percent.
        fooled: share of the PGD examples made on the network of the row that the network of the column gets wrong, in
            percent; images that the former gets wrong from the start are left as they are.
        cosines: mean cosine between the gradients of two networks' losses on clean images, in [-1, 1]; on the diagonal
            the share of images whose gradient is neither zero nor infinite.
    """

    images: int
    networks: list[str]
    clean: list[float]
    fooled: list[list[float]]
    cosines: list[list[float]]


@final
class MaskingRow(Document):
    """One masking rule on one network."""

    network: str
    rule: str
    triggered: bool
    text: str


@final
class GateRow(Document):
    """One gate: what was demanded, what was found (the upper end of its interval) and whether it holds."""

    gate: str
    found: str
    holds: bool


@final
class LimitRow(Document):
    """One limit on the plan: what it takes on one machine, in the limit's unit, and whether that is within.

    ``machine`` is the cost model; ``stored`` for bits and bytes of weights, ``calculus`` for the Lipschitz constant.
    """

    limit: str
    machine: str
    value: float
    bound: float
    found: str
    holds: bool


@final
class KernelFacts(Document):
    """Convolutions and matrix products by the kind of kernel that ONNX Runtime gives them on this machine.

    Attributes:
        agreement: share of the report images of which file and quantized graph predict the same class.
        difference: how far the file's outputs, in a fresh process, are from those of the quantized graph, relative;
            None where that was not compared.
    """

    integer: int
    floating: int
    counts: dict[str, int]
    agreement: float | None = None
    difference: float | None = None


@final
class Report(Document):
    """Everything a run found out.

    Attributes:
        schema_: the format version (key ``schema``).
        verdict: one sentence.
        robust_accuracy: of the emitted file in percent, or None where nothing was attacked.
    """

    schema_: Literal[1] = Field(default=SCHEMA, alias="schema")
    verdict: str
    robust_accuracy: float | None
    target: str
    command: str
    seed: int
    threat: str | None
    model: ModelFacts
    data: DataFacts | None
    search: SearchFacts
    layers: list[LayerRow]
    activations: list[ActivationRow]
    size: SizeFacts
    kernels: KernelFacts
    rows: list[Row]
    sweep: list[SweepLine] = Field(default_factory=list)
    amplification: ErrorAmplification | None = None
    transfers: Transfers | None = None
    masking: list[MaskingRow]
    gates: list[GateRow]
    limits: list[LimitRow] = Field(default_factory=list)
    left_out: list[str]
    warnings: list[str]

    @property
    def gates_hold(self) -> bool:
        """Whether every gate holds."""
        return all(gate.holds for gate in self.gates)

    @property
    def limits_hold(self) -> bool:
        """Whether every limit holds."""
        return all(limit.holds for limit in self.limits)

    @staticmethod
    def from_json(text: str, where: str = "report") -> Report:
        """Parse a report; raises UsageError naming ``where`` and the first thing wrong."""
        return read(Report, text, where, UsageError)

    def to_json(self) -> str:
        """Two-space JSON in the order of the fields, ending in a newline; equal runs give equal bytes."""
        return self.model_dump_json(by_alias=True, indent=2) + "\n"
