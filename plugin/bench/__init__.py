"""`quickthaw bench` and `quickthaw demo`: starts measured side by side, from outside."""
