"""The FUSE protocol: spoken directly (`raw`) or through libfuse (`pyfuse3`)."""
