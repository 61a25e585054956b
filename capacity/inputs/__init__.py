"""Read a problem from files: the YAML document, units, traces, lead times, learned demand."""
