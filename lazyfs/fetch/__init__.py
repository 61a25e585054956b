"""Fetching chunks: one chunk (`chunk`), the process that does it (`worker`), who starts that (`supervisor`), and the access log."""
