"""For the tests of the proxy: a running proxy, upstreams and attacks."""
