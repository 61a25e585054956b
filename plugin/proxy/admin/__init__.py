"""The admin endpoints: readiness, status, metrics and the page for people."""
