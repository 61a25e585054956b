"""Install what quickthaw needs beside its own wheel, which is CRIU: `quickthaw setup` and `quickthaw doctor --fix`.

`criu` is the order of things; `apt` fetches Debian packages, `debian_package` unpacks them, `bundle` makes a folder of
them that needs nothing of the host (checkpoint.criu.self_contained); `repair` is what doctor can do without asking.
"""
