"""Hugging Face's own model as a backend: the reference outside this project."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from eval_backends import Ask, BackendError, OnReply, Reply, tail_logprob


class TransformersBackend:
    """A checkpoint on CPU in float32, greedy, a prompt at a time; for small models.

    Shares no arithmetic with the engine: FP8 blocks are dequantised here.
    """

    def __init__(self, folder: Path):
        transformers.utils.logging.disable_progress_bar()
        self.folder = folder
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        config = transformers.AutoConfig.from_pretrained(folder)
        state = dequantised(folder, getattr(config, "quantization_config", None))
        config.quantization_config = None
        del config.quantization_config
        self.model = getattr(transformers, config.architectures[0]).from_pretrained(
            None,
            config=config,
            state_dict=state,
            dtype=torch.float32,
            attn_implementation="eager",
        )
        self.model.eval()

    def complete(self, asks: Sequence[Ask], on_reply: OnReply) -> None:
        for number, ask in enumerate(asks):
            on_reply(number, self._reply(ask))

    def _reply(self, ask: Ask) -> Reply:
        if ask.temperature > 0 or (ask.max_tokens > 1 and not ask.ignore_eos):
            raise BackendError("the transformers reference is greedy and does not stop at EOS")
        ids = self.tokenizer(ask.prompt, return_tensors="pt").input_ids
        out = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),  # else the pad token is masked, which may be BOS
            max_new_tokens=ask.max_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        new = out.sequences[0, ids.shape[1] :].tolist()
        rows = [logits[0].float().log_softmax(-1) for logits in out.logits]
        return Reply(
            self.tokenizer.decode(new),
            "length",
            tuple(self.tokenizer.decode([token]) for token in new),
            tuple(float(row[token]) for row, token in zip(rows, new, strict=True)),
            tuple(self._best(row, ask) for row in rows),
        )

    def _best(self, row: Tensor, ask: Ask) -> dict[str, float]:
        choices = self.tokenizer(list(ask.choices), add_special_tokens=False).input_ids
        tokens = row.topk(min(ask.top_logprobs or 1, row.shape[0])).indices.tolist()
        tokens += [ids[0] for ids in choices if len(ids) == 1]
        return {self.tokenizer.decode([token]): float(row[token]) for token in tokens}

    def score(self, prompt: str, choice: str) -> float:
        tokens = self.tokenizer(prompt + choice).input_ids
        with torch.no_grad():
            rows = self.model(torch.tensor([tokens]), use_cache=False).logits[0].log_softmax(-1)
        entries = [
            (self.tokenizer.decode([token]), float(row[token]))
            for token, row in zip(tokens[1:], rows[:-1], strict=True)
        ]
        return tail_logprob(entries, choice)

    def close(self) -> None:
        del self.model


def dequantised(folder: Path, quantization: dict[str, Any] | None) -> dict[str, Tensor]:
    """Every weight of a checkpoint folder; FP8 blocks as float32."""
    stored: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        stored |= load_file(file)
    state = {}
    for name, weight in stored.items():
        if name.endswith("_scale_inv"):
            continue
        scale = stored.get(f"{name}_scale_inv")
        if scale is not None and quantization is not None:
            rows, columns = quantization["weight_block_size"]
            full = scale.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
            weight = weight.float() * full[: weight.shape[0], : weight.shape[1]]
        state[name] = weight
    return state
