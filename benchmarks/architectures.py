"""The probe over every causal architecture of transformers, at a small size with random weights: `benchmarks/architectures.md`.

    python benchmarks/architectures.py                       # all of them, into the page
    python benchmarks/architectures.py llama granite bloom   # some, to the screen
    python benchmarks/architectures.py --runs [kinds]        # whole runs of current ones: train, resume, export, merge

Each is tried as a training on a CPU in bf16 asks for it (tiled attention) and in fp32 (torch's kernels).
"""

from __future__ import annotations

import logging
import math
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from agentft.config import compose, register_schemas, to_train_config
from agentft.errors import ModelError
from agentft.model import attention as tiled
from agentft.model.adapters import load_trained_state, prepare_for_training
from agentft.model.labelled_loss import LabelledLoss
from agentft.model.sources import byte_tokenizer
from agentft.recipes.config import ExportConfig, saved_config
from agentft.recipes.export import export
from agentft.recipes.probe import Probe, ProbeResult, ask_stock
from agentft.recipes.train import train
from agentft.tracking import read_metrics

PAGE = Path(__file__).resolve().with_suffix(".md")

LARGEST = 30_000_000
"""Parameters of a model that counts as small."""

SIZES: dict[float, str] = {
    64: "hidden_size d_model n_embd dim embedding_size hidden_dim word_embed_proj_dim"
    " feed_forward_size shared_intermediate_size",
    4: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_attention_heads n_head n_heads "
    "num_heads attention_heads decoder_attention_heads encoder_attention_heads num_local_experts num_experts index_n_heads "
    "n_routed_experts moe_num_experts linear_num_heads linear_num_value_heads linear_attn_num_heads zero_expert_num",
    2: "num_key_value_heads num_kv_heads n_kv_heads num_experts_per_tok num_experts_per_token moe_topk top_k moe_k "
    "linear_num_key_heads hc_lowrank",
    16: "head_dim attention_head_size attention_head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim linear_head_dim "
    "linear_key_head_dim linear_value_head_dim index_head_dim rotary_dim q_lora_rank kv_lora_rank mamba_d_state "
    "ssm_state_size state_size mamba_dt_rank mamba_d_head mamba_head_dim mamba_chunk_size chunk_size block_size index_topk "
    "o_lora_rank moe_latent_size",
    8: "mamba_n_heads mamba_num_heads n_mamba_heads",
    128: "intermediate_size ffn_dim d_ff decoder_ffn_dim encoder_ffn_dim n_inner ffn_hidden_size vocab_size padded_vocab_size "
    "moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size expert_ffn_hidden_size "
    "mamba_d_ssm vocab_size_per_layer_input attention_hidden_size shared_experts_intermediate_size ngram_vocab_size_base",
    256: "max_position_embeddings n_positions max_seq_len max_sequence_length n_ctx",
    1: "n_group topk_group num_expert_group n_groups mamba_n_groups num_shared_experts n_shared_experts "
    "mamba_expand num_dense_layers",
    0: "num_kv_shared_layers pad_token_id num_nextn_predict_layers",
    # Defaults at which a scale does nothing, and weights so small that a mistake would not show.
    8.5: "logits_scaling",
    12.0: "embedding_multiplier",
    0.3: "lm_head_multiplier",
    0.2: "initializer_range init_std",
}
SMALL = {name: size for size, names in SIZES.items() for name in names.split()}

HALF_ATTENTION = ["linear_attention", "full_attention"] * 2
OF_ITS_OWN: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_types": HALF_ATTENTION, "num_key_value_heads": 4},
    "bamba": {"attn_layer_indices": [1, 3], "mamba_expand": 2, "mamba_d_head": 16},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "falcon_h1": {"mamba_expand": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": HALF_ATTENTION, "mamba_expand": 2, "mamba_d_head": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_expand": 2},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm3": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"num_layers": 2},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1},
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "num_attention_heads": 4},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "n_mamba_heads": 2, "attention_head_dim": 32},
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_head_dim": 32,
        "mamba_headdim": 16,
        "mamba_expand": 2,
    },
    "zaya": {"num_experts_per_tok": 1},
}
"""What the sizes alone do not settle: layers of both kinds where a model has two, and numbers that must fit each other."""


def small_model(kind: str, dtype: torch.dtype, **own: Any) -> Any:
    """Return a small model of an architecture with random weights, with `own` settings before any others.

    Raises:
        Exception: whatever its code makes of such sizes.
    """
    whole = CONFIG_MAPPING[kind]
    config = type(whole().get_text_config(decoder=True))
    settings = config().to_dict()
    renamed = set(getattr(config, "attribute_map", {}))
    known = set(settings) | set(getattr(config, "__dataclass_fields__", {}))
    given: dict[str, Any] = {name: size for name, size in SMALL.items() if name in known and name not in renamed}
    if "kv_lora_rank" in known:
        given["num_key_value_heads"] = 4
    given = {name: value for name, value in given.items() if settings.get(name, 0) is not None or name in _MAY_BE_NONE}
    given |= OF_ITS_OWN.get(kind, {}) | {name: value for name, value in own.items() if name in known}
    small = config(**given)
    with torch.device("meta"):
        count = sum(p.numel() for p in _build(whole, small, dtype).parameters())
    if count > LARGEST:
        raise ValueError(f"{count / 1e6:,.0f} million parameters at the smallest")
    torch.manual_seed(0)
    model = _build(whole, small, dtype).eval()
    model.config.use_cache = False
    return model


_MAY_BE_NONE = (
    "head_dim",
    "num_key_value_heads",
    "rotary_dim",
    "n_shared_experts",
    "num_experts_per_tok",
    "n_routed_experts",
    "linear_num_key_heads",
    "linear_num_value_heads",
)


def _build(whole: Any, small: Any, dtype: torch.dtype) -> Any:
    try:
        return transformers.AutoModelForCausalLM.from_config(small, attn_implementation="eager", dtype=dtype)
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        return MODEL_FOR_CAUSAL_LM_MAPPING[whole]._from_config(small, attn_implementation="eager", dtype=dtype)


def try_one(kind: str, dtype: torch.dtype) -> ProbeResult | str:
    """Return how an architecture is computed, or why it is refused or cannot be made small."""
    try:
        model = small_model(kind, dtype)
    except Exception as error:
        return f"not small: {type(error).__name__}: {str(error).strip().splitlines()[-1][:90]}"
    try:
        wanted = tiled.TILED if dtype is torch.bfloat16 else "sdpa"
        return Probe(ask_stock(model, pad_id=0), LabelledLoss(model), 0).run(wanted, asked=False)
    except ModelError as error:
        return str(error)


def verdict(ways: ProbeResult | str) -> str:
    if isinstance(ways, ProbeResult):
        return "fell back" if ways.left else "held"
    return "not small" if ways.startswith("not small") else "refused"


def row(kind: str) -> tuple[str, str]:
    """Return an architecture's verdict and its line of the table."""
    found = [try_one(kind, dtype) for dtype in (torch.bfloat16, torch.float32)]
    order = ("not small", "refused", "fell back", "held")
    worst = min(map(verdict, found), key=order.index)
    if isinstance(found[0], str):
        return worst, f"| {kind} | {worst} | {found[0].removeprefix('not small: ').replace('|', '/')} | | | |"
    cells = [_cells(ways) if isinstance(ways, ProbeResult) else [ways] for ways in found]
    merged = [one if one == other else f"{one}; fp32: {other}" for one, other in zip(*cells, strict=False)]
    return worst, f"| {kind} | {worst} | " + " | ".join(merged) + " |"


def _cells(ways: ProbeResult) -> list[str]:
    asked = ways.attention if any(w.startswith("attention") for w in ways.left) else "as asked"
    leak = "no" if ways.leak else "yes"
    return [asked, "forward pass" if ways.stock_logits else "head", leak, "generate" if ways.stock_answers else "rows"]


RUNS = """
llama qwen2 qwen3 mistral ministral3 smollm3 olmo2 granite cohere cohere2 gemma2 gemma3_text gemma4_text glm4 phi phi3 phi3+long
gpt2 gpt_neox opt bloom falcon starcoder2 mixtral olmoe qwen2_moe qwen3_moe gpt_oss deepseek_v3 llama4_text glm4_moe
glm4_moe_lite qwen3_next qwen3_5_text qwen3_5_moe_text lfm2 lfm2_moe falcon_h1 nemotron_h bamba granitemoehybrid jamba
"""
"""Rows of the table of whole runs: model types; `+long` rotates positions beyond a first length by other factors."""

LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "original_max_position_embeddings": 64,
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
}

FIELDS = ("trains", "packs", "answers", "adapters", "resumes", "exports", "merges")


def whole_run(name: str, folder: Path) -> dict[str, str]:
    """Train adapters on every layer of a small model by the real recipe, stop, resume, export and merge.

    Returns:
        By field of `FIELDS` a number or `yes` where it holds, else what does not; nothing after the first failure.
    """
    found: dict[str, str] = {}
    try:
        for field, value in _steps(name, folder):
            found[field] = value
    except Exception as error:
        found[FIELDS[len(found)]] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"
    return found


def _steps(name: str, folder: Path) -> Iterator[tuple[str, str]]:
    base, tokenizer = folder / "base", byte_tokenizer()
    special = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 2048, "n_positions": 2048}
    sizes["vocab_size_per_layer_input"] = len(tokenizer)
    kind, _, long = name.partition("+")
    turned = {"rope_parameters": LONG, "original_max_position_embeddings": 64} if long else {}
    model = small_model(kind, torch.float32, **sizes, **special, **turned)
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    said = _Lines()
    logging.getLogger("agentft").addHandler(said)
    try:
        whole = _train(base, folder / "whole")
        losses = [row["train/loss"] for row in read_metrics(whole / "metrics.jsonl") if "train/loss" in row]
        if not losses[-1] < losses[0] < math.inf:
            raise ValueError(f"the loss does not fall: {losses}")
        yield "trains", f"{losses[0]:.2f} to {losses[-1]:.2f}"
        probe = next(line for line in said.lines if line.startswith("probe of"))
        yield "packs", "no" if "packed rows" in probe else "0.0"
        yield "answers", "generate" if "answers side by side" in probe else "rows"
        yield (
            "adapters",
            next(found[1] for line in said.lines if (found := re.search(r"adapters in (\d+ of \d+)", line))),
        )
    finally:
        logging.getLogger("agentft").removeHandler(said)
    _train(base, folder / "parts", "training.pause_at_fraction=0.5")
    parts = _train(base, folder / "parts")
    ends = [load_file(run / "checkpoints" / "step-000004" / "trained.safetensors") for run in (whole, parts)]
    if ends[0].keys() != ends[1].keys() or not all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0]):
        raise ValueError("a resumed run ends in other weights")
    yield "resumes", "bit for bit"
    wanted = _logits_of_run(parts, base)
    adapter = export(ExportConfig(run=str(parts), merge=False))
    stock = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    yield "exports", _distance(PeftModel.from_pretrained(stock, adapter), wanted)
    merged = export(ExportConfig(run=str(parts)))
    yield (
        "merges",
        _distance(transformers.AutoModelForCausalLM.from_pretrained(merged, attn_implementation="eager"), wanted),
    )


class _Lines(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _train(base: Path, run: Path, *overrides: str) -> Path:
    settings = [
        *("model=auto", "model.source=local", f"model.path='{base}'", "model.context=2048", "model.dtype=fp32"),
        *("sft_type=lora", "sft_type.targets=[all-linear]", "dataset=synthetic", "dataset.conversations=8"),
        *(
            "dataset.heldout=2",
            "dataset.max_length=2048",
            "training.gradient_accumulation_steps=1",
            "training.max_steps=4",
        ),
        *("training.save_steps=2", "training.logging_steps=1", "training.learning_rate=0.01", "training.warmup=0"),
        *(
            "evaluation.eval_steps=0",
            "evaluation.before=false",
            "evaluation.after=false",
            "tracking=disabled",
            "threads=1",
        ),
    ]
    register_schemas()
    return train(to_train_config(compose("train", [*settings, *overrides, f"run_dir='{run}'"]))).run_dir


_IDS = torch.arange(5, 29)[None]


def _logits_of_run(run: Path, base: Path) -> torch.Tensor:
    """Return the logits of the last checkpoint, in memory as it was trained."""
    config = saved_config(run)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    adapted = prepare_for_training(model, config.sft_type, config.model)
    load_trained_state(adapted, load_file(run / "checkpoints" / "step-000004" / "trained.safetensors"))
    with torch.no_grad():
        return adapted.eval()(input_ids=_IDS, use_cache=False).logits


def _distance(model: Any, wanted: torch.Tensor) -> str:
    """Return how far a model's logits are, over the spread of those that are wanted; raise ValueError beyond rounding."""
    with torch.no_grad():
        found = model.eval()(input_ids=_IDS, use_cache=False).logits
    distance = float((found - wanted).abs().max() / wanted.std())
    if not distance < 1e-3:
        raise ValueError(f"logits are {distance:.1e} of their spread away")
    return f"{distance:.0e}"


def write_runs(names: Sequence[str], page: Path | None) -> None:
    """Print the rows of whole runs, and write them into the page behind the probe's table."""
    lines = []
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            found = whole_run(name, Path(folder))
        lines.append(f"| {name} | " + " | ".join(found.get(field, "").replace("|", "/") for field in FIELDS) + " |")
        print(lines[-1], flush=True)
    if page is not None:
        before = page.read_text(encoding="utf-8").split(RUNS_HEAD.partition("\n")[0])[0].rstrip()
        page.write_text(f"{before}\n\n{RUNS_HEAD}" + "\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    transformers.logging.set_verbosity_error()
    tiled.register()
    if "--runs" in sys.argv:
        names = [name for name in sys.argv[1:] if name != "--runs"]
        write_runs(names or RUNS.split(), None if names else PAGE)
        return
    kinds = sys.argv[1:] or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    counts: Counter[str] = Counter()
    lines = []
    for kind in kinds:
        found, line = row(kind)
        counts[found] += 1
        lines.append(line)
        print(line, flush=True)
    summary = ", ".join(f"{counts[name]} {name}" for name in ("held", "fell back", "refused", "not small"))
    print(summary)
    if not sys.argv[1:]:
        runs = RUNS_HEAD.partition("\n")[0]
        kept = PAGE.read_text(encoding="utf-8").partition(runs)[2]
        head = HEAD.format(version=transformers.__version__, summary=summary)
        PAGE.write_text(head + "\n".join(lines) + f"\n\n{runs}{kept}", encoding="utf-8")


HEAD = """# Architectures

Written by `python benchmarks/architectures.py`. The probe that opens every training, over each causal architecture of
transformers {version} at a small size with random weights, in bf16 with tiled attention and in fp32 with torch's kernels:
{summary}.

Held: attention, loss, packed rows and answers are computed in agentft's own ways, and say what transformers' own code
says. Fell back: the named part is left to transformers. Refused: nothing is trained. Not small: no small model of it could
be made.

| `model_type` | verdict | attention | logits | packed | answers |
| --- | --- | --- | --- | --- | --- |
"""

RUNS_HEAD = """## Whole runs

Written by `python benchmarks/architectures.py --runs`. A small model with random weights goes through the real recipes in
fp32: four steps of LoRA on `all-linear` (loss of the first and last), the probe's verdict on packed rows (0.0: a neighbour
moves nothing) and on who answers, layers with adapters, a run stopped half way and resumed, the adapter exported and loaded by
plain peft, and the merged model loaded by plain transformers (largest distance of logits over their spread). An empty cell was
not reached.

| `model_type` | trains | packs | answers | adapters | resumes | exports | merges |
| --- | --- | --- | --- | --- | --- | --- | --- |
"""

if __name__ == "__main__":
    main()
