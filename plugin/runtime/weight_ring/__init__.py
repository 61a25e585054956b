"""The weights that a snapshot excludes, on their way back beside CRIU and the driver.

layout: where each byte of them is. ring: threads that read those bytes, in order, into a ring of shared memory. feed: one
restore's ring, from the decision until the engine has taken all of it (plugin/engine/weights.py) or reads its weights itself.
"""
