"""The page server (userfaultfd): restored processes run before their memory is in place.

`client` is the owner's side, `main` the server process, `fault_handler` serves faults, `copier` copies the recorded
working set first, then everything else.
"""
