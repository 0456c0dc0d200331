"""The layouts as Jinja chat templates: what an inference server writes for a list of messages is what training showed.

Messages have the roles system, user, assistant and tool; calls may stand in `tool_calls`, or as text in the content. One
assistant message is one step, and ends with the stop token.

What Jinja cannot say is a rule of tokenisation: here marks and special tokens are found in the text, so what a user types
can become a control token, as with every chat template.
"""

from __future__ import annotations

import json

from agentft.data.native import HERMES_TOOLS, LLAMA_TOOLS, ChatmlTemplate, Llama3Template, Qwen3Template
from agentft.data.render import MsagentTemplate, Template
from agentft.errors import ConfigError

_TEXT = """\
{%- macro text(content) -%}
{%- if content is string -%}{{ content }}
{%- elif content -%}{%- for part in content -%}{{ part.text }}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- macro json(value) -%}
{%- if value is string -%}{{ value }}{%- else -%}{{ value | tojson }}{%- endif -%}
{%- endmacro -%}
"""

_MSAGENT = (
    _TEXT
    + """\
{%- if tools -%}
{{- raise_exception('this model reads its tools in the system text, a numbered list of JSON; pass no tools') -}}
{%- endif -%}
{%- for message in messages -%}
{%- set before = 'none' if loop.first else messages[loop.index0 - 1].role -%}
{%- if message.role == 'assistant' -%}
{%- if before == 'tool' -%}{{- '\\n' -}}
{%- elif before != 'assistant' -%}{{- ('' if loop.first else '\\n\\n') + '<|assistant|>:' -}}
{%- endif -%}
{%- set words = text(message.content) | trim -%}
{{- words -}}
{%- for call in message.tool_calls or [] -%}
{{- '\\n' if words or not loop.first -}}
{{- '<|startofthink|>```JSON\\n{"api_name": ' + (call.function.name | tojson) + ', "parameters": ' -}}
{{- json(call.function.arguments) + '}\\n```<|endofthink|>' -}}
{%- endfor -%}
{{- STOP -}}
{%- elif message.role == 'tool' -%}
{{- '\\n' if before == 'tool' else '\\n\\n' -}}
{%- set result = text(message.content) -%}
{%- if result.startswith('<|startofexec|>') -%}{{- result -}}
{%- else -%}{{- '<|startofexec|>```JSON\\n' + result + '\\n```<|endofexec|>' -}}
{%- endif -%}
{%- else -%}
{{- ('' if loop.first else '\\n\\n') + '<|' + message.role + '|>:' + text(message.content) -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and messages -%}
{{- '\\n' if messages[-1].role == 'tool' else '\\n\\n<|assistant|>:' if messages[-1].role != 'assistant' -}}
{%- endif -%}
"""
)

_CHATML = (
    _TEXT
    + """\
{%- set system = text(messages[0].content) if messages and messages[0].role == 'system' else DEFAULT_SYSTEM -%}
{%- if system or tools -%}
{{- '<|im_start|>system\\n' + system -}}
{%- if tools -%}
{{- '\\n\\n' if system -}}
{{- TOOLS_BEFORE -}}{%- for tool in tools -%}{{- '\\n' + (tool | tojson) -}}{%- endfor -%}{{- TOOLS_AFTER -}}
{%- endif -%}
{{- STOP + '\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{{- '<|im_start|>assistant\\n' + BEFORE_STEP -}}
{%- set words = text(message.content) | trim -%}
{{- words -}}
{%- for call in message.tool_calls or [] -%}
{{- '\\n' if words or not loop.first -}}
{{- '<tool_call>\\n{"name": ' + (call.function.name | tojson) + ', "arguments": ' -}}
{{- json(call.function.arguments) + '}\\n</tool_call>' -}}
{%- endfor -%}
{{- STOP + '\\n' -}}
{%- elif message.role == 'tool' -%}
{{- '<|im_start|>user\\n' if loop.first or messages[loop.index0 - 1].role != 'tool' else '\\n' -}}
{{- '<tool_response>\\n' + text(message.content) + '\\n</tool_response>' -}}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}{{- STOP + '\\n' -}}{%- endif -%}
{%- elif not (loop.first and message.role == 'system') -%}
{{- '<|im_start|>' + message.role + '\\n' + text(message.content) + STOP + '\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' + BEFORE_STEP -}}{%- endif -%}
"""
)

_LLAMA3 = (
    _TEXT
    + """\
{%- macro header(role) -%}{{- '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' -}}{%- endmacro -%}
{{- '<|begin_of_text|>' -}}
{%- set system = text(messages[0].content) if messages and messages[0].role == 'system' else '' -%}
{%- if system or tools -%}
{{- header('system') -}}
{%- if tools -%}
{{- TOOLS_BEFORE -}}{%- for tool in tools -%}{{- (tool | tojson(indent=4)) + '\\n\\n' -}}{%- endfor -%}{{- TOOLS_AFTER -}}
{%- endif -%}
{{- system -}}
{{- STOP -}}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{%- set words = text(message.content) | trim -%}
{{- header('assistant') + words -}}
{%- if words and message.tool_calls -%}{{- '<|python_tag|>' -}}{%- endif -%}
{%- for call in message.tool_calls or [] -%}
{{- '' if loop.first else '; ' -}}
{{- '{"name": ' + (call.function.name | tojson) + ', "parameters": ' + json(call.function.arguments) + '}' -}}
{%- endfor -%}
{{- STOP -}}
{%- elif message.role == 'tool' -%}
{{- header('ipython') + text(message.content) + STOP -}}
{%- elif not (loop.first and message.role == 'system') -%}
{{- header(message.role) + text(message.content) + STOP -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- header('assistant') -}}{%- endif -%}
"""
)


def chat_template(template: Template) -> str:
    """Return the Jinja chat template that writes the layout of `template`, its stop token included.

    Raises:
        ConfigError: a layout that has none.
    """
    match template:
        case MsagentTemplate():
            return _filled(_MSAGENT, STOP=template.stop_token)
        case ChatmlTemplate():
            before, after = HERMES_TOOLS.format(tools="\0").split("\0")
            return _filled(
                _CHATML,
                STOP=template.stop_token,
                DEFAULT_SYSTEM=template.default_system or "",
                BEFORE_STEP="<think>\n\n</think>\n\n" if isinstance(template, Qwen3Template) else "",
                TOOLS_BEFORE=before,
                TOOLS_AFTER=after,
            )
        case Llama3Template():
            before, after = LLAMA_TOOLS.format(tools="\0").split("\0")
            return _filled(_LLAMA3, STOP=template.stop_token, TOOLS_BEFORE=before, TOOLS_AFTER=after)
    raise ConfigError(f"{type(template).__name__}: this layout has no chat template")


def _filled(source: str, **constants: str) -> str:
    """Put constants before a template, as Jinja's own statements."""
    lines = [f"{{%- set {name} = {json.dumps(value, ensure_ascii=False)} -%}}\n" for name, value in constants.items()]
    return "".join(lines) + source
