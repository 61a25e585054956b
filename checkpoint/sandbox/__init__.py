"""The sandbox that an engine runs in.

`init` is its first process, `sandbox` the owner's side; `prestart` starts helpers early.
"""
