"""Names by which a checkpoint can be called the best: what a setting is checked against before numpy is imported.

Their formulae stand in `agentft.evaluation.definitions`; a test holds the two together.
"""

from __future__ import annotations

BEST_METRICS = (
    *("loss", "tool_acc", "tool_precision", "tool_f1", "param_em", "param_em_given_tool", "param_em_lenient"),
    *("arg_f1", "arg_f1_micro", "step_em", "conv_em", "plan_acc", "call_wellformed_rate", "thought_wellformed_rate"),
    *("url_match", "rouge_l", "rouge_l_after_call", "rouge_l_no_call", "rouge_l_jieba"),
    *("tool_acc_repaired", "param_em_repaired", "arg_f1_repaired", "step_em_repaired"),
    *("legacy_action_em", "legacy_input_em", "legacy_rouge_l", "action_em", "argument_f1"),
)
