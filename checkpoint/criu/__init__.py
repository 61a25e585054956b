"""CRIU: its binary and options (`binary`), its image files (`images`), and the memory they describe (`pagemap`)."""
