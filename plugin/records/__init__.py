"""Measurements kept on this host: lead times, wake times, restore rates, and the JSON lines format of all."""
