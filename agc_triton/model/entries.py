"""A model's parameters under all their names, the same whatever wraps the model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

from torch import nn
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.parametrize import ParametrizationList

DATA_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)

# Where torch.compile, activation checkpointing and FSDP1 keep the module that they wrap.
_INNER = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}


@dataclass(frozen=True)
class Entry:
    """A parameter, every name it has and all modules around it under any of them.

    ``layer`` and ``tensor`` (such as "weight") say what it is under the first name; ``paths`` are
    the names and those of all modules around them: what patterns are matched with.
    """

    param: nn.Parameter
    layer: nn.Module
    tensor: str
    names: list[str]
    around: list[nn.Module]

    @property
    def paths(self) -> list[str]:
        """Every name, followed by those of the modules around it."""
        return [name.rsplit(".", n)[0] for name in self.names for n in range(name.count(".") + 1)]


def entries_of(model: nn.Module) -> list[Entry]:
    """All parameters, frozen ones too, in the order of ``model.named_parameters()``."""
    found: dict[int, Entry] = {}
    for name, chain in named_chains(model):
        module = chain[-1]
        for tensor, param in module._parameters.items():
            if param is None:
                continue
            layer, role = module, tensor
            if isinstance(module, ParametrizationList):  # LAYER.parametrizations.TENSOR
                layer, role = chain[-3], _role(module, name.rpartition(".")[2], tensor)
            entry = found.setdefault(id(param), Entry(param, layer, role, [], []))
            entry.names.append(f"{name}.{tensor}" if name else tensor)
            entry.around.extend(chain)
    return list(found.values())


def show_sharded(model: nn.Module) -> None:
    """Have FSDP's modules show the parameters to optimize, not those gathered by a forward pass."""
    for module in model.modules():
        # By name, as importing it takes a second.
        if any(base.__name__ == "FSDPModule" for base in type(module).__mro__):
            cast(Any, module).reshard()


def named_chains(model: nn.Module) -> Iterator[tuple[str, list[nn.Module]]]:
    """Each module as the last of those around it, from the model on, under each of its names.

    Names are those in the model as it was before it was wrapped.
    """
    known: dict[str, tuple[list[str], list[nn.Module]]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        outer, _, part = path.rpartition(".")
        parts, chain = known[outer] if path else ([], [])
        wrapped = part in _INNER or (part == "module" and isinstance(chain[-1], DATA_PARALLEL))
        known[path] = (parts if wrapped or not path else [*parts, part]), [*chain, module]
        yield ".".join(known[path][0]), known[path][1]


def _role(parametrizations: ParametrizationList, tensor: str, stored: str) -> str:
    """What a stored tensor is to its layer; of weight norm's two as the older form names them."""
    if stored == "original":
        return tensor
    if isinstance(parametrizations[0], _WeightNorm):
        return f"{tensor}_g" if stored == "original0" else f"{tensor}_v"
    return f"{tensor}.{stored}"
