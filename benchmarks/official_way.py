"""How the official Qwen3-VL-Embedding repository's classes work, written anew from their documentation.

A batch goes through the processor as it comes and is padded to its longest; one forward takes all of it, pictures
included. The reranker takes one pair at a time. Models are folders of `export.export`, merged.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForMultimodalLM, AutoProcessor


class _Official:
    def __init__(self, folder: str | Path):
        self.processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
        model = AutoModelForMultimodalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
        self.model = model.eval()

    def last_states(self, chats: list[list[dict[str, Any]]]) -> torch.Tensor:
        inputs = self.processor.apply_chat_template(
            chats,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left"},
        )
        return self.model.model(**inputs, use_cache=False).last_hidden_state[:, -1]


def _message(role: str, item: dict[str, Any]) -> dict[str, Any]:
    return {"role": role, "content": [{"type": kind, kind: value} for kind, value in item.items()]}


class OfficialEmbedder(_Official):
    @torch.inference_mode()
    def encode(self, items: Sequence[dict[str, Any]], batch_size: int = 32) -> np.ndarray:
        batches = [items[start : start + batch_size] for start in range(0, len(items), batch_size)]
        return np.concatenate(
            [
                F.normalize(self.last_states([[_message("user", item)] for item in batch]), dim=-1).numpy()
                for batch in batches
            ]
        )


class OfficialReranker(_Official):
    @torch.inference_mode()
    def score(self, query: dict[str, Any], documents: Sequence[dict[str, Any]]) -> np.ndarray:
        yes, no = self.processor.tokenizer.convert_tokens_to_ids(["yes", "no"])
        direction = self.model.lm_head.weight[yes] - self.model.lm_head.weight[no]
        pairs = [[_message("query", query), _message("document", document)] for document in documents]
        return torch.cat([(self.last_states([pair]) @ direction).sigmoid() for pair in pairs]).numpy()
