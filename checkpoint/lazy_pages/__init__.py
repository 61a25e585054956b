"""The page server (userfaultfd).

Restored processes run before their memory is in place, and the pages needed first are copied first. `client` is the
owner's side, `main` the server process, `fault_handler` its work for one process tree, `working_set` the pages that it
copies first.
"""
