"""What runs inside an engine's own interpreter: the standard library and that engine, nothing else.

The launcher shows this folder to the engine as the package `quickthaw_engine` together with entry points for both engines' plugin
groups (launchers/engine_site.py), so nothing has to be installed beside the engine. Imports in here are relative, so that it also
works as `plugin.engine` when quickthaw is installed there.
"""
