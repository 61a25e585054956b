"""Replay a trace against policies side by side."""
