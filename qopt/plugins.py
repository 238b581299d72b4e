"""One table for everything that can be plugged in: built-in names and entry points, loaded when first used."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, final

from qopt.errors import PluginError, UsageError, nearest

BUILT_IN: dict[str, dict[str, str]] = {
    "qopt.cost_models": {
        "arm-dotprod": "qopt.hardware.arm_dotprod:ArmDotprod",
        "bits": "qopt.hardware.bits:BitsModel",
        "bops": "qopt.hardware.bops:BopsModel",
        "cortex-m7": "qopt.hardware.cortex_m:CortexM7",
        "energy-45nm": "qopt.hardware.energy_45nm:Energy45nm",
        "fpga-dsp48e2": "qopt.hardware.fpga:FpgaDsp48e2",
        "measured:host": "qopt.hardware.measured:MeasuredHost",
        "nvidia-ampere": "qopt.hardware.nvidia:NvidiaAmpere",
        "nvidia-turing": "qopt.hardware.nvidia:NvidiaTuring",
        "stm32f4": "qopt.hardware.cortex_m:Stm32F4",
        "x86-avx2": "qopt.hardware.x86:X86Avx2",
        "x86-avx512-vnni": "qopt.hardware.x86:X86Avx512Vnni",
    },
    "qopt.searches": {
        "exact": "qopt.search.exact:ExactSearch",
        "greedy": "qopt.search.greedy:GreedySearch",
        "lipschitz": "qopt.search.lipschitz:LipschitzSearch",
        "optuna": "qopt.search.tuned:OptunaSearch",
        "quanos": "qopt.search.quanos:QuanosSearch",
        "refit": "qopt.search.refit:RefitSearch",
        "uniform": "qopt.search.uniform:UniformSearch",
    },
    "qopt.attacks": {"fgsm": "qopt.attacks:FGSM", "pgd": "qopt.attacks:PGD"},
    "qopt.passes": {
        "annotate": "qopt.passes.annotate:Annotate",
        "canonicalise-linear": "qopt.passes.canonicalise_linear:CanonicaliseLinear",
        "fold-weights": "qopt.passes.fold_weights:FoldWeights",
        "unshare": "qopt.passes.unshare:Unshare",
    },
    "qopt.quantizers": {
        "binary": "qopt.quant.few_levels:Binary",
        "linear": "qopt.quant.linear:Linear",
        "log": "qopt.quant.logarithmic:Logarithmic",
        "ternary": "qopt.quant.few_levels:Ternary",
    },
}
"""Entry-point group to built-in name to ``module:attribute``."""


@final
@dataclass(frozen=True)
class Plugin:
    """One name in the table: where it comes from and, after a failed load, why it failed."""

    group: str
    name: str
    target: str
    origin: str
    error: str | None = None

    def load(self) -> Any:
        """The class or object; raises PluginError naming the plugin and what its import raised."""
        try:
            return EntryPoint(self.name, self.target, self.group).load()
        except (Exception, SystemExit) as error:  # the import runs somebody else's code
            raise PluginError(
                "the plugin does not load", where=f"{self.group} {self.name} from {self.origin}",
                got=f"{type(error).__name__}: {error}",
            ) from error  # fmt: skip


def plugins(group: str) -> dict[str, Plugin]:
    """Every plugin of ``group`` by name, sorted; raises PluginError where two packages claim one name."""
    table = {name: Plugin(group, name, target, "qopt") for name, target in BUILT_IN.get(group, {}).items()}
    for point in entry_points(group=group):
        origin = _origin(point)
        if point.name in table:
            raise PluginError(
                "two plugins have the same name", where=f"{group} {point.name}",
                got=f"{table[point.name].origin} and {origin}", fix="uninstall one of them",
            )  # fmt: skip
        table[point.name] = Plugin(group, point.name, point.value, origin)
    return dict(sorted(table.items()))


def load(group: str, name: str, where: str) -> Any:
    """The plugin called ``name``; raises UsageError at ``where`` that offers the nearest names."""
    table = plugins(group)
    if name not in table:
        raise UsageError("unknown name", where=where, got=repr(name), fix=nearest(name, table))
    return table[name].load()


def checked(plugin: Plugin) -> Plugin:
    """The plugin with ``error`` set where it does not load; for listings."""
    try:
        plugin.load()
    except PluginError as error:
        return Plugin(plugin.group, plugin.name, plugin.target, plugin.origin, str(error))
    return plugin


def _origin(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist is not None else "unknown package"
