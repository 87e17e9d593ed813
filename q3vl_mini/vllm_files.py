"""The files for vLLM's pooling runner: its arguments, `vllm.yaml`, and the prompt, `vllm.jinja`.

Written from vLLM's documentation of pooling models and of Qwen3-VL-Embedding and -Reranker; vLLM itself is not run by
this project. From inside the checkpoint's folder:

    vllm serve . --config vllm.yaml
"""

import json
from collections.abc import Sequence
from pathlib import Path

from .chat_template import VIDEO_IN_VLLM, chat_template


def write_vllm_files(folder: Path, role: str, template: str, dims: Sequence[int] = ()) -> None:
    """Write both files of an embedder or a reranker; `dims` are an embedder's Matryoshka dimensions, if known."""
    (folder / "vllm.jinja").write_text(chat_template(role, template, VIDEO_IN_VLLM))
    if role == "embedder":
        settings = {"pooler-config": {"pooling_type": "LAST"}, "chat-template-content-format": "openai"}
        overrides = {"matryoshka_dimensions": list(dims)} if dims else {}
    else:
        # vLLM makes one classifier row of the two rows of the head: W_yes - W_no.
        settings = {}
        overrides = {
            "architectures": ["Qwen3VLForSequenceClassification"],
            "classifier_from_token": ["no", "yes"],
            "is_original_qwen3_reranker": True,
        }
    settings = {"runner": "pooling", "chat-template": "vllm.jinja", **settings}
    settings |= {"hf-overrides": overrides} if overrides else {}
    lines = ["# From inside this folder: vllm serve . --config vllm.yaml (not run by q3vl_mini)"]
    for name, value in settings.items():  # vLLM hands each value to its argument as text: an object is JSON in quotes
        lines.append(f"{name}: {value if isinstance(value, str) else repr(json.dumps(value))}")
    (folder / "vllm.yaml").write_text("\n".join(lines) + "\n")
