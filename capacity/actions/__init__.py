"""Actions on a plan: the `--watch` loop, the user's commands, Kubernetes objects."""
