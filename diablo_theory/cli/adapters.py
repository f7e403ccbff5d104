"""The command on adapters: convert."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from diablo_theory.cli.common import app, console, options_checked, working, wrote
from diablo_theory.errors import ConfigError

DEFAULT_MODEL = "SmolLM2-135M-Instruct"


@app.command()
def convert(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="FROM", help="An adapter.chkpt of DiaBlo's authors, or the folder of a DiaBlo or SHiRA adapter."
        ),
    ],
    target: Annotated[Path, typer.Argument(metavar="TO", help="Must not exist: a folder, with --to chkpt a file.")],
    to: Annotated[Literal["diablo", "lora", "chkpt"], typer.Option(help="What TO shall be.")],
    rank: Annotated[
        str | None,
        typer.Option(help="With --to lora: its rank, or with a point (0.9) the share of each layer's energy to keep."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="The model that the adapter belongs to: a folder or a hub id. Left out: what the adapter's folder "
            f"names, or else {DEFAULT_MODEL}."
        ),
    ] = None,
) -> None:
    """Convert an adapter: from or to DiaBlo's authors' files, to LoRA, or from a SHiRA that is a DiaBlo.

    To LoRA something is lost, and a table says how much; all others are exact or refused. The model is loaded for the
    names and sizes of its layers, and left as it is.

    Example: `diablo-theory convert adapter adapter-as-lora --to lora --rank 16 --model path/to/model`
    """
    if (to == "lora") != (rank is not None):
        raise typer.BadParameter("--to lora needs --rank, and nothing else takes it")
    if not source.exists():
        raise typer.BadParameter(f"no such file or folder: {source}")
    if target.exists():
        raise typer.BadParameter(f"TO must not exist, and {target} does")
    from peft import get_peft_model_state_dict

    from diablo_theory.finetune.models import load_network, loading
    from diablo_theory.tuner import save_adapter, save_chkpt, to_lora

    with options_checked("--rank"):
        wanted = None if rank is None else float(rank) if "." in rank else int(rank)
    with options_checked():
        named = _named_base(source)
    model = model or named or DEFAULT_MODEL
    with working(loading(model)):
        base = load_network(model)
    with working("converting"), options_checked():
        try:
            adapted = _read(base, source)
        except RuntimeError as error:  # torch's list of parameters, one for each layer
            first = str(error).strip().splitlines()[:2]
            raise ConfigError(f"{source} does not fit --model {model}: {' '.join(map(str.strip, first))}") from None
        if to == "chkpt":
            save_chkpt(adapted, target)
        elif wanted is not None:
            config, state, lost = to_lora(adapted, wanted)
            save_adapter(target, config, state)
            shown = ["layer", "rank", "rank_of_D", "relative_error", "energy_kept", "lora_parameters"]
            console.print(lost[shown].to_string(index=False), highlight=False, soft_wrap=True)
        else:
            state = get_peft_model_state_dict(adapted, save_embedding_layers=False)
            save_adapter(target, adapted.peft_config["default"], state)
    wrote([target])


def _named_base(source: Path) -> str | None:
    """The base model that an adapter's folder names, once the folder is known to hold what can be converted."""
    from peft import PeftConfig

    if source.is_file():
        return None
    if not (source / "adapter_config.json").is_file():
        raise ConfigError(f"{source} has no adapter_config.json: FROM must be the folder of an adapter, or a file")
    config = PeftConfig.from_pretrained(str(source))
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind not in ("DIABLO", "SHIRA"):
        raise ConfigError(
            f"{source} holds a {kind} adapter: FROM must be a DiaBlo or SHiRA adapter, or an adapter.chkpt"
        )
    base: str | None = config.base_model_name_or_path
    return base


def _read(base: Any, source: Path) -> Any:
    """The model with the adapter as a DiaBlo adapter."""
    from peft import PeftModel, get_peft_model, set_peft_model_state_dict

    from diablo_theory.tuner import from_shira, load_chkpt

    if source.is_file():
        return load_chkpt(base, source, task_type="CAUSAL_LM")
    model = PeftModel.from_pretrained(base, source)
    if model.peft_config["default"].peft_type == "SHIRA":
        config, state = from_shira(model)
        model = get_peft_model(model.unload(), config)
        set_peft_model_state_dict(model, state)
    return model
