"""From a problem to a plan: the linear program, whole numbers, why there is none, and an independent check."""
