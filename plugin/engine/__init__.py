"""Code that runs inside an engine's own interpreter: it imports the standard library and that engine only.

The launcher puts this folder on the engine's path as the package `quickthaw_engine`, with entry points for both
engines' plugin groups (launchers/engine_site.py), so nothing is installed beside the engine. Imports in here are
relative, so that it also works as `plugin.engine` when quickthaw is installed there.
"""
