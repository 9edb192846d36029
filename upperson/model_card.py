"""The run's model card: what the model is, how well it does, what it must not be used for."""

from pathlib import Path
from typing import Any

import jinja2

from upperson.config import TrainConfig
from upperson_rt.printable import code_span, show_text

_TEMPLATES = Path(__file__).parent / "templates"


def model_card(config: TrainConfig, results: dict[str, Any]) -> str:
    """Render a run's ``README.md``, in Markdown with a YAML header.

    Args:
        config: The run's settings.
        results: Content of ``results.json``: ``best_epoch``, ``selected_on`` (val, test or last
            epoch), ``val`` and ``test`` (metrics in percent by name, or None), ``seed``, ``base``,
            ``base_sha256``, ``parameters``, ``trained_parameters`` and ``splits`` (``images``,
            ``captions`` and ``people`` by split). What is missing is left out.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        undefined=jinja2.StrictUndefined,
        finalize=show_text,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["code"] = code_span
    measured = {split: results[split] for split in ("val", "test") if results.get(split)}
    metrics = list(dict.fromkeys(name for values in measured.values() for name in values))
    return environment.get_template("model_card.md.j2").render(
        config=config,
        base=results.get("base", config.base),
        base_sha256=results.get("base_sha256"),
        # Names only: a card is passed on, and folders of the machine it was made on are not.
        weights=Path(config.pretrained or "").name,
        data=_data_name(config),
        start=Path(config.init_from or "").name,
        metrics=metrics,
        rows=[
            [split, *(f"{values[name]:.2f}" if name in values else "-" for name in metrics)]
            for split, values in measured.items()
        ],
        selection=_selection(config, results),
        seed=results.get("seed"),
        splits=[
            f"{name} {size['images']:,} images and {size['captions']:,} captions of "
            f"{size['people']:,} people"
            for name, size in results.get("splits", {}).items()
        ],
        parameters=_parameters(results),
        parts=_parts(config),
        teacher="" if config.student is None else Path(config.student.teacher).name,
    )


def _data_name(config: TrainConfig) -> str:
    """Name a published set by its name, any other by its folder."""
    own = config.dataset in ("jsonl", "csv")
    return (Path(config.root).name if own else "") or config.dataset


def _selection(config: TrainConfig, results: dict[str, Any]) -> str:
    if "best_epoch" not in results:
        return "Which epoch was kept is not recorded."
    epoch = f"Epoch {results['best_epoch']} of {config.epochs}"
    match results.get("selected_on"):
        case "val":
            return f"{epoch}, the best by R@1 on the validation split."
        case "test":
            return (
                f"{epoch}, **selected on the test split**: its test result is optimistic, and not "
                "comparable with one selected on a validation split."
            )
        case "last epoch":
            return f"{epoch}, the last one; no split chose it."
    return f"{epoch}; how it was chosen is not recorded."


def _parameters(results: dict[str, Any]) -> str | None:
    if "trained_parameters" not in results or "parameters" not in results:
        return None
    trained, total = results["trained_parameters"], results["parameters"]
    return f"{trained:,} trained of {total:,} ({100 * trained / total:.2f} %)"


def _parts(config: TrainConfig) -> list[str]:
    model = config.model
    parts = []
    if model.prefix_length:
        parts.append(
            f"S-Prefix of {model.prefix_length} rows, initial scale {model.prefix_scale}, "
            f"blocks {model.prefix_blocks}"
        )
    if model.lora_rank:
        parts.append(f"LoRA of rank {model.lora_rank}, blocks {model.lora_blocks}")
    if model.adapter_reduction:
        parts.append(
            f"L-Adapter of width / {model.adapter_reduction}, blocks {model.adapter_blocks}"
        )
    return parts
