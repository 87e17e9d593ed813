"""What a person chooses among by name. Importable without torch, so that the command line answers at once."""

from dataclasses import dataclass

SPLITS = ("train", "validation", "test")
STAGES = ("bootstrap", "s0", "s1", "reranker", "s2", "s3")  # in the order of a run
PRECISIONS = ("float32", "int8", "binary")  # of embeddings
MERGE_METHODS = ("linear", "slerp", "ties")
ROLES = ("embedder", "reranker")  # of a checkpoint
STORES = ("lance", "faiss")  # of an index


@dataclass(frozen=True)
class Gpu:
    """Memory in GB and dense half-precision peak in TFLOP/s, from NVIDIA's data sheets."""

    name: str
    memory_gb: float
    tflops: float


GPUS = {"T4": Gpu("T4", 16, 65), "A100": Gpu("A100 80GB", 80, 312), "H100": Gpu("H100 SXM", 80, 989)}
