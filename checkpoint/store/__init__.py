"""Snapshots in a remote store: pack into chunks (`archive`), `upload`, `download`, and restore during a download (`remote_restore`)."""
