"""`quickthaw bench` and `quickthaw demo`: measure starts side by side, from outside."""
