"""CRIU: its binary and options (`binary`, `self_contained`), its image files (`images`), and the memory they describe (`pagemap`)."""
