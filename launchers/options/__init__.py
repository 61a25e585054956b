"""What an engine's options ask of quickthaw: to run as given, how to listen, a way out of the sandbox, a model as it is.

`launchers.given_options` and `launchers.known_options` read them.
"""
