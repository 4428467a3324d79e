"""hv_batch: a distributed batch renderer for HunyuanVideo on Ray."""

__version__ = "0.2.0"
