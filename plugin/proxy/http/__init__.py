"""HTTP/1.1 on both sides: the client's connection (`downstream`), the replica's (`upstream_connection`), and the exchange between them."""
