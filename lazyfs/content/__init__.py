"""Content model: files as chunks, directories as manifests, and how both are written to a store."""
