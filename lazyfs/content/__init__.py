"""What is stored: files as chunks, directories as manifests, and how both get into a store."""
