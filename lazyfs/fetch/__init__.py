"""Fetching chunks: one chunk (`chunk`), the fetcher process (`worker`), its supervisor in the server (`supervisor`), and
the access log.
"""
