"""Which of transformers' classes runs a config as a causal language model, and what of it is for text."""

from __future__ import annotations

import sys
from types import ModuleType

from torch import nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.auto_factory import _get_model_class
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    MODEL_MAPPING,
)

from moray.runtime.model.adapters import adapted_classes

Architecture = tuple[type[PreTrainedModel], PreTrainedConfig]  # a class, and the config that an instance is made of


def find_architecture(config: PreTrainedConfig) -> Architecture | None:
    """The class that runs ``config``, and the config it is made of: the whole, or the part it runs.

    A causal language model where transformers has one (of the text part, for some multimodal models), else the
    multimodal model, which takes text alone as well. None if it has neither.
    """
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING):
        if type(config) in mapping:
            found = _pick_class(config, mapping)
            if found.forward is nn.Module.forward:  # several models in one: the one that reads and writes text
                return _text_model(found, config)
            if not issubclass(found, GenerationMixin):  # it makes text, if at all, in another way
                continue
            text_config_class = config.sub_configs.get("text_config")
            is_text_only = text_config_class is not None and found.config_class is text_config_class
            return found, config.get_text_config() if is_text_only else config
    return None


def modeling_modules(config: PreTrainedConfig) -> list[ModuleType]:
    """Where the classes of a model of this config are: its own module, and its text model's."""
    found = find_architecture(config)
    if found is None:
        return []
    modules = [sys.modules[found[0].__module__]]
    text_config = config.get_text_config()
    if type(text_config) in MODEL_MAPPING:
        modules.append(sys.modules[_pick_class(text_config, MODEL_MAPPING).__module__])
    return list(dict.fromkeys(modules))


def experts_classes(config: PreTrainedConfig) -> list[type[nn.Module]]:
    """Experts classes that models of this config may use, those of adapters included."""
    values = [
        value
        for module in modeling_modules(config)
        for value in (*vars(module).values(), *adapted_classes(module).values())
    ]
    return list(dict.fromkeys(value for value in values if _is_decorated(value)))


def remove_other_inputs(model: PreTrainedModel) -> None:
    """Take out of a multimodal model the parts that text does not pass: all beside the decoder and its head.

    A model of text alone stays as it is.
    """
    kept = {model.get_decoder(), model.get_output_embeddings(), model.get_input_embeddings()} - {None}
    if model.config.get_text_config() is model.config or model in kept:
        return
    around: list[nn.Module] = [model]  # modules that hold what is kept
    while around:
        parent = around.pop()
        for name, child in list(parent.named_children()):
            if child in kept:
                continue
            if not kept.isdisjoint(child.modules()):
                around.append(child)
            elif next(child.parameters(), None) is not None:
                setattr(parent, name, None)


def _pick_class(config: PreTrainedConfig, mapping: object) -> type[PreTrainedModel]:
    model_class: type[PreTrainedModel] = _get_model_class(config, mapping)
    return model_class


def _text_model(whole: type[PreTrainedModel], config: PreTrainedConfig) -> Architecture | None:
    """The model inside ``whole`` that holds the text config and generates."""
    text_config = config.get_text_config()
    for part in (getattr(config, name, None) for name in config.sub_configs):
        if part is None or part is text_config or part.get_text_config() is not text_config:
            continue
        for value in vars(sys.modules[whole.__module__]).values():
            is_model = isinstance(value, type) and issubclass(value, PreTrainedModel)
            if is_model and value.config_class is type(part) and value.can_generate():
                return value, part
    return None


def _is_decorated(value: object) -> bool:
    init = vars(value).get("__init__") if isinstance(value, type) else None
    code = getattr(init, "__code__", None)
    return code is not None and {"has_gate", "is_transposed"} <= set(code.co_freevars)
