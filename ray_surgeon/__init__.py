"""Prune large language models with The LLM Surgeon (arXiv 2312.17244) over Ray workers."""

__version__ = "0.1.0"
