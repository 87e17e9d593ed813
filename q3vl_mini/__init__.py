"""q3vl_mini: how a vision-language model becomes a multimodal retriever, from backbone to index."""

__version__ = "0.1.0"
