"""The first moments of a command, before anything heavy is imported: process 1 of a container (`pid1`), a snapshot's first bytes
(`prefetch`)."""
