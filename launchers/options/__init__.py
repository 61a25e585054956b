"""What an engine's options ask of quickthaw: to run as given, how to listen, a way out of the sandbox, a model as it is.

`known` lists the options of the tested releases; `launchers.given_options` reads those of a command line.
"""
