"""The cache on local disk, shared by every mount of a host: sparse files, reservations, memory slots."""
