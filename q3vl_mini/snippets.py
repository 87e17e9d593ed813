"""How an exported model is loaded, library by library: the code of its README.md, run by tests/test_export.py.

NAME stands for the model, DIM for fewer dimensions, DTYPE for what an adapter adds: its base would come in half
precision.
"""

MODULE = {
    "embedder": """\
from q3vl_mini.embedder import Embedder

embedder = Embedder("NAME")
vectors = embedder.encode(["a red cat", {"image": "cat.png"}])
cosines = embedder.similarity(vectors[:1], vectors[1:])
""",
    "reranker": """\
from q3vl_mini.reranker import Reranker

scores = Reranker("NAME").score("a red cat", ["a green apple", {"image": "cat.png"}])
""",
}
TRANSFORMERS = {
    "embedder": """\
import torch
from transformers import AutoModel, AutoProcessor

processor = AutoProcessor.from_pretrained("NAME")
model = AutoModel.from_pretrained("NAME", dtype=torch.float32).eval()
chat = [{"role": "user", "content": [{"type": "image", "image": "cat.png"}]}]
inputs = processor.apply_chat_template([chat], tokenize=True, return_dict=True, return_tensors="pt")
with torch.no_grad():
    state = model(**inputs).last_hidden_state[:, -1]
vectors = torch.nn.functional.normalize(state, dim=-1)
""",
    "reranker": """\
import torch
from transformers import AutoModelForMultimodalLM, AutoProcessor

processor = AutoProcessor.from_pretrained("NAME")
model = AutoModelForMultimodalLM.from_pretrained("NAME", dtype=torch.float32).eval()
query = {"role": "query", "content": [{"type": "text", "text": "a red cat"}]}
document = {"role": "document", "content": [{"type": "image", "image": "cat.png"}]}
inputs = processor.apply_chat_template([[query, document]], tokenize=True, return_dict=True, return_tensors="pt")
with torch.no_grad():
    logits = model(**inputs).logits[:, -1]
yes, no = processor.tokenizer.convert_tokens_to_ids(["yes", "no"])
scores = torch.sigmoid(logits[:, yes] - logits[:, no])
""",
}
SENTENCE_TRANSFORMERS = {
    "embedder": """\
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("NAME"DTYPE)
vectors = model.encode(["a red cat", {"image": "cat.png"}])
queries = model.encode(["a red cat"], prompt="Retrieve the picture.")
short = model.encode(["a red cat"], truncate_dim=DIM, normalize_embeddings=True)
""",
    "reranker": """\
from sentence_transformers import CrossEncoder

model = CrossEncoder("NAME"DTYPE)
scores = model.predict([("a red cat", "a green apple"), ("a red cat", {"image": "cat.png"})])
""",
}
LIBRARIES = {"q3vl_mini": MODULE, "transformers": TRANSFORMERS, "sentence-transformers": SENTENCE_TRANSFORMERS}


def snippets(role: str, name: str, dim: int, is_adapter: bool) -> dict[str, str]:
    """{library: code} for a model of a role, called `name`; `dim` is what an embedder's vectors are cut to."""
    words = {"NAME": name, "DIM": str(dim), "DTYPE": ', model_kwargs={"dtype": "float32"}' if is_adapter else ""}
    codes = {}
    for library, by_role in LIBRARIES.items():
        code = by_role[role]
        for word, value in words.items():
            code = code.replace(word, value)
        codes[library] = code
    return codes
