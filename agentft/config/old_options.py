"""The names that settings had in the script before agentft, so that whoever types one is told the new name."""

from __future__ import annotations

OLD_OPTIONS = {
    "model_type": "model",
    "sft_type": "sft_type",
    "output_dir": "output_dir",
    "dataset": "dataset",
    "dataset_sample": "dataset.sample",
    "dataset_test_ratio": "dataset.test_ratio",
    "max_length": "dataset.max_length",
    "dtype": "model.dtype",
    "lora_rank": "sft_type.rank",
    "lora_alpha": "sft_type.alpha",
    "lora_dropout_p": "sft_type.dropout",
    "batch_size": "training.micro_batch",
    "gradient_accumulation_steps": "training.accumulation",
    "learning_rate": "training.learning_rate",
    "eval_steps": "evaluation.steps",
    "save_steps": "training.save_steps",
    "save_total_limit": "training.save_total_limit",
    "logging_steps": "training.logging_steps",
    "use_flash_attn": "model.attention",
}
"""Options of the script `llm_sft.py` that agentft replaces, and where each now is."""
