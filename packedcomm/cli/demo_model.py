"""The demo's models: a checkpoint as a language model that trains, or as bare tensors."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from packedcomm.cli.demo_text import PROBES, SENTENCE_PAIRS
from packedcomm.errors import ArgumentError, CheckpointError
from packedcomm.sources.checkpoint import Checkpoint

__all__ = ["BareTensors", "DemoModel", "LanguageModel", "load_model"]

LEARNING_RATE = 1e-4
MAX_TOKENS = 32
TEMPERATURE = 0.05
_TRAINABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class DemoModel(ABC):
    """A model of one process. Its tensors stay at their addresses for its whole life."""

    notes: list[str]
    """What a reader of the result should know."""

    @abstractmethod
    def tensors(self) -> dict[str, torch.Tensor]:
        """Parameters and persistent buffers by name, detached, tied ones once."""

    @abstractmethod
    def train_step(self) -> float:
        """One step of AdamW; returns the loss before it."""

    @abstractmethod
    def output(self) -> torch.Tensor | None:
        """What the model says of the fixed inputs; None for a model that says nothing."""


def load_model(checkpoint: Checkpoint, device: torch.device, *, weights: bool) -> DemoModel:
    """Make the model of a checkpoint.

    Args:
        checkpoint: what to load. With a config.json that transformers can build a text model from
            it becomes a `LanguageModel`, else `BareTensors` with a note that says why.
        device: where to put it.
        weights: whether to load the weights; if not, they are random.

    Raises:
        CheckpointError: config.json is malformed, or the weights don't fit it; names the tensor.
        ArgumentError: transformers is needed and not installed.
    """
    reason = _why_bare(checkpoint)
    if reason is not None:
        return BareTensors(checkpoint, device, reason, weights=weights)
    return LanguageModel(checkpoint, device, weights=weights)


class BareTensors(DemoModel):
    """Tensors without a network around them, pulled towards zero by weight-wise L2."""

    def __init__(
        self, checkpoint: Checkpoint, device: torch.device, reason: str, *, weights: bool
    ) -> None:
        self.notes = [f"outputs are not compared: {reason}"]
        self._tensors: dict[str, torch.Tensor] = {}
        for spec in checkpoint.manifest.specs if not weights else ():
            self._tensors[spec.name] = _random_tensor(spec.shape, spec.dtype).to(device)
        for name, tensor in checkpoint if weights else ():
            self._tensors[name] = tensor.clone().to(device)
        trained = [t.requires_grad_() for t in self._tensors.values() if t.dtype in _TRAINABLE]
        if not any(tensor.numel() for tensor in trained):
            raise ArgumentError(
                f"{checkpoint.path}: holds no tensor of a dtype that can be trained "
                f"({', '.join(str(dtype) for dtype in _TRAINABLE)})"
            )
        self._trained = trained
        self._optimizer = torch.optim.AdamW(trained, LEARNING_RATE)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: tensor.detach() for name, tensor in self._tensors.items()}

    def train_step(self) -> float:
        self._optimizer.zero_grad()
        squares = [t.float().square().mean() for t in self._trained if t.numel()]
        loss = torch.stack(squares).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        return loss.item()

    def output(self) -> torch.Tensor | None:
        return None


class LanguageModel(DemoModel):
    """A transformers model: embeddings with a contrastive loss, or next tokens by cross entropy."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device, *, weights: bool) -> None:
        assert checkpoint.config_path is not None
        folder = checkpoint.config_path.parent
        config = _transformers().AutoConfig.from_pretrained(folder, local_files_only=True)
        self._causal = any(a.endswith("ForCausalLM") for a in config.architectures or ())
        self.notes = []
        self._model = _build(checkpoint, config, self._causal, self.notes, weights=weights)
        self._model.to(device)
        self._device = device
        text = config.get_text_config()
        self._pairs = [
            self._tokens(folder, text, side) for side in zip(*SENTENCE_PAIRS, strict=True)
        ]
        self._probes = self._tokens(folder, text, PROBES)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), LEARNING_RATE)

    def tensors(self) -> dict[str, torch.Tensor]:
        once: dict[int, tuple[str, torch.Tensor]] = {}
        for name, tensor in self._model.state_dict(keep_vars=True).items():
            once.setdefault(id(tensor), (name, tensor.detach()))
        return dict(once.values())

    def train_step(self) -> float:
        self._model.train()
        self._optimizer.zero_grad()
        loss = self._next_token_loss() if self._causal else self._contrastive_loss()
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        return loss.item()

    def output(self) -> torch.Tensor | None:
        self._model.eval()
        with torch.inference_mode():
            if not self._causal:
                return self._embeddings(self._probes)
            logits: torch.Tensor = self._model(**self._probes).logits
            last = self._probes["attention_mask"].sum(dim=1) - 1
            return logits[torch.arange(len(last), device=self._device), last]

    def _embeddings(self, tokens: dict[str, torch.Tensor]) -> torch.Tensor:
        hidden = self._model(**tokens).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        return functional.normalize((hidden * mask).sum(dim=1) / mask.sum(dim=1), dim=-1)

    def _contrastive_loss(self) -> torch.Tensor:
        """Each sentence must be closest to its own pair among those of the batch."""
        left, right = (self._embeddings(tokens) for tokens in self._pairs)
        similarity = (left @ right.T).float() / TEMPERATURE
        own = torch.arange(len(similarity), device=similarity.device)
        return functional.cross_entropy(similarity, own)

    def _next_token_loss(self) -> torch.Tensor:
        tokens = self._pairs[0]
        labels = tokens["input_ids"].masked_fill(tokens["attention_mask"] == 0, -100)
        loss: torch.Tensor = self._model(**tokens, labels=labels).loss
        return loss

    def _tokens(
        self, folder: Path, config: Any, sentences: tuple[str, ...]
    ) -> dict[str, torch.Tensor]:
        """Token ids of the sentences; without a tokenizer.json, fixed random ones."""
        # Half of the positions, since some models (RoBERTa) keep the first ones for padding.
        positions = getattr(config, "max_position_embeddings", None) or 2 * MAX_TOKENS
        length = max(1, min(MAX_TOKENS, positions // 2))
        file = folder / "tokenizer.json"
        if not file.is_file():
            generator = torch.Generator().manual_seed(len("".join(sentences)))
            shape = (len(sentences), length)
            ids = torch.randint(config.vocab_size, shape, generator=generator)
            mask = torch.ones_like(ids)
        else:
            from tokenizers import Tokenizer

            tokenizer = Tokenizer.from_file(str(file))
            tokenizer.enable_truncation(length)
            tokenizer.enable_padding(pad_id=getattr(config, "pad_token_id", None) or 0)
            encodings = tokenizer.encode_batch(list(sentences))
            ids = torch.tensor([encoding.ids for encoding in encodings])
            mask = torch.tensor([encoding.attention_mask for encoding in encodings])
            if int(ids.max()) >= config.vocab_size:
                raise CheckpointError(
                    f"{file}: token id {int(ids.max())} is outside the vocabulary of "
                    f"{config.vocab_size} in config.json"
                )
        return {"input_ids": ids.to(self._device), "attention_mask": mask.to(self._device)}


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise ArgumentError(
            "a checkpoint with a config.json needs transformers; install it with: "
            "pip install 'packedcomm[demo]'"
        ) from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def _why_bare(checkpoint: Checkpoint) -> str | None:
    """Why a checkpoint is treated as bare tensors; None when a text model can be made of it."""
    path = checkpoint.config_path
    if path is None:
        return f"{checkpoint.path.name} has no config.json with it"
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: can't be read as JSON: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: isn't a JSON object")
    kind = config.get("model_type")
    if config.get("quantization_config") is not None:
        return "the model is quantised"
    if kind not in _transformers().CONFIG_MAPPING:
        return f"transformers knows no model type {kind!r}"
    parsed = _transformers().AutoConfig.from_pretrained(path.parent, local_files_only=True)
    if parsed.is_encoder_decoder:
        return "it is an encoder-decoder model"
    if not hasattr(parsed.get_text_config(), "vocab_size"):
        return f"a model of type {kind!r} doesn't read text"
    return None


def _build(
    checkpoint: Checkpoint, config: Any, causal: bool, notes: list[str], *, weights: bool
) -> torch.nn.Module:
    """The network, with the checkpoint's weights or random ones."""
    transformers = _transformers()
    factory = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
    how = {"dtype": _main_dtype(checkpoint), "attn_implementation": "eager"}
    if not weights:
        model: torch.nn.Module = factory.from_config(config, **how)
        return model
    with torch.device("meta"):
        model_class = type(factory.from_config(config))
    # Given no path, transformers reads no file and asks no network; it renames and fuses tensors
    # (experts, prefixes) as its model wants them.
    model, report = model_class.from_pretrained(
        None,
        config=config,
        state_dict=dict(checkpoint),
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        **how,
    )
    for name, found, expected in report["mismatched_keys"]:
        raise CheckpointError(
            f"{checkpoint.path}: tensor {name!r} has shape {tuple(found)}, config.json makes it "
            f"{tuple(expected)}"
        )
    missing = sorted(report["missing_keys"])
    if len(missing) >= len(model.state_dict()):
        raise CheckpointError(
            f"{checkpoint.path}: holds none of the tensors of a {model_class.__name__}"
        )
    if missing:
        notes.append(f"not in the checkpoint, so random: {', '.join(missing[:5])}")
    return model


def _main_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The trainable dtype that most of the checkpoint's bytes have."""
    sizes: Counter[torch.dtype] = Counter()
    for spec in checkpoint.manifest.specs:
        sizes[getattr(torch, spec.dtype)] += spec.nbytes
    return max(_TRAINABLE, key=lambda dtype: sizes[dtype])


def _random_tensor(shape: tuple[int, ...], dtype: str) -> torch.Tensor:
    """Random numbers where the dtype has a normal distribution, else random bytes."""
    kind: torch.dtype = getattr(torch, dtype)
    if kind in _TRAINABLE:
        return torch.randn(shape, dtype=kind)
    empty = torch.empty(shape, dtype=kind)
    flat = torch.randint(2 if kind == torch.bool else 256, (empty.nbytes,), dtype=torch.uint8)
    return flat.view(kind).view(shape)
