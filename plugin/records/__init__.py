"""Measurements kept on this host: lead times, restore rates, and the JSON lines format of both."""
