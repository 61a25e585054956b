"""A launch's model: its download from a hub, and the proof of its content."""
