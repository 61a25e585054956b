"""Decide whether a snapshot may be restored here: read and compare launch options, host, engine and GPU (`check`)."""
