"""Several worker processes on one port that share one set of pools."""
