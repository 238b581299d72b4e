"""Networks from the user's own code: ``package.module:name`` names a factory, a state dict fills what it builds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, final

import torch
from torch import nn

from qopt.errors import CorruptModelError, UsageError, nearest
from qopt.factories import call

OPTION: Final = "--model"
_WRAPPERS = ("state_dict", "model_state_dict", "model", "net")
"""Keys under which training scripts keep the state dict in a checkpoint."""

_PREFIXES = ("module.", "_orig_mod.")
"""What DataParallel and torch.compile put before every name."""


@final
class Built:
    """What a factory returned: the module, and example arguments of its forward() if it gave some."""

    def __init__(self, module: nn.Module, example: tuple[Any, ...] | None) -> None:
        self.module, self.example = module, example


def build(factory: str) -> Built:
    """Call the factory ``package.module:name`` without arguments; modules beside the current directory are found.

    The code behind the name is the user's and is trusted. Its prints go to stderr.

    Raises:
        UsageError: no such module or name, not callable, it raised, or it returned neither a module nor a tuple
            ``(module, example_inputs)``.
    """
    result = call(factory, OPTION)
    example: object = None
    if isinstance(result, tuple) and len(result) == 2:
        result, example = result
    if not isinstance(result, nn.Module):
        raise UsageError(
            "the factory returned no model", where=f"{OPTION} {factory}",
            expected="an nn.Module or (nn.Module, example_inputs)", got=type(result).__name__,
        )  # fmt: skip
    if example is None:
        return Built(result, None)
    inputs = example if isinstance(example, tuple) else (example,)
    if not all(isinstance(item, torch.Tensor) for item in inputs) or not inputs:
        raise UsageError(
            "the factory's example inputs are no tensors", where=f"{OPTION} {factory}",
            expected="a tensor or a tuple of tensors", got=str([type(item).__name__ for item in inputs]),
        )  # fmt: skip
    return Built(result, inputs)


def fill(built: Built, state: Mapping[str, torch.Tensor], where: str, *, adopt: bool = False) -> list[str]:
    """Load ``state`` into the module, strictly; returns notes.

    A factory that loaded these very weights itself, under whatever names, is left as it is. With ``adopt`` the module
    takes the tensors themselves where it can, and its own are freed; it must not be trained then.

    Raises UsageError naming missing and unexpected keys with the nearest ones, or tensors of another shape.
    """
    own = built.module.state_dict()
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or unexpected:
        if _holds(own, state):
            return ["the factory had loaded the weights itself"]
        raise UsageError(
            "the weights do not fit the factory's module", where=where,
            got=", ".join(filter(None, [_listed("missing", missing), _listed("unexpected", unexpected)])),
            fix=nearest(unexpected[0], missing) if unexpected and missing else None,
        )  # fmt: skip
    for key, tensor in state.items():
        if tensor.shape != own[key].shape:
            raise UsageError(
                "a tensor does not fit the factory's module", where=f"{where}: {key}",
                expected=str(tuple(own[key].shape)), got=str(tuple(tensor.shape)),
            )  # fmt: skip
    try:
        if adopt and _loads_plainly(built.module):
            _adopt(built.module, state)
        else:
            built.module.load_state_dict(dict(state), strict=True)
    except Exception as error:  # a module may override loading with code of its own
        raise UsageError(
            "the module refused the weights", where=where, got=f"{type(error).__name__}: {error}"[:200]
        ) from error
    return []


def _loads_plainly(module: nn.Module) -> bool:
    """Whether no part of the module does something of its own when a state dict is loaded; torch's parts do not."""
    ways = ("_load_from_state_dict", "load_state_dict", "set_extra_state")
    return not any(
        part._load_state_dict_pre_hooks
        or part._load_state_dict_post_hooks
        or any(not getattr(type(part), way).__module__.startswith("torch.nn.") for way in ways)
        for part in module.modules()
    )


def _adopt(module: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Let every parameter and buffer be the tensor of its name; tied ones stay tied, the last name counts."""
    for key, own in module.state_dict(keep_vars=True).items():
        if own.dtype == state[key].dtype and own.layout == state[key].layout:
            own.data = state[key]
        else:
            own.data.copy_(state[key])


def unwrap(checkpoint: object, where: str) -> dict[str, torch.Tensor]:
    """The state dict in what torch.load returned: wrappers of training scripts and name prefixes are taken off.

    Raises CorruptModelError where there is none.
    """
    candidates = [checkpoint]
    if isinstance(checkpoint, Mapping):
        candidates += [checkpoint[key] for key in _WRAPPERS if isinstance(checkpoint.get(key), Mapping)]
    for candidate in candidates:
        if isinstance(candidate, Mapping) and candidate and all(_is_entry(*item) for item in candidate.items()):
            return _without_prefix(dict(candidate))
    keys = ", ".join(map(str, list(checkpoint)[:5])) if isinstance(checkpoint, Mapping) else ""
    raise CorruptModelError(
        "the file holds no state dict", where=where,
        expected="names to tensors, or such a mapping under " + ", ".join(_WRAPPERS),
        got=f"a {type(checkpoint).__name__}" + (f" with the keys {keys}" if keys else ""),
    )  # fmt: skip


def _is_entry(key: object, value: object) -> bool:
    return isinstance(key, str) and isinstance(value, torch.Tensor)


def _without_prefix(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    for prefix in _PREFIXES:
        if all(key.startswith(prefix) for key in state):
            return _without_prefix({key.removeprefix(prefix): value for key, value in state.items()})
    return state


def _holds(own: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> bool:
    """Whether every tensor of ``state`` is among ``own``, bit by bit."""
    return all(
        any(
            mine.shape == tensor.shape and mine.dtype == tensor.dtype and torch.equal(mine, tensor)
            for mine in own.values()
        )
        for tensor in state.values()
    )


def _listed(what: str, keys: list[str]) -> str:
    if not keys:
        return ""
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return f"{what} {', '.join(keys[:3])}{more}"
