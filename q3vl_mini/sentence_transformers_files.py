"""The files by which sentence-transformers loads a checkpoint: an embedder as SentenceTransformer, a reranker as
CrossEncoder.

They say which modules follow each other and what the model's output is called. The prompt and the sizes of pictures
are not in them: sentence-transformers takes both from the processor.
"""

import json
from pathlib import Path
from typing import Any

from .records import MODALITIES


def write_embedder_files(folder: Path, dim: int) -> None:
    """For SentenceTransformer: last_hidden_state, the last token's, normalised; `dim` dimensions."""
    modules = {
        "": ("base.modules.transformer.Transformer", _transformer("feature-extraction", "last_hidden_state")),
        "1_Pooling": (
            "sentence_transformer.modules.pooling.Pooling",
            {"embedding_dimension": dim, "pooling_mode": "lasttoken", "include_prompt": True},
        ),
        "2_Normalize": ("base.modules.normalize.Normalize", {}),
    }
    _write(folder, modules, {"model_type": "SentenceTransformer", "similarity_fn_name": "cosine"})


def write_reranker_files(folder: Path, yes_id: int, no_id: int) -> None:
    """For CrossEncoder: the sigmoid of logit(yes) - logit(no) at the last token (eq. 5)."""
    modules = {
        "": ("base.modules.transformer.Transformer", _transformer("any-to-any", "logits")),
        "1_LogitScore": (
            "cross_encoder.modules.logit_score.LogitScore",
            {"true_token_id": yes_id, "false_token_id": no_id},
        ),
    }
    _write(folder, modules, {"model_type": "CrossEncoder", "activation_fn": "torch.nn.modules.activation.Sigmoid"})


def _transformer(task: str, output: str) -> dict[str, Any]:
    """Settings of the first module: every modality goes through the model's forward, written as messages."""
    forward = {"method": "forward", "method_output_name": output}
    return {
        "transformer_task": task,
        "modality_config": {**dict.fromkeys(MODALITIES, forward), "message": {**forward, "format": "structured"}},
        "module_output_name": {"last_hidden_state": "token_embeddings", "logits": "causal_logits"}[output],
    }


def _write(folder: Path, modules: dict[str, tuple[str, dict[str, Any]]], model: dict[str, Any]) -> None:
    """`modules`: class and settings by subfolder, in the order in which they run."""
    files: dict[str, Any] = {"config_sentence_transformers.json": {**model, "prompts": {}}}
    files["modules.json"] = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.{kind}"}
        for i, (path, (kind, _)) in enumerate(modules.items())
    ]
    for path, (_, settings) in modules.items():
        files[f"{path}/config.json" if path else "sentence_bert_config.json"] = settings
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
