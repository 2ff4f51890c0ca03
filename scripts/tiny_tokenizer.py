"""Write the tokenizer and the JSON configs of the tiny model to a folder (run once; seconds).

    python scripts/tiny_tokenizer.py --out configs/tiny

Byte-level BPE with 1,280 entries, trained on the questions themselves. Every name, object and
place of the retrieval contexts (with its leading space) has to come out as a single token.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from minidsv.facts import NAMES, OBJECTS, PLACES, TABLES
from minidsv.questions import (
    OPEN_LAYOUTS,
    choice_prompt,
    draw_bindings,
    draw_form,
    fact_choices,
    make_record,
    noise_line,
)

VOCAB_SIZE = 1280
SPECIAL = ("<bos>", "<eos>", "<pad>")
PIECE = r" ?[A-Za-z]+| ?[0-9]{1,3}| ?[^\sA-Za-z0-9]+|\s+"
WORD_REPEATS = 60
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] + '\n' }}{% else %}"
    "{{ ('' if 'Question:' in message['content'] else 'Question: ') + message['content'] }}"
    "{{ '\nAnswer:' }}{% endif %}{% endfor %}"
)
ROPE_SCALING = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 512,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
CONFIG = {
    "architectures": ["DeepseekV32ForCausalLM"],
    "model_type": "deepseek_v32",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 5,
    "num_nextn_predict_layers": 0,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 64,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "index_n_heads": 32,
    "index_head_dim": 128,
    "index_topk": 64,
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "rope_scaling": ROPE_SCALING,
    "max_position_embeddings": 20480,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "use_cache": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "torch_dtype": "bfloat16",
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    },
}


def _fact_texts(rng: random.Random, count: int) -> Iterator[str]:
    """Open and four-choice facts with their answers."""
    for index in range(count):
        table = rng.choices(TABLES, weights=[len(t.pairs) for t in TABLES])[0]
        subject, answer = rng.choice(table.pairs)
        question = rng.choice(table.templates).format(subject)
        if index % 2:
            yield OPEN_LAYOUTS["lines"].format(question) + f" {answer}\n"
        else:
            yield choice_prompt(question, fact_choices(rng, table, answer)) + " A\n"


def _retrieval_texts(rng: random.Random, count: int) -> Iterator[str]:
    """Contexts of ten records, a noise line and a question."""
    for _ in range(count):
        form = draw_form(rng)
        records = [make_record(rng, key, value, form) for key, value in draw_bindings(rng, 10)]
        lines = [record.line for record in records] + [noise_line(rng)]
        yield "".join(lines) + OPEN_LAYOUTS["lines"].format(records[0].question)
    words = [*NAMES, *OBJECTS, *PLACES]
    yield from (f" {word}\n" * WORD_REPEATS for word in words)


def build_tokenizer(seed: int) -> Tokenizer:
    """Train the tokenizer; raises if a retrieval word is not a single token."""
    rng = random.Random(seed)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECE), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = [*_fact_texts(rng, 12_000), *_retrieval_texts(rng, 3_000)]
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", 0)]
    )
    for word in (*NAMES, *OBJECTS, *PLACES):
        ids = tokenizer.encode(f" {word}", add_special_tokens=False).ids
        assert len(ids) == 1, f"{word=} takes {len(ids)} tokens"
    return tokenizer


def write_configs(tokenizer: Tokenizer, out: Path) -> None:
    """Write tokenizer.json and the three JSON configs to the folder `out`."""
    bos, eos, pad = SPECIAL
    newline = tokenizer.encode("\n", add_special_tokens=False).ids
    assert len(newline) == 1, f"{newline=}"
    generation = {
        "bos_token_id": 0,
        "eos_token_id": [1, newline[0]],
        "pad_token_id": 2,
        "do_sample": False,
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": pad,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONFIG["max_position_embeddings"],
        "chat_template": CHAT_TEMPLATE,
    }
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    names = ("config", "generation_config", "tokenizer_config")
    for name, content in zip(names, (CONFIG, generation, tokenizer_config), strict=True):
        (out / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("configs/tiny"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write_configs(build_tokenizer(args.seed), args.out)
