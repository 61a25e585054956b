"""From files to a problem: the YAML document, units, traces, lead times, learned demand."""
