"""Replay a trace against several policies and compare them."""
