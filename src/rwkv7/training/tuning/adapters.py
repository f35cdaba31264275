"""LoRA through the package peft: low-rank additions to the projections, the model itself frozen.

The adapter is kept in peft's own format, so that peft loads it beside the same model;
`merge_adapter` adds it to the weights of an official checkpoint.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from rwkv7.nn import RWKV7
from rwkv7.training.settings import TrainSettings
from rwkv7.weights import load_model, save_model
from rwkv7.weights.source import MERGED

from .base import Base
from .whole import Tuning

__all__ = ["TARGETS", "AdapterTuning", "merge_adapter"]

# Every projection of a block; its own low-rank matrices are no modules and stay as they are.
TARGETS = r"blocks\.\d+\.(att\.(receptance|key|value|output)|ffn\.(key|value))"
FOLDER, WEIGHTS = "adapter", "adapter_model.safetensors"


class AdapterTuning(Tuning):
    """Only the additions to the matrices that `TARGETS` names are trained.

    The modules in the model are replaced by peft's in place, which call ours.
    """

    def __init__(
        self,
        model: RWKV7,
        base: Base | None,
        settings: TrainSettings,
        checkpoint: Path | None = None,
    ) -> None:
        """`checkpoint` is a folder that `save` wrote into; None begins with additions of zero.

        The rank, alpha and the seed are those of the settings. Raises ValueError where peft is not
        installed, or the checkpoint's adapter is not one for this model.
        """
        peft = _peft()
        super().__init__(model, base)
        config = peft.LoraConfig(
            r=settings.lora_rank, lora_alpha=settings.lora_alpha, target_modules=TARGETS
        )
        with torch.random.fork_rng():
            torch.manual_seed(settings.seed)
            self._peft = peft.get_peft_model(model, config)
        if checkpoint is not None:
            _load_weights(self._peft, checkpoint / FOLDER / WEIGHTS)

    def save(self, folder: Path, metadata: Mapping[str, str]) -> None:
        """Writes the folder adapter/, in peft's format."""
        self._peft.save_pretrained(str(folder / FOLDER), save_embedding_layers=False)

    def export(self, path: Path) -> None:
        """Writes the base with the additions added, in the base's dtype."""
        assert self.base is not None  # adapters belong to a model that was read
        with tempfile.TemporaryDirectory() as folder:
            self.save(Path(folder), {})
            merge_adapter(Path(self.base.path), Path(folder, FOLDER), path)

    def finish(self, out: Path) -> list[Path]:
        """Writes adapter/ and merged.safetensors into the folder of the run."""
        self.save(out, {})
        merged = out / MERGED
        self.export(merged)
        return [out / FOLDER, merged]


def merge_adapter(base: Path, adapter: Path, path: Path) -> None:
    """Writes the checkpoint `base` with an adapter's additions in its weights.

    Args:
        base: an official checkpoint, .pth or .safetensors, or the folder of a run.
        adapter: a folder in peft's format, for the model of `base`.
        path: .pth or .safetensors, to be written. The weights keep the dtype that they have in
            `base`; the sums are made in fp32 and rounded once.

    Raises ValueError where peft is not installed, or an adapter that does not fit the model.
    """
    peft = _peft()
    model = load_model(base, device="cpu")
    dtype = model.dtype
    if not (adapter / "adapter_config.json").is_file():
        raise ValueError(f"adapter: expected a folder that peft wrote, found {adapter}")
    try:
        tuned = peft.PeftModel.from_pretrained(model.float(), str(adapter))
    except (RuntimeError, KeyError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{adapter}: no adapter for the model of {base} ({reason})") from error
    save_model(tuned.merge_and_unload(safe_merge=True).to(dtype), path)


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ValueError(
            'tune: "lora" needs the package peft: run `pip install "rwkv7[peft]"`'
        ) from error
    return peft


def _load_weights(model: Any, path: Path) -> None:
    from peft import set_peft_model_state_dict

    try:
        result: Any = set_peft_model_state_dict(model, load_file(path))
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{path}: no adapter for this model ({error})") from error
    missing = [name for name in result.missing_keys if ".lora_" in name]
    if odd := [*missing, *result.unexpected_keys]:
        raise ValueError(f"{path}: no adapter for this model ({odd[0]} is missing or unknown)")
