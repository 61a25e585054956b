"""Standby: an idle engine that keeps its memory, and no processor or GPU, until the next request."""
