"""What transformers knows about Mixture-of-Experts families, and models built without their experts.

Nothing here lists families: a family is supported if its experts class carries transformers'
``@use_experts_implementation``, which is found by reading the installed transformers, or if it has an adapter.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import WeightConverter
from transformers.initialization import no_init_weights

from moray.runtime.errors import CheckpointError, UnsupportedModelError
from moray.runtime.model.adapters import adapted_classes, adapted_families, adapter_of, family_of
from moray.runtime.model.architectures import (
    experts_classes,
    find_architecture,
    modeling_modules,
    remove_other_inputs,
)
from moray.runtime.model.config_limits import check_counts

_DECORATOR = "@use_experts_implementation"
_WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")
EXPERT_PARAMETERS = (*_WEIGHTS, *(f"{name}_bias" for name in _WEIGHTS))
_build_lock = threading.RLock()  # classes are patched for the whole process while a model is built


@functools.cache
def supported_families() -> list[str]:
    """Families of the installed transformers whose experts can be run, sorted: by its interface or by an adapter."""
    root = Path(transformers.__file__).parent / "models"
    files = root.glob("*/modeling_*.py")
    found = {file.parent.name for file in files if _DECORATOR in file.read_text(encoding="utf-8")}
    return sorted(found | {family for family in adapted_families() if (root / family).is_dir()})


def load_config(path: str | os.PathLike[str]) -> PreTrainedConfig:
    """The configuration of a local checkpoint or store; code shipped with it is never run.

    Raises CheckpointError (no directory, no readable config.json) and UnsupportedModelError
    (unknown model type, a dense model, a family outside the experts interface).
    """
    root = Path(path)
    if not root.is_dir():
        raise CheckpointError(f"{root} is not a directory; expected a downloaded Hugging Face checkpoint")
    model_type = _read_model_type(root / "config.json")
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(root, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever transformers trips over, it is this file
        if model_type in transformers.CONFIG_MAPPING:
            why = " ".join(str(error).split())
            raise CheckpointError(f"{root / 'config.json'} is not a valid {model_type} config: {why}") from error
        raise UnsupportedModelError(
            f"{root} has model type {model_type!r}, unknown to transformers {transformers.__version__}; {_supported()}"
        ) from error
    _require_routed(config)
    return config


def context_length(config: PreTrainedConfig) -> int:
    """Most tokens of one sequence; 2**30 where the configuration has no limit."""
    return int(getattr(config.get_text_config(), "max_position_embeddings", 0) or 1 << 30)


def is_experts(module: nn.Module) -> bool:
    """Whether this module is a layer's routed experts (the test transformers' own exporter uses)."""
    return hasattr(module, "has_gate") and hasattr(module, "is_transposed")


def expert_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Path and module of every MoE layer's experts, in model order: index = ``ExpertKey.layer``."""
    return [(name, module) for name, module in model.named_modules() if is_experts(module)]


def expert_params(module: nn.Module) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name -> (shape of all experts together, dtype) of the parameters that a built experts module lacks."""
    params: dict[str, tuple[tuple[int, ...], torch.dtype]] = module.expert_params  # type: ignore[assignment]
    return params


def added_conversions(model: PreTrainedModel) -> list[WeightConverter]:
    """What a model's adapter adds to transformers' conversion mapping."""
    adapter = adapter_of(family_of(type(model).__module__))
    return [] if adapter is None else list(adapter.conversions)


def expert_shapes(config: PreTrainedConfig) -> Callable[[str, tuple[int, ...]], tuple[int, ...]]:
    """(key, shape) of a checkpoint's tensor -> the shape to see it in; see ``Adapter.reshape``."""
    adapters = [adapter_of(family_of(module.__name__)) for module in modeling_modules(config)]
    adapter = next((found for found in adapters if found is not None), None)
    return (lambda key, shape: shape) if adapter is None else functools.partial(adapter.reshape, config)


def build_model(config: PreTrainedConfig, dtype: torch.dtype, device: str | torch.device = "cpu") -> PreTrainedModel:
    """The causal language model of ``config`` without its experts' parameters, in eval mode.

    Every experts module describes them instead (``expert_params``). Other parameters are allocated but neither
    initialised nor touched: assign them with ``load_state_dict(assign=True)`` and then call ``tie_weights()``,
    because assigning unties. Buffers that are not saved are computed.
    ``device="meta"`` allocates nothing at all. A multimodal model is built without what is not for text.

    Builds one model at a time: classes are patched meanwhile, and restored whatever happens.
    Raises UnsupportedModelError if the model has no experts to run, CheckpointError if transformers cannot build it.
    """
    architecture = find_architecture(config)
    assert architecture is not None, "load_config refuses such a config"
    model_class, own_config = architecture
    with _build_lock, ExitStack() as stack:
        for modeling in modeling_modules(config):
            stack.enter_context(_replaced(modeling, adapted_classes(modeling)))
        for experts_class in experts_classes(config):
            stack.enter_context(_without_parameters(experts_class, torch.device(device)))
        stack.enter_context(no_init_weights())
        stack.enter_context(torch.device(device))
        try:
            model: PreTrainedModel = model_class._from_config(copy.deepcopy(own_config), dtype=dtype)
        except Exception as error:
            why = " ".join(str(error).split()) or type(error).__name__
            raise CheckpointError(f"config.json does not describe a {config.model_type} model: {why}") from error
    model.tie_weights(recompute_mapping=False)
    remove_other_inputs(model)
    if not expert_modules(model):
        raise UnsupportedModelError(_explain_dense(config))
    model.eval()
    return model


# -------------------------------------------------------------------------------------- families


def _read_model_type(file: Path) -> str:
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        check_counts(file, document)
        return str(document["model_type"])
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{file.parent} has no config.json; expected a downloaded Hugging Face checkpoint"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}); download it again") from error
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{file} has no model_type; expected a transformers config") from error


def _supported() -> str:
    return "supported families: " + ", ".join(supported_families())


def _explain_dense(config: PreTrainedConfig) -> str:
    return (
        f"model type {config.model_type!r} with this config is a dense model, without routed experts; "
        "moray runs Mixture-of-Experts models only, run this one with transformers or llama.cpp"
    )


def _require_routed(config: PreTrainedConfig) -> None:
    if not _declares_experts(config.to_dict()):
        raise UnsupportedModelError(_explain_dense(config))
    if find_architecture(config) is None:
        raise UnsupportedModelError(
            f"model type {config.model_type!r} has no causal language model class in transformers "
            f"{transformers.__version__}; {_supported()}"
        )
    if not experts_classes(config):
        raise UnsupportedModelError(
            f"model type {config.model_type!r} has experts, but they are not routed through transformers' experts "
            f"interface, and moray has no adapter for it; {_supported()}"
        )


def _declares_experts(document: dict[str, Any]) -> bool:
    """Whether a config, or a config inside it, has a count of experts above 0, under whatever name."""
    for name, value in document.items():
        if isinstance(value, dict):
            if _declares_experts(value):
                return True
        elif "experts" in str(name) and "per_tok" not in name and type(value) is int and value > 0:
            return True
    return False


# ------------------------------------------------------------------------------ without experts


@contextmanager
def _replaced(module: ModuleType, classes: dict[str, type[nn.Module]]) -> Iterator[None]:
    """While inside, a modeling module uses other classes under these names."""
    originals = {name: vars(module)[name] for name in classes}
    vars(module).update(classes)
    try:
        yield
    finally:
        vars(module).update(originals)


@contextmanager
def _without_parameters(experts_class: type[nn.Module], device: torch.device) -> Iterator[None]:
    """While inside, new instances of the class describe their expert parameters and have none."""
    original = experts_class.__init__
    experts_class.__init__ = _stripped(original, device)  # type: ignore[method-assign]
    try:
        yield
    finally:
        experts_class.__init__ = original  # type: ignore[method-assign]


def _stripped(original: Callable[..., None], device: torch.device) -> Callable[..., None]:
    @functools.wraps(original)
    def __init__(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        with torch.device("meta"):
            original(self, *args, **kwargs)
        params: dict[str, tuple[tuple[int, ...], torch.dtype]] = dict(getattr(self, "expert_params", {}))
        for name in EXPERT_PARAMETERS:
            parameter = self._parameters.pop(name, None)
            if parameter is not None:
                params[name] = (tuple(parameter.shape), parameter.dtype)
        self.expert_params = params  # type: ignore[assignment]
        self.to_empty(device=device)  # what else it owns, e.g. a norm, belongs to the trunk
        # Otherwise transformers' _init_weights touches the missing parameters.
        self._is_hf_initialized = True  # type: ignore[assignment]

    return __init__
