"""Run a launch.

`launcher` owns it, `replica` drives one engine through its phases; `restore_snapshot`, `cold_start` and `take_snapshot`
are its longest steps.
"""
