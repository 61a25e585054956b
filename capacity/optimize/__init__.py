"""Solve a problem: the linear program, integer solutions, infeasibility explanations, and an independent check."""
