"""DiaBlo as a peft tuner: what puts the layers into a model, takes them out and loads them."""

from __future__ import annotations

import os
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, _maybe_include_all_linear_layers
from peft.utils import get_quantization_kwargs
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.error import NoMatchingPeftModuleError
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from diablo_theory.errors import nearest
from diablo_theory.tuner.config import DiaBloConfig
from diablo_theory.tuner.injection import Snapshot, budget_blocks, check_target, owners_of
from diablo_theory.tuner.layer import DiaBloLinear
from diablo_theory.tuner.registration import PREFIX

#: As in the authors' scripts for Llama; the architectures that name their projections in the same way follow it.
PAPER_TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3", "olmo2", "stablelm")

#: What the first FSDP puts into the names of modules inside its wrappers, but leaves out of a state dict's keys.
FSDP_WRAPPER = "_fsdp_wrapped_module."


class DiaBloModel(BaseTuner):  # type: ignore[misc]  # peft is untyped
    """A model whose target layers carry DiaBlo adapters.

    Args:
        model: Any module.
        peft_config: A :class:`DiaBloConfig`, or adapter name to one.
        adapter_name: Name of the adapter to inject.
        low_cpu_mem_usage: Create the adapter on the meta device, for weights that are loaded next.
        state_dict: Inject where these keys say, instead of by the configuration.

    Raises:
        TypeError: If a target is of a kind that cannot be adapted.
        ValueError: If a target's weight is shared with another module, num_blocks does not fit a target, nothing
            matches, or the adapter's name is taken. The model is then as it was before, bit for bit.

    Example:
        >>> from diablo_theory import DiaBloConfig
        >>> from peft import get_peft_model
        >>> model = get_peft_model(model, DiaBloConfig(num_blocks=64, target_modules=["q_proj", "v_proj"]))
    """

    prefix = PREFIX
    tuner_layer_cls = DiaBloLinear
    targeted_module_names: list[str]
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING | dict.fromkeys(
        LLAMA_LIKE, PAPER_TARGETS
    )

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As peft's, but whole or not at all: whatever is raised, the model and the configuration are as before."""
        config = self.peft_config[adapter_name]
        if not isinstance(config, DiaBloConfig):
            raise TypeError(f"adapter {adapter_name!r}: the configuration must be a DiaBloConfig, got {config!r}")
        if any(adapter_name in layer.diablo_layout for layer in _layers(model)):
            raise ValueError(
                f"adapter_name {adapter_name!r} is taken: this model already has a DiaBlo adapter of that name. "
                "Choose another, or delete it first"
            )
        before, earlier = Snapshot(model, config), self.targeted_module_names
        matched: list[str] = []  # peft extends it, now by this adapter's modules alone
        self._owners, self.targeted_module_names = owners_of(model), matched
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except NoMatchingPeftModuleError as error:
            before.restore(adapter_name)
            raise NoMatchingPeftModuleError(f"{error}{_what_could_match(model, config)}") from None
        except BaseException:
            before.restore(adapter_name)
            raise
        finally:
            del self._owners
            self.targeted_module_names = list(dict.fromkeys([*earlier, *matched]))
        _warn_unmatched(config, matched)

    @contextmanager
    def _enable_peft_forward_hooks(self, *_: Any, **kwargs: Any) -> Iterator[None]:
        """Called by peft for a forward pass's special arguments; what it would drop silently is refused here."""
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "adapter_names: DiaBlo applies the same active adapters to the whole batch; choose them with "
                "set_adapter and run one batch for each"
            )
        yield

    def _prepare_adapter_config(self, peft_config: DiaBloConfig, model_config: dict[str, Any]) -> DiaBloConfig:
        saved, here = peft_config.base_model_name_or_path, model_config.get("_name_or_path")
        if saved and here and os.path.basename(saved.rstrip("/")) != os.path.basename(here.rstrip("/")):
            warnings.warn(
                f"the adapter's base_model_name_or_path is {saved!r}, this model is {here!r}: the blocks are changes "
                "of the weights that they were trained on, and of no others",
                stacklevel=2,
            )
        return super()._prepare_adapter_config(peft_config, model_config)

    def _prepare_model(self, peft_config: DiaBloConfig, model: nn.Module) -> None:
        if peft_config.parameter_budget is not None:
            _maybe_include_all_linear_layers(peft_config, model)
            targets = {
                name: module
                for name, module in model.named_modules()
                if name and self._check_target_module_exists(peft_config, name)
            }
            peft_config.num_blocks = budget_blocks(targets, peft_config)
            peft_config.parameter_budget = None

    def _create_and_replace(
        self,
        peft_config: DiaBloConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        pattern = peft_config.num_blocks_pattern or {}
        num_blocks: Any = pattern.get(get_pattern_key(list(pattern), current_key), peft_config.num_blocks)
        try:
            check_target(target, parent, self._owners)
            if isinstance(target, DiaBloLinear):
                target.update_layer(adapter_name, num_blocks, peft_config)
                return
            layer = DiaBloLinear(target, adapter_name, num_blocks, peft_config, **get_quantization_kwargs(self))
        except (TypeError, ValueError) as error:
            raise type(error)(f"{current_key}: {error}") from None
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        if self.peft_config[adapter_name].dtype is None:
            super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: DiaBloConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """As peft's, but complete from under the first FSDP, where peft 0.21 finds nothing and saves an empty file."""
        found: dict[str, Tensor] = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        for name, module in model.named_modules():
            if isinstance(module, DiaBloLinear) and FSDP_WRAPPER in name:
                layer = name.replace(FSDP_WRAPPER, "")
                places = [f"{layer}.{part}.{adapter_name}" for part in module.adapter_layer_names]
                if config.bias == "diablo_only":
                    places.append(f"{layer}.base_layer.bias")
                found |= {place: state_dict[place] for place in places if place in state_dict}
        return found

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """As peft's; every layer is checked before the first is changed.

        Raises:
            ValueError: If a merged entry would not be finite; no weight is changed then.
        """
        self._check_mergeable(adapter_names)
        super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self._check_mergeable(adapter_names)
        else:
            for layer in _layers(self.model):
                if layer.merged:
                    layer.unmerge()
        return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)

    def _check_mergeable(self, adapter_names: Sequence[str] | None) -> None:
        for layer in _layers(self.model):
            layer.check_mergeable(layer.active_adapters if adapter_names is None else adapter_names)

    def mode_summary(self) -> str:
        """In which mode the active adapters' layers are, and why, in one line for each mode and reason."""
        return mode_summary(self.model)


def mode_summary(model: nn.Module) -> str:
    """As :meth:`DiaBloModel.mode_summary`, for any model that DiaBlo was injected into."""
    found: Counter[tuple[str, str, str]] = Counter()
    for layer in _layers(model):
        for name in layer.active_adapters:
            if name in layer.diablo_layout:
                found[name, *layer.mode(name)] += 1
    return "\n".join(
        f"DiaBlo {name!r}: {count} {'layer' if count == 1 else 'layers'} {mode} ({reason})"
        for (name, mode, reason), count in sorted(found.items())
    )


def _layers(model: nn.Module) -> list[DiaBloLinear]:
    return [module for module in model.modules() if isinstance(module, DiaBloLinear)]


def _what_could_match(model: nn.Module, config: DiaBloConfig) -> str:
    kinds = {name.rpartition(".")[2] for name, module in model.named_modules() if _adaptable(module) and name}
    if not kinds:
        return " The model has no layer that DiaBlo can adapt (torch.nn.Linear, Conv1D)."
    names = config.target_modules
    wanted = sorted(names)[0] if isinstance(names, list | set) and names else ""
    return nearest(wanted, kinds)


def _adaptable(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D | DiaBloLinear)


def _warn_unmatched(config: DiaBloConfig, matched: Sequence[str]) -> None:
    for pattern in config.num_blocks_pattern or {}:
        if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in matched):
            warnings.warn(f"num_blocks_pattern: {pattern!r} matches no adapted module", RuntimeWarning, stacklevel=3)
    targets = config.target_modules
    if isinstance(targets, set | list):
        for target in sorted(targets):
            if not any(name == target or name.endswith(f".{target}") for name in matched):
                hint = nearest(target, {name.rpartition(".")[2] for name in matched})
                message = f"target_modules: no adapted module is named {target!r}.{hint}"
                warnings.warn(message, RuntimeWarning, stacklevel=3)
