"""Families whose experts do not go through transformers' experts interface, one small file each.

A file is named after the family's folder in transformers and found by that name. Its ``ADAPTER`` stands in for some
of the family's classes while moray builds a model; transformers' own classes stay as they are. The classes that stand
in for experts are decorated with ``use_experts_implementation``, as transformers' own are.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType

from torch import nn
from transformers import PreTrainedConfig
from transformers.core_model_loading import WeightConverter


@dataclass(frozen=True, slots=True)
class Adapter:
    """What one family needs.

    ``classes``: given the family's modeling module, name -> the class to use there instead; called once.
    ``conversions``: added to transformers' conversion mapping.
    ``reshape``: given a config and a checkpoint's (key, shape), the shape to see the tensor as, so that its first
    dimension counts experts; the bytes stay where they are.
    """

    classes: Callable[[ModuleType], dict[str, type[nn.Module]]]
    conversions: tuple[WeightConverter, ...] = ()
    reshape: Callable[[PreTrainedConfig, str, tuple[int, ...]], tuple[int, ...]] = lambda config, key, shape: shape


def adapted_families() -> list[str]:
    """Folders of transformers' models that have an adapter, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


@cache
def adapter_of(family: str) -> Adapter | None:
    """The adapter of a folder of transformers' models, if it has one."""
    if family not in adapted_families():
        return None
    adapter: Adapter = importlib.import_module(f"{__name__}.{family}").ADAPTER
    return adapter


@cache
def adapted_classes(modeling: ModuleType) -> dict[str, type[nn.Module]]:
    """Name -> the class to use in a modeling module of transformers while a model is built; {} without an adapter."""
    adapter = adapter_of(family_of(modeling.__name__))
    return {} if adapter is None else adapter.classes(modeling)


def family_of(module_name: str) -> str:
    """The folder of ``transformers.models.<folder>.<file>``; "" for any other module."""
    parts = module_name.split(".")
    return parts[2] if parts[:2] == ["transformers", "models"] and len(parts) > 2 else ""
