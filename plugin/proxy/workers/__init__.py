"""Serve one port with several worker processes that share one set of pools."""
