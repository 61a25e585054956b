"""Snapshots in a remote store: as chunks (`archive`), there (`upload`), back (`download`), and restored while they arrive
(`remote_restore`)."""
