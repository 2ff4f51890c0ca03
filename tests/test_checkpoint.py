"""Loading: strict, sharded, FP8 pairs, named errors, and no more memory than the parameters."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from builders import hf_logits, prompt, with_config
from compare import relative_l2
from minidsv import LLM
from minidsv.config import ModelConfig
from minidsv.errors import CheckpointError
from minidsv.kernels.quant import dequantize_fp8_blocks, quantize_fp8_blocks
from minidsv.tensor_table import tensor_table

REPOSITORY = Path(__file__).parent.parent
Tensors = dict[str, torch.Tensor]


def rewrite(source: Path, folder: Path, change: Callable[[Tensors], None], shards: int = 1) -> Path:
    """A copy of the checkpoint with other tensors, in one file or in shards with an index."""
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    with_config(source, folder)
    (folder / "model.safetensors").unlink()
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    weight_map = {name: f"shard-{i % shards}" for i, name in enumerate(sorted(tensors))}
    for shard in set(weight_map.values()):
        save_file({n: t for n, t in tensors.items() if weight_map[n] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def quantize(folder: Path) -> Callable[[Tensors], None]:
    """Turn every tensor that the official repositories store in FP8 into e4m3 and its scale."""
    table = tensor_table(ModelConfig.from_path(folder))

    def change(tensors: Tensors) -> None:
        for name, spec in table.items():
            if spec.may_be_fp8:
                tensors[name], tensors[name + "_scale_inv"] = quantize_fp8_blocks(
                    tensors[name], False
                )

    return change


def dequantize(tensors: Tensors) -> None:
    for name in [n for n in tensors if n.endswith("_scale_inv")]:
        weight = name.removesuffix("_scale_inv")
        tensors[weight] = dequantize_fp8_blocks(tensors[weight], tensors.pop(name))


def load(folder: Path, **options: Any) -> LLM:
    return LLM(str(folder), num_pages=4, **options)


@pytest.mark.parametrize("family", ["dsv32", "glm"])
@pytest.mark.parametrize("quantization", ["auto", "none"])
def test_fp8_equals_its_dequantised_twin(
    family: str, quantization: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """Weights and scales land in different shards; kv_a_proj_with_mqa is ragged (192 rows)."""
    source = checkpoints[family]
    fp8 = rewrite(source, tmp_path / "fp8", quantize(source), shards=3)
    weight_map = json.loads((fp8 / "model.safetensors.index.json").read_text())["weight_map"]
    assert any(
        weight_map[n] != weight_map[n.removesuffix("_scale_inv")] for n in weight_map if "_inv" in n
    )

    def twin(tensors: Tensors) -> None:
        quantize(source)(tensors)
        dequantize(tensors)

    plain = rewrite(source, tmp_path / "plain", twin)
    ids = prompt(100)
    got = load(fp8, quantization=quantization).prompt_logits(ids)
    assert relative_l2(got, load(plain).prompt_logits(ids)) < 5e-6
    held = load(fp8, quantization=quantization).engine.runner.model.layers[0].attention.q_a_proj
    assert (held.weight.dtype == torch.float8_e4m3fn) == (quantization == "auto")


def test_quantize_on_load(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    llm = load(checkpoints["dsv32"], quantization="fp8")
    attention = llm.engine.runner.model.layers[0].attention
    assert attention.o_proj.weight.dtype == torch.float8_e4m3fn
    ids = prompt(40)
    full = load(checkpoints["dsv32"]).prompt_logits(ids)
    assert 1e-3 < relative_l2(llm.prompt_logits(ids), full) < 0.5


@pytest.mark.parametrize("shards", [1, 4])
def test_bf16_checkpoint_and_mtp_layer(
    shards: int, checkpoints: dict[str, Path], hf_models: dict[str, Any], tmp_path: Path
) -> None:
    def change(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[name] = tensors[name].bfloat16()
        tensors["model.layers.3.eh_proj.weight"] = torch.zeros(2, 2)  # the MTP layer of 3
        tensors["model.layers.3.shared_head.norm.weight"] = torch.zeros(2)

    folder = rewrite(checkpoints["dsv32"], tmp_path / "bf16", change, shards)
    rounded = type(hf_models["dsv32"])(hf_models["dsv32"].config).eval()
    rounded.load_state_dict(
        {k: v.bfloat16().float() for k, v in hf_models["dsv32"].state_dict().items()}
    )
    ids = prompt(90)
    assert relative_l2(load(folder).prompt_logits(ids), hf_logits(rounded, ids)) < 5e-6


def missing(tensors: Tensors) -> None:
    del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]


def extra(tensors: Tensors) -> None:
    tensors["model.layers.5.mlp.gate.weight"] = torch.zeros(1)


def wrong_shape(tensors: Tensors) -> None:
    tensors["lm_head.weight"] = torch.zeros(512, 127)


def wrong_dtype(tensors: Tensors) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"].half()


def fp8_where_none_belongs(tensors: Tensors) -> None:
    tensors["model.layers.1.mlp.gate.weight"] = tensors["model.layers.1.mlp.gate.weight"].to(
        torch.float8_e4m3fn
    )


def no_scale(tensors: Tensors) -> None:
    name = "model.layers.0.self_attn.o_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)


def scale_without_fp8(tensors: Tensors) -> None:
    tensors["model.layers.0.self_attn.o_proj.weight_scale_inv"] = torch.ones(1, 2)


def wrong_scale_shape(tensors: Tensors) -> None:
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    tensors[name], scale = quantize_fp8_blocks(tensors[name])
    tensors[name + "_scale_inv"] = scale[:1]


def nan_code(tensors: Tensors) -> None:
    name = "model.layers.0.self_attn.o_proj.weight"
    tensors[name], tensors[name + "_scale_inv"] = quantize_fp8_blocks(tensors[name])
    tensors[name].view(torch.uint8)[3, 5] = 0xFF


def nan_scale(tensors: Tensors) -> None:
    name = "model.layers.0.self_attn.o_proj.weight"
    tensors[name], tensors[name + "_scale_inv"] = quantize_fp8_blocks(tensors[name])
    tensors[name + "_scale_inv"][0, 0] = float("nan")


def nan_gain(tensors: Tensors) -> None:
    tensors["model.norm.weight"][7] = float("nan")


def infinite_bias(tensors: Tensors) -> None:
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    tensors[name] = tensors[name].bfloat16()
    tensors[name][0] = float("inf")


def one_expert_in_fp8(tensors: Tensors) -> None:
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    tensors[name], tensors[name + "_scale_inv"] = quantize_fp8_blocks(tensors[name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (missing, r"1 missing tensors: model\.layers\.1\.mlp\.experts\.3\.up_proj\.weight"),
        (extra, r"1 unexpected tensors: model\.layers\.5\.mlp\.gate\.weight"),
        (wrong_shape, r"lm_head\.weight: shape \[512, 127\].*\[512, 128\]"),
        (wrong_dtype, r"model\.norm\.weight: dtype F16 .*accepted.*BF16"),
        (fp8_where_none_belongs, r"mlp\.gate\.weight: dtype F8_E4M3 .*accepted"),
        (no_scale, r"o_proj\.weight: dtype F8_E4M3 without .*weight_scale_inv"),
        (scale_without_fp8, r"o_proj\.weight: dtype F32 with .*weight_scale_inv"),
        (wrong_scale_shape, r"kv_a_proj_with_mqa\.weight_scale_inv: .*\(1, 1\).*\(2, 1\)"),
        (nan_code, r"o_proj\.weight: NaN"),
        (nan_scale, r"o_proj\.weight: NaN"),
        (nan_gain, r"model\.norm\.weight: NaN"),
        (infinite_bias, r"e_score_correction_bias: .* infinite"),
        (one_expert_in_fp8, r"experts\.3\.up_proj\.weight: its neighbours"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_strict(
    change: Callable[[Tensors], None], message: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    folder = rewrite(checkpoints["dsv32"], tmp_path / "broken", change)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_damaged_files(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = rewrite(checkpoints["dsv32"], tmp_path / "cut", lambda _: None)
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for damaged in (whole[:-100], whole[:5], b"\xff" * 100, b""):
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read"):
            load(folder)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors\.index\.json and no model"):
        load(folder)


def test_damaged_index(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = rewrite(checkpoints["dsv32"], tmp_path / "index", lambda _: None, shards=2)
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())
    for text in ("{", "[]", '{"weight_map": 3}'):
        index.write_text(text)
        with pytest.raises(CheckpointError, match="not a safetensors index"):
            load(folder)
    outside = {**weight_map["weight_map"], "lm_head.weight": "../elsewhere"}
    index.write_text(json.dumps({"weight_map": outside}))
    with pytest.raises(CheckpointError, match=r"'\.\./elsewhere' is not a file name"):
        load(folder)
    weight_map["weight_map"]["lm_head.weight"] = "shard-7"
    index.write_text(json.dumps(weight_map))
    with pytest.raises(CheckpointError, match="shard-7: cannot be read"):
        load(folder)
    names = iter(weight_map["weight_map"].items())
    elsewhere = {
        name: "shard-1" if file == "shard-0" else "shard-0"
        for name, file in names
        if "shard" in file
    }
    index.write_text(json.dumps({"weight_map": elsewhere}))
    with pytest.raises(CheckpointError, match=r"shard-\d: .*weight"):
        load(folder)


def test_a_tensor_that_the_index_leaves_out(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = rewrite(checkpoints["dsv32"], tmp_path / "stray", lambda _: None, shards=2)
    stray = load_file(folder / "shard-0") | {"model.layers.1.stray": torch.zeros(1)}
    save_file(stray, folder / "shard-0")
    with pytest.raises(CheckpointError, match=r"unexpected tensors: model\.layers\.1\.stray"):
        load(folder)


GIGABYTE = ["hidden_size=1024", "num_hidden_layers=3", "vocab_size=65536", "n_routed_experts=64"]
MEASURE = """
import sys, threading, time
from pathlib import Path
from minidsv import LLM, SamplingParams
from minidsv.engine_config import bundled_model
from minidsv.tokenizer import Tokenizer

Tokenizer(bundled_model())  # imports what it needs

def rss_anon():
    lines = Path("/proc/self/status").read_text().split("\\n")
    return next(int(l.split()[1]) * 1024 for l in lines if l.startswith("RssAnon"))

before, peak, done = rss_anon(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, rss_anon())
        time.sleep(0.002)
thread = threading.Thread(target=watch); thread.start()
llm = LLM(sys.argv[1], dtype=sys.argv[2])
loaded = max(peak, rss_anon())
llm.generate([[5, 6, 7]], SamplingParams(max_tokens=2))
done = True; thread.join()
print(llm.engine.runner.weight_bytes, loaded - before, max(peak, rss_anon()) - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("format", "dtype", "inner"),
    [("bf16", "bfloat16", 768), ("bf16", "float32", 768), ("fp8", "float32", 1664)],
)
def test_peak_memory_of_a_gigabyte(format: str, dtype: str, inner: int, tmp_path: Path) -> None:
    """Loading, and a first answer, take at most 1.3 times the parameters as held."""
    folder = tmp_path / format
    changes = [
        *GIGABYTE,
        f"moe_intermediate_size={inner}",
        "first_k_dense_replace=1",
        "index_n_heads=32",
    ]
    changes += ["num_attention_heads=16", "intermediate_size=4096"]
    changes += ["max_position_embeddings=1048576"]
    command = [sys.executable, str(REPOSITORY / "scripts/make_random_checkpoint.py")]
    command += [str(REPOSITORY / "configs/deepseek_v32.json"), str(folder), "--format", format]
    command += ["--shard-mb", "300", *(f"--set={change}" for change in changes)]
    subprocess.run(command, check=True, capture_output=True)
    size = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    assert 0.95e9 < size < 1.15e9
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder), dtype],
        check=True,
        capture_output=True,
        text=True,
    )
    held, loaded, peak = map(int, done.stdout.split())
    print(f"loading {loaded / held:.3f}, with an answer {peak / held:.3f}")
    assert held > 0.9e9
    assert peak <= 1.3 * held, f"{peak / 1e9:.3f} GB for {held / 1e9:.3f} GB of parameters"
