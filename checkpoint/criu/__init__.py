"""CRIU: its binary and options (`binary`), its image files (`images`), and what they say about memory (`pagemap`)."""
