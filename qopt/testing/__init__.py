"""Contract suites for plugins: plain assertions, to be called from whatever test runner an author uses."""

from qopt.testing.cost_models import FORMATS, LAYERS, cost_model_contract

__all__ = ["FORMATS", "LAYERS", "cost_model_contract"]
