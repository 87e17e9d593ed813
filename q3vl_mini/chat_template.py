"""The prompts of templates.py as Jinja chat templates, for libraries that build a prompt from messages.

transformers, sentence-transformers and vLLM read such a template from the checkpoint's folder. Rendered, it is the
prompt that `templates.embedder_prompt` and `templates.reranker_prompt` write, with one pad token for each visual.

An embedder reads the roles "system" (the instruction) and "user"; a reranker reads "system", "query" and "document".
A message's content is a string or a list of {"type": "text" | "image" | "video", ...}.
"""

import json
import re

from .templates import (
    EMBEDDER_INSTRUCTION,
    EMBEDDER_TEMPLATES,
    RERANKER_INSTRUCTION,
    RERANKER_TEMPLATES,
    choose,
)

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
# What stands for a video until the library writes its frame pairs there. transformers replaces the pad alone and keeps
# what is around it; vLLM looks for all three tokens.
VIDEO = "<|video_pad|>"
VIDEO_IN_VLLM = "<|vision_start|><|video_pad|><|vision_end|>"

# write(role): videos, then images, then texts; nothing at all is the word NULL.
# words(role): the texts of a message.
MACROS = """\
{%- macro words(role) -%}
{%- for content in messages | selectattr('role', 'eq', role) | map(attribute='content') -%}
{%- if content is string -%}
{{- content -}}
{%- else -%}
{%- for part in content if part.text is string and part.text.strip() -%}
{{- part.text -}}
{%- endfor -%}
{%- endif -%}
{%- endfor -%}
{%- endmacro -%}
{%- macro write(role) -%}
{%- set found = namespace(any=false) -%}
{%- for content in messages | selectattr('role', 'eq', role) | map(attribute='content') if content is not string -%}
{%- for kind, mark in [('video', VIDEO), ('image', IMAGE)] -%}
{%- for part in content if part.type == kind or kind in part -%}
{{- mark -}}
{%- set found.any = true -%}
{%- endfor -%}
{%- endfor -%}
{%- endfor -%}
{%- set texts = words(role) -%}
{%- if texts.strip() -%}
{{- texts -}}
{%- elif not found.any -%}
NULL
{%- endif -%}
{%- endmacro -%}
"""
FULL_STOP = """\
{%- set instruction = instruction.strip() -%}
{%- set instruction = instruction ~ ('.' if instruction[-1].isalnum() else '') -%}
"""


def chat_template(role: str, template: str, video: str = VIDEO) -> str:
    """The Jinja source of a role's prompt ("embedder" or "reranker") in a template ("report" or "released").

    The instruction is the variable `instruction`, which vLLM sets, else the system message, else the default. An
    embedder's gets a full stop after a letter or a digit. The module's own rule, a full stop after anything but
    Unicode punctuation, cannot be written in Jinja: the two differ after symbols and combining marks.

    Args:
        video: what stands for a video, VIDEO or VIDEO_IN_VLLM.
    """
    templates = {"embedder": EMBEDDER_TEMPLATES, "reranker": RERANKER_TEMPLATES}
    chosen = choose(templates[role], template)
    default = EMBEDDER_INSTRUCTION if role == "embedder" else RERANKER_INSTRUCTION
    slots = {
        "instruction": "instruction",
        "instance": "write('user')",
        "query": "write('query')",
        "document": "write('document')",
    }
    lines = [
        f"{{#- Written by q3vl_mini: the prompt {template!r} of its {role}. -#}}",
        f"{{%- set VIDEO, IMAGE = {json.dumps(video)}, {json.dumps(IMAGE)} -%}}",
        MACROS.rstrip(),
        "{%- set instruction = instruction | default('', true) or words('system') -%}",
        f"{{%- set instruction = instruction if instruction.strip() else {json.dumps(default)} -%}}",
        *([FULL_STOP.rstrip()] if role == "embedder" else []),
    ]
    for piece in re.split(r"(\{\w+\})", chosen.system + chosen.user + chosen.ending):
        if piece:
            said = slots[piece[1:-1]] if piece.startswith("{") else json.dumps(piece)
            lines.append(f"{{{{- {said} -}}}}")
    return "\n".join(lines) + "\n"
